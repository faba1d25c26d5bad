"""The score of candidates: next-token loss of the frozen model on documents of the target length, smaller is better."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from longrope_jax.evaluation.perplexity import window_nll
from longrope_jax.model import Llama
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import profiling
from longrope_jax.runtime.mesh import Layout

Objective = Callable[[RopeFactors], Float[np.ndarray, "P"]]
"""A population of any size -> nats per token of every candidate."""


@partial(jax.jit, static_argnames="model")
def rows_nll(model: Llama, params: dict, factors: RopeFactors, *rows: Int[Array, "R T"]) -> Float[Array, "R"]:
    """Mean NLL (nats per token) of every row, a document with the factors of one candidate, on every device.

    `factors` has a leading axis R, or of 1 where all rows share a candidate; `rows` are tokens, targets and positions.
    They are split over the mesh's data and fsdp axes, tokens over seq: time O(R T) in the matrices and O(R T^2) in
    attention, memory O(R T), by device.
    """
    return window_nll(model, params, factors, *rows).mean(1)


def fitting_candidates(layout: Layout, candidates_at_once: int, documents_at_once: int) -> int:
    """So many candidates, or a few more, that their rows, one a document, can be split evenly over the devices."""
    fitting = layout.row_shards // math.gcd(layout.row_shards, documents_at_once)
    return -(-candidates_at_once // fitting) * fitting


def perplexity_objective(
    model: Llama,
    layout: Layout,
    params: dict,
    tokens: Int[np.ndarray, "N T+1"],
    candidates_at_once: int,
    documents_at_once: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> Objective:
    """The paper's objective on N documents; populations are scored `candidates_at_once` at a time, each of them on
    `documents_at_once` documents at a time.

    Every call of the compiled function has the same shape (the last ones are padded), so a whole search compiles once.
    A score that is not a number counts as the worst. Under a mesh more candidates are taken at once where that is
    needed to fill its data and fsdp axes.
    """
    candidates_at_once = fitting_candidates(layout, candidates_at_once, documents_at_once)
    count, length = len(tokens), tokens.shape[1] - 1
    groups = [np.arange(first, first + documents_at_once) for first in range(0, count, documents_at_once)]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (candidates_at_once * documents_at_once, length))
    placed = []
    for group in groups:
        block = np.tile(tokens[np.minimum(group, count - 1)], (candidates_at_once, 1))
        placed.append((layout.place((block[:, :-1], block[:, 1:], positions)), group < count))

    numbers = itertools.count(1)

    def candidates_nll(candidates: RopeFactors) -> Float[np.ndarray, "C"]:
        if candidates_at_once > 1:
            candidates = jax.tree.map(lambda leaf: np.repeat(leaf, documents_at_once, axis=0), candidates)
        candidates = layout.replicate(candidates)
        with jax.transfer_guard_host_to_device("disallow"):
            running = [rows_nll(model, params, candidates, *rows) for rows, _ in placed]
        done = jax.device_get(running)
        nll = [
            np.float64(rows).reshape(-1, documents_at_once)[:, is_real]
            for rows, (_, is_real) in zip(done, placed, strict=True)
        ]
        return np.concatenate(nll, axis=1).mean(1)

    def objective(population: RopeFactors) -> Float[np.ndarray, "P"]:
        size = len(population.lam)
        scores = []
        for start in range(0, size, candidates_at_once):
            chosen = np.minimum(np.arange(start, start + candidates_at_once), size - 1)
            candidates = jax.tree.map(lambda leaf, chosen=chosen: np.asarray(leaf)[chosen], population)
            scores.append(profiling.step("candidates", next(numbers), partial(candidates_nll, candidates)))
            progress(min(candidates_at_once, size - start))
        nll = np.concatenate(scores)[:size]
        return np.where(np.isfinite(nll), nll, np.inf)

    return objective
