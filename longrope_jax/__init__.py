"""LongRoPE for JAX and TPUs: extend a language model's context window by searched rotary rescale factors."""

from longrope_jax import rope
from longrope_jax.rope import RopeFactors

__all__ = ["RopeFactors", "rope"]
