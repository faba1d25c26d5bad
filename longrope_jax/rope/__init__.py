"""The positional module: rescale factors, the methods that make them, the rotation, and factors in files."""

from longrope_jax.rope.factors import RopeFactors, stack
from longrope_jax.rope.formats import load_factors, load_metadata, save_factors
from longrope_jax.rope.methods import (
    compose,
    critical_dimension,
    dynamic_ntk,
    frequencies,
    linear,
    llama3,
    longrope_mscale,
    ntk,
    ntk_critical,
    unscaled,
    yarn,
)
from longrope_jax.rope.rotation import apply_rotary, rotary_embedding

__all__ = [
    "RopeFactors",
    "apply_rotary",
    "compose",
    "critical_dimension",
    "dynamic_ntk",
    "frequencies",
    "linear",
    "llama3",
    "load_factors",
    "load_metadata",
    "longrope_mscale",
    "ntk",
    "ntk_critical",
    "rotary_embedding",
    "save_factors",
    "stack",
    "unscaled",
    "yarn",
]
