"""LongRoPE for JAX and TPUs: extend a language model's context window by searched rotary rescale factors."""

from longrope_jax import rope
from longrope_jax.interop import load_pretrained
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.rope import FactorTable, RopeFactors
from longrope_jax.search.find import find_factors
from longrope_jax.search.settings import EvolutionSettings, SearchSettings

__all__ = [
    "EvolutionSettings",
    "FactorTable",
    "Llama",
    "LlamaConfig",
    "RopeFactors",
    "SearchSettings",
    "find_factors",
    "load_pretrained",
    "rope",
]
