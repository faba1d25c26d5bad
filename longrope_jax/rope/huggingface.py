"""Hugging Face's `rope_parameters` (formerly `rope_scaling`) <-> factors by length."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from longrope_jax.errors import shortened
from longrope_jax.json_files import POSITIVE, SIZE, field, numbers
from longrope_jax.rope.factors import FactorTable, RopeFactors
from longrope_jax.rope.methods import linear, llama3, longrope_mscale, unscaled, yarn

DROPPABLE = ("start_tokens", "lengths", "temperatures")
"""Properties of factors that `rope_parameters` does not support."""
TYPES = ("default", "linear", "llama3", "yarn", "longrope")
ORIGINAL = "original_max_position_embeddings"


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the rotation in a config.json as `rope_parameters` has them, including those beside the older
    `rope_scaling`. If a number is in both places, the one that Transformers takes is taken.

    Raises:
        ValueError: they are no object.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters = {shortened(rope)} must be an object")
    beside = {name: config[name] for name in ("rope_theta", ORIGINAL) if config.get(name) is not None}
    rope = beside | {name: value for name, value in rope.items() if value is not None}
    if rope_type(rope) in ("llama3", "yarn", "longrope"):
        rope[ORIGINAL] = beside.get(ORIGINAL, rope.get(ORIGINAL))
    return rope


def from_huggingface(parameters: Mapping[str, Any] | None, head_dim: int, base: float, max_length: int) -> FactorTable:
    """The factors of a config's `rope_parameters`, or of the older `rope_scaling`.

    Types as Transformers defines them: default, linear, llama3, yarn, and longrope (once "su"), which has two entries:
    the short factors up to and including `original_max_position_embeddings`, the long ones beyond it (if there is any).

    Args:
        parameters: None, or an object with "rope_type" (once "type") and the numbers of that type.
        head_dim: D.
        base: rope_theta.
        max_length: the config's max_position_embeddings, tokens; the last boundary of the table.

    Raises:
        ValueError: an unknown type, or a number that is missing or out of range.
    """
    parameters = parameters or {}
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError("rope_parameters must be one object for all layers, of numbers and lists")

    def number(name: str, default: float | None = None) -> float:
        return field(parameters, name, POSITIVE, default)

    kind = rope_type(parameters)
    if kind not in TYPES:
        raise ValueError(f"rope_type = {shortened(kind)} is not supported; known are {', '.join(TYPES)}")
    if kind == "default":
        return FactorTable.of({max_length: unscaled(head_dim)})
    if kind == "linear":
        return FactorTable.of({max_length: linear(head_dim, number("factor"))})
    original = field(parameters, ORIGINAL, SIZE)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        return FactorTable.of({max_length: llama3(head_dim, number("factor"), base, original, low, high)})
    scale = number("factor", max_length / original)
    if kind == "yarn":
        if not parameters.get("truncate", True):
            raise ValueError("truncate = False is not supported for yarn: its blend begins and ends at whole pairs")
        fast, slow = number("beta_fast", 32), number("beta_slow", 1)
        factors = yarn(head_dim, scale, base, original, beta_fast=fast, beta_slow=slow)
        mscale = number("attention_factor", _yarn_mscale(parameters, scale))
        return FactorTable.of({max_length: dataclasses.replace(factors, mscale=np.float32(mscale))})
    mscale = number("attention_factor", longrope_mscale(scale, original))
    short, long = (
        RopeFactors(
            np.asarray(field(parameters, name, numbers(head_dim // 2)), np.float32), np.int32(0), np.float32(mscale)
        )
        for name in ("short_factor", "long_factor")
    )
    # Where no sequence is long, only the short factors are left.
    return FactorTable.of({original: short, max_length: long} if original < max_length else {max_length: short})


def to_huggingface(table: FactorTable, original_length: int) -> dict[str, Any]:
    """`rope_parameters` of type longrope, without rope_theta, which belongs to the model.

    Args:
        table: of one or two entries; see `two_lengths` for others.
        original_length: L, used if the table has one entry, which then gives both the short and the long factors.

    Raises:
        ValueError: lists everything that the format does not support (see `unsupported_by_huggingface`).
    """
    if unsupported := unsupported_by_huggingface(table):
        raise ValueError(f"Hugging Face's rope_parameters does not support {'; '.join(unsupported.values())}")
    lam = np.asarray(table.factors.lam, np.float32)
    boundaries = np.asarray(table.boundaries)
    original = int(boundaries[0]) if len(boundaries) > 1 else min(original_length, int(boundaries[0]))
    scale, mscale = int(boundaries[-1]) / original, float(np.asarray(table.factors.mscale)[-1])
    parameters = {
        "rope_type": "longrope",
        "short_factor": [float(value) for value in lam[0]],
        "long_factor": [float(value) for value in lam[-1]],
        "factor": scale,
        "original_max_position_embeddings": original,
        "attention_factor": mscale,
    }
    if np.float32(mscale) != np.float32(longrope_mscale(scale, original)):
        # vLLM and mlx-lm read the temperature only from these names, and have a default if they are missing.
        parameters |= {"short_mscale": mscale, "long_mscale": mscale}
    return parameters


def unsupported_by_huggingface(table: FactorTable) -> dict[str, str]:
    """The properties of a table that `rope_parameters` does not support: names in `DROPPABLE` -> descriptions; empty if
    it supports all. A single start token is no such property: position 0 is never rotated.
    """
    unsupported = {}
    n_hat, mscale = np.asarray(table.factors.n_hat), np.asarray(table.factors.mscale, np.float32)
    is_rescaled = (np.asarray(table.factors.lam) != 1).any(-1)
    if ((n_hat > 1) & is_rescaled).any():
        unsupported["start_tokens"] = f"start tokens (n_hat = {', '.join(map(str, n_hat))})"
    if len(table.boundaries) > 2:
        unsupported["lengths"] = f"more than two lengths ({', '.join(map(str, np.asarray(table.boundaries)))})"
    if len(set(mscale.tolist())) > 1:
        values = ", ".join(f"{value:g}" for value in mscale)
        unsupported["temperatures"] = f"temperatures that differ by length (mscale = {values})"
    return unsupported


def two_lengths(table: FactorTable, original_length: int) -> FactorTable:
    """The nearest table that `rope_parameters` supports: the factors of the longest sequences and those of the original
    length, without start tokens, and with the temperature of the longest everywhere.
    """
    last = int(table.boundaries[-1])
    lengths = {int(table.boundaries[0])} if len(table.boundaries) == 2 else {min(original_length, last)}
    mscale = np.float32(np.asarray(table.factors.mscale)[-1])
    entries = {length: table.select(length) for length in sorted(lengths | {last})}
    return FactorTable.of({
        length: RopeFactors(factors.lam, np.int32(0), mscale)
        for length, factors in entries.items()
    })  # fmt: skip


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The type by its current name."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "su" or (kind == "yarn" and parameters.get("short_factor") is not None):
        return "longrope"  # the names in Phi-3's first files
    return kind


def _yarn_mscale(parameters: Mapping[str, Any], scale: float) -> float:
    """The temperature by Transformers' rules where none is given: a ratio of two (DeepSeek), or 0.1 ln s + 1."""

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(scale) + 1 if scale > 1 else 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        above, below = (field(parameters, name, POSITIVE) for name in ("mscale", "mscale_all_dim"))
        return temperature(above) / temperature(below)
    return temperature(1)
