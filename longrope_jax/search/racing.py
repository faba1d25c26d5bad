"""How a search scores a generation: block by block of documents, in full or in a race, and cached as it goes.

In a race a candidate is read only until it is decided whether it scores below a threshold: among the k best, say.
Candidates are compared with the incumbents document by document, so what makes a document hard cancels. The incumbents
themselves tell how far a difference on some documents is from the difference on all. A candidate that may be the best
of all is always read in full.

Screening comes first, where it is asked for: all candidates are read on skipped positions, and of every generation the
best ones go on.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import scipy.stats
from etils import epath
from jaxtyping import Bool, Float, Int
from scipy.spatial.distance import cdist

from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import json_lines, preemption
from longrope_jax.search.candidates import Incumbents, Score, Scores
from longrope_jax.search.objective import Objective, ScreeningSettings
from longrope_jax.search.surrogate import features

_RECORD = {"candidate": str, "block": int, "nll": [float], "documents_at_once": int}
_NEIGHBOURS = 8  # of a candidate, whose bias it has too
_WRITE_EVERY = 30.0  # seconds; an object store takes a second for the file, a small model milliseconds for a candidate

Losses = Callable[[int, RopeFactors], Float[np.ndarray, "C B"]]
"""(block, candidates) -> losses on its documents, as `Objective.block_nll`."""


def score_with(
    objective: Objective,
    racing: float = 0.0,
    losses: Losses | None = None,
    progress: Callable[[float], Any] = lambda candidates: None,
    reduction_factor: int = ScreeningSettings.reduction_factor,
) -> Score:
    """Returns the function that scores a population.

    Args:
        racing: confidence of a race's decisions, see `race`; 0 reads all documents.
        losses: in place of the objective's own, such as `cached` ones.
        progress: is called with the number of candidates finished since the last call, a fraction.
        reduction_factor: of `ScreeningSettings`, if the objective has skipped positions.
    """
    losses = losses or objective.block_nll
    columns = [block.documents for block in objective.blocks]
    share = np.array([block.flops for block in (*objective.blocks, *objective.screens)], float)
    share /= share[: len(columns)].sum()

    def score(population: RopeFactors, incumbents: Incumbents | None) -> Scores:
        size = len(population.lam)
        documents, skipped = np.full((2, size, len(objective.weights)), np.nan)
        nll, cost, screens, running = np.full(size, np.inf), np.zeros(size), np.full(size, np.nan), np.arange(size)
        rivals = incumbents if racing > 0 and incumbents and incumbents.has_enough else None

        def read(block: int, rows: Int[np.ndarray, "R"]) -> Iterator[tuple[Int[np.ndarray, "C"], Any]]:
            for first in range(0, len(rows), objective.candidates_at_once):
                chosen = rows[first : first + objective.candidates_at_once]
                candidates = jax.tree.map(lambda leaf, chosen=chosen: np.asarray(leaf)[chosen], population)
                yield chosen, losses(block, candidates)
                cost[chosen] += share[block]

        for number, pieces in enumerate(objective.screens, len(columns)):
            for chosen, found in read(number, running):
                skipped[np.ix_(chosen, pieces.documents)] = found
        if objective.screens:
            screens = (skipped * objective.weights).sum(1)
        if objective.screens and incumbents and incumbents.bias is not None and len(incumbents.bias):
            nll = estimate(screens, population, incumbents)
            running = np.sort(np.argsort(nll, kind="stable")[: -(-size // reduction_factor)])
            progress(size - len(running))
        promoted = running
        order = informative_first(rivals.documents, objective.weights, columns) if rivals else [*range(len(columns))]
        for place, block in enumerate(order):
            for chosen, found in read(block, running):
                documents[np.ix_(chosen, columns[block])] = found
                progress(len(chosen) * share[block])
            if rivals and place + 1 < len(columns):
                nll[running], decided = race(documents[running], rivals, objective.weights, racing)
                progress(decided.sum() * (1 - sum(share[b] for b in order[: place + 1])))
                running = running[~decided]
        nll[running] = (documents[running] * objective.weights).sum(1)  # bit for bit, whoever else is running
        if len(promoted) < size:
            # The lowest of many estimates are too low. A candidate that was not promoted ranks behind the typical one
            # that was, so it is never the best.
            others = np.setdiff1d(np.arange(size), promoted)
            nll[others] = np.maximum(nll[others], np.nextafter(np.median(nll[promoted]), np.inf))
        return Scores(nll, documents, cost, screens)

    return score


def estimate(
    screens: Float[np.ndarray, "P"], population: RopeFactors, incumbents: Incumbents
) -> Float[np.ndarray, "P"]:
    """Estimated scores, nats per token: those on skipped positions, and the mean bias of the candidates nearest to each
    that were read both ways. The bias depends on the factors: with one for all, a search ends at factors that suit the
    pieces.
    """
    assert incumbents.read is not None and incumbents.bias is not None
    distances = cdist(features(population), features(incumbents.read))
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :_NEIGHBOURS]
    return screens + incumbents.bias[nearest].mean(1)


def informative_first(
    incumbents: Float[np.ndarray, "F D"], weights: Float[np.ndarray, "D"], blocks: Sequence[Int[np.ndarray, "B"]]
) -> list[int]:
    """The order in which to read blocks of documents. Each next block brings the differences between the incumbents
    nearest to those on all documents.
    """
    order: list[int] = []
    left = list(range(len(blocks)))
    while left:
        errors = [_error(incumbents, weights, np.concatenate([blocks[b] for b in (*order, block)])) for block in left]
        order.append(left.pop(int(np.argmin(errors))))
    return order


def race(
    losses: Float[np.ndarray, "P D"], incumbents: Incumbents, weights: Float[np.ndarray, "D"], confidence: float
) -> tuple[Float[np.ndarray, "P"], Bool[np.ndarray, "P"]]:
    """Estimated scores, nats per token, and which candidates are decided.

    Args:
        losses: of the candidates; nan where not read yet, the same documents for all.
        weights: of the documents, see `document_weights`.
        confidence: one-sided, of the interval of a paired difference on all documents, given that on some (t with
            F - 1 degrees of freedom).
    """
    read = np.flatnonzero(~np.isnan(losses).any(0))
    mean = incumbents.documents.mean(0)
    score = mean @ weights + _weighted(losses - mean, weights, read)
    error = _error(incumbents.documents, weights, read)
    half_width = scipy.stats.t.ppf(confidence, len(incumbents.documents) - 1) * error
    is_out = score - half_width > incumbents.threshold
    is_in = (score + half_width < incumbents.threshold) & (score - half_width > incumbents.best)
    return score, is_out | is_in


def _error(documents, weights, read) -> float:
    """Root mean square over the incumbents: their difference to their mean on some documents, minus that on all."""
    differences = documents - documents.mean(0)
    errors = _weighted(differences, weights, read) - differences @ weights
    return float(np.sqrt(np.square(errors).sum() / (len(documents) - 1)))


def _weighted(differences, weights, read):
    return differences[:, read] @ (weights[read] / weights[read].sum())


def cached(losses: Losses, path: epath.Path, stage: str, documents_at_once: int = 1) -> Losses:
    """The same losses, written to a file as they are computed. Nothing is computed twice, also not after a restart of
    the process.

    Args:
        path: a file of records, for all stages.
        documents_at_once: of a block; a process with another number has other blocks, and computes its losses again.

    Raises (when it is called):
        preemption.Preempted: the process was asked to stop; all losses so far are in the file.
    """
    known = {
        (record["candidate"], record["block"]): record["nll"]
        for record in json_lines.resume(path, stage, _RECORD)
        if record["documents_at_once"] == documents_at_once
    }
    metadata = {"stage": stage, "documents_at_once": documents_at_once}
    unwritten, written = list[dict[str, Any]](), time.monotonic()

    def cached_losses(block: int, candidates: RopeFactors) -> Float[np.ndarray, "C B"]:
        nonlocal unwritten, written
        names = _hashes(candidates)
        if not all((name, block) in known for name in names):
            found = losses(block, candidates)
            for name, row in zip(names, found.tolist(), strict=True):
                known[name, block] = row
                unwritten.append({**metadata, "candidate": name, "block": block, "nll": row})
            is_asked_to_stop = preemption.requested()
            if is_asked_to_stop or time.monotonic() - written > _WRITE_EVERY:
                json_lines.append(path, unwritten)
                unwritten, written = [], time.monotonic()
            if is_asked_to_stop:
                raise preemption.Preempted(stage, f"{len(known)} scores of candidates on documents are saved")
        rows = [[np.inf if nll is None else nll for nll in known[name, block]] for name in names]
        return np.array(rows, np.float64)

    return cached_losses


def _hashes(population: RopeFactors) -> list[str]:
    rows = zip(*(np.asarray(leaf) for leaf in jax.tree.leaves(population)), strict=True)
    return [hashlib.sha256(b"".join(leaf.tobytes() for leaf in row)).hexdigest()[:16] for row in rows]
