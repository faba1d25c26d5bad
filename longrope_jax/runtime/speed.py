"""How fast and how full the devices are: numbers for the metrics, from counts, seconds and what the platform tells."""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Int

from longrope_jax.model import LlamaConfig
from longrope_jax.model.arithmetic import TRAINING, Flops, count_flops
from longrope_jax.runtime.chips import chip_of


def attended_pairs(positions: Int[np.ndarray, "B T"]) -> int:
    """Pairs of a query and a key that it sees: a token sees those of its own text up to itself, and positions begin
    anew in every text that shares a sequence. Padding counts one a token.
    """
    return int(positions.sum(dtype=np.int64)) + positions.size


def training_flops(config: LlamaConfig, sequences: int, length: int, pairs: float) -> Flops:
    """Model FLOPs of training on so many sequences, with attention over `pairs` (`attended_pairs`) only.

    `count_flops` alone would count sequences of one text, an upper bound where texts are packed.
    """
    full = count_flops(config, sequences, length, TRAINING)
    return full._replace(attention=full.attention * pairs / (sequences * length * (length + 1) / 2))


def throughput(flops: Flops, tokens: int, seconds: float, devices: int, device_kind: str) -> dict[str, float]:
    """Metrics of work that took so long on so many devices (as JAX counts them).

    Returns:
        tokens_per_second, and the same per device. Where the chip is known (`runtime/chips.py`) also the share of its
        bfloat16 peak that the model's own arithmetic is, recomputation not counted: `mfu` of products with parameters
        only, `mfu_with_attention` of those of queries, keys and values too.
    """
    per_second = tokens / seconds
    told = {"tokens_per_second": per_second, "tokens_per_second_per_device": per_second / devices}
    chip = chip_of(device_kind)
    if chip is not None:
        available = chip.peak_flops * devices * seconds
        told |= {"mfu": flops.matrices / available, "mfu_with_attention": flops.total / available}
    return told


def memory(statistics: Iterable[Mapping[str, int] | None]) -> dict[str, float]:
    """Bytes of the fullest device, in use now and at most so far.

    Args:
        statistics: `device.memory_stats()` of every local device; None where the platform does not tell.
    """
    known = [told for told in statistics if told]
    names = {"hbm_bytes_in_use": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use"}
    return {
        name: float(max(told[key] for told in known if key in told))
        for name, key in names.items()
        if any(key in told for told in known)
    }
