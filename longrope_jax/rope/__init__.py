"""The positional module: rescale factors, the methods that make them, the rotation, and factors in files."""

from longrope_jax.rope.factors import FactorTable, RopeFactors, stack
from longrope_jax.rope.formats import load_factors, load_metadata, load_table, save_factors, save_table
from longrope_jax.rope.huggingface import from_huggingface, to_huggingface, two_lengths, unsupported_by_huggingface
from longrope_jax.rope.methods import (
    METHODS,
    Trained,
    compose,
    critical_dimension,
    dynamic_ntk,
    extend,
    frequencies,
    linear,
    llama3,
    longrope_mscale,
    ntk,
    ntk_critical,
    score_by_distance,
    trained_until,
    unscaled,
    wavelengths,
    yarn,
)
from longrope_jax.rope.rotation import apply_rotary, rotary_embedding

__all__ = [
    "FactorTable",
    "METHODS",
    "RopeFactors",
    "Trained",
    "apply_rotary",
    "compose",
    "critical_dimension",
    "dynamic_ntk",
    "extend",
    "frequencies",
    "from_huggingface",
    "linear",
    "llama3",
    "load_factors",
    "load_metadata",
    "load_table",
    "longrope_mscale",
    "unsupported_by_huggingface",
    "ntk",
    "ntk_critical",
    "rotary_embedding",
    "save_factors",
    "save_table",
    "score_by_distance",
    "stack",
    "to_huggingface",
    "trained_until",
    "two_lengths",
    "unscaled",
    "wavelengths",
    "yarn",
]
