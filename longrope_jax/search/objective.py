"""The score of candidates: the loss of the frozen model on documents, smaller is better; block by block of them."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from longrope_jax.evaluation.perplexity import window_nll
from longrope_jax.model import Llama
from longrope_jax.model.sharding import constrain
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import profiling
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.terms import Term, document_weights


@partial(jax.jit, static_argnames="model")
def rows_nll(
    model: Llama, params: dict, factors: RopeFactors, weights: Float[Array, "R T"], *rows: Int[Array, "R T"]
) -> Float[Array, "R"]:
    """Weighted NLL (nats per token) of every row, a document with the factors of one candidate, on every device.

    `factors` has a leading axis R, or of 1 where all rows share a candidate; `rows` are tokens, targets and positions.
    They are split over the mesh's data and fsdp axes, tokens over seq: time O(R T) in the matrices and O(R T^2) in
    attention, memory O(R T), by device.
    """
    return constrain((window_nll(model, params, factors, *rows) * weights).sum(1))


def fitting_candidates(layout: Layout, candidates_at_once: int, documents_at_once: int) -> int:
    """So many candidates, or a few more, that their rows, one a document, can be split evenly over the devices."""
    fitting = layout.row_shards // math.gcd(layout.row_shards, documents_at_once)
    return -(-candidates_at_once // fitting) * fitting


class Block(NamedTuple):
    """Documents of one term that are read together, as often as there are candidates at once.

    Attributes:
        documents: which of the objective's.
        tokens: how many a candidate reads here.
        weights: of every target, [candidates_at_once * documents_at_once, T], on the devices.
        rows: tokens, targets and positions, likewise.
    """

    documents: Int[np.ndarray, "B"]
    tokens: int
    weights: Float[Array, "R T"]
    rows: tuple[Int[Array, "R T"], Int[Array, "R T"], Int[Array, "R T"]]


@dataclass(frozen=True, eq=False)
class Objective:
    """Candidates x blocks -> losses. Every call of the compiled function has one of as many shapes as terms have
    lengths (what is missing is padded), so a whole search compiles once a length.

    Attributes:
        model: the architecture.
        layout: of the devices.
        params: of the frozen model, on them.
        weights: what each document counts in the score.
        blocks: the documents.
        candidates_at_once: how many are a batch axis of the model; under a mesh more than were asked for, where that is
            needed to fill its data and fsdp axes.
        documents_at_once: of a block.
    """

    model: Llama
    layout: Layout
    params: dict
    weights: Float[np.ndarray, "D"]
    blocks: list[Block]
    candidates_at_once: int
    documents_at_once: int
    _numbers: itertools.count = field(default_factory=lambda: itertools.count(1))

    @classmethod
    def of(
        cls,
        model: Llama,
        layout: Layout,
        params: dict,
        terms: Mapping[str, Term],
        candidates_at_once: int = 1,
        documents_at_once: int = 1,
    ) -> "Objective":
        """Places the text of all terms on the devices."""
        together = fitting_candidates(layout, candidates_at_once, documents_at_once)
        blocks, first = [], 0
        for term in terms.values():
            blocks += _blocks(layout, term, first, together, documents_at_once)
            first += len(term.tokens)
        weights = document_weights(list(terms.values()))
        return cls(model, layout, params, weights, blocks, together, documents_at_once)

    def block_nll(self, block: int, candidates: RopeFactors) -> Float[np.ndarray, "C B"]:
        """Losses of up to `candidates_at_once` candidates on the documents of a block, nats per token.

        What is not a number, or overflows, is inf, with a warning.
        """
        count, chosen = len(candidates.lam), self.blocks[block]
        rows = self.spread(candidates)
        nll = profiling.step("candidates", next(self._numbers), partial(self._losses, chosen, rows))
        nll = nll.reshape(-1, self.documents_at_once)[:count, : len(chosen.documents)]
        failed = ~np.isfinite(nll)
        if failed.any():
            logging.warning(
                "%d of %d candidates have a loss that is not a number on documents %s; they count as the worst",
                *(failed.any(1).sum(), count, chosen.documents[failed.any(0)].tolist()),
            )
        return np.where(failed, np.inf, nll)

    def spread(self, candidates: RopeFactors) -> RopeFactors:
        """Up to `candidates_at_once` candidates as factors of all rows of a block, on the devices."""
        chosen = np.minimum(np.arange(self.candidates_at_once), len(candidates.lam) - 1)
        if self.candidates_at_once > 1:
            chosen = np.repeat(chosen, self.documents_at_once)
        return self.layout.replicate(jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], candidates))

    def _losses(self, block: Block, rows: RopeFactors) -> Float[np.ndarray, "R"]:
        with jax.transfer_guard_host_to_device("disallow"):
            running = rows_nll(self.model, self.params, rows, block.weights, *block.rows)
        return np.asarray(jax.device_get(running), np.float64)


def _blocks(layout: Layout, term: Term, first: int, together: int, at_once: int) -> list[Block]:
    count, length = len(term.tokens), term.tokens.shape[1] - 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (together * at_once, length))
    blocks = []
    for start in range(0, count, at_once):
        chosen = np.arange(start, start + at_once)
        there = np.minimum(chosen, count - 1)
        rows, weights = (np.tile(leaf[there], (together, 1)) for leaf in (term.tokens, term.weights))
        weights, *placed = layout.place((np.float32(weights), rows[:, :-1], rows[:, 1:], positions))
        real = chosen[chosen < count]
        blocks.append(Block(first + real, len(real) * length, weights, tuple(placed)))
    return blocks
