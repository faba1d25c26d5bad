"""Times competitors alternately within one process, so that noise of the machine affects all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax


class Ratio(NamedTuple):
    """One number of a benchmark, for the table of all of them.

    Attributes:
        case: what was measured.
        ratio: the number.
        against: what it is a ratio of.
        better: "higher" or "lower".
    """

    case: str
    ratio: float
    against: str
    better: str


def median_seconds(competitors: Mapping[str, Callable], rounds: int = 9) -> dict[str, float]:
    """Median seconds of every function (of no arguments, returning arrays), after one call each to compile."""
    for function in competitors.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, function in competitors.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}
