"""How a search scores a generation: block by block of documents, racing or in full, each result kept as it comes.

At two million tokens an iteration takes hours: what is known of it survives a kill, and is never asked for again.
"""

import hashlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import preemption, processes, records
from longrope_jax.search.candidates import Score, Scores
from longrope_jax.search.objective import Objective
from longrope_jax.search.racing import Standing, informative_first, judge

_RECORD = {"candidate": str, "block": int, "nll": [float], "documents_at_once": int}
_KEEP_EVERY = 30.0  # seconds; an object store takes a second for the file, a small model milliseconds for a candidate

Losses = Callable[[int, RopeFactors], Float[np.ndarray, "C B"]]
"""(block, candidates) -> losses on its documents, as `Objective.block_nll`."""


def score_with(
    objective: Objective,
    racing: float = 0.0,
    losses: Losses | None = None,
    progress: Callable[[float], Any] = lambda candidates: None,
) -> Score:
    """Populations -> scores.

    Args:
        racing: confidence with which it is plain where a candidate stands, see `racing.judge`; 0 reads all documents.
        losses: in place of the objective's own, such as `kept` ones.
        progress: is told how many candidates were dealt with, in parts.
    """
    losses = losses or objective.block_nll
    columns = [block.documents for block in objective.blocks]
    share = np.array([block.tokens for block in objective.blocks], float)
    share /= share.sum()

    def score(population: RopeFactors, standing: Standing | None) -> Scores:
        size = len(population.lam)
        documents, cost = np.full((size, len(objective.weights)), np.nan), np.zeros(size)
        rivals = standing if racing > 0 and standing is not None and standing.suffices else None
        order = informative_first(rivals.documents, objective.weights, columns) if rivals else [*range(len(columns))]
        nll, running = np.full(size, np.inf), np.arange(size)
        for place, block in enumerate(order):
            for first in range(0, len(running), objective.candidates_at_once):
                chosen = running[first : first + objective.candidates_at_once]
                candidates = jax.tree.map(lambda leaf, chosen=chosen: np.asarray(leaf)[chosen], population)
                documents[np.ix_(chosen, columns[block])] = losses(block, candidates)
                cost[chosen] += share[block]
                progress(len(chosen) * share[block])
            if rivals and place + 1 < len(columns):
                nll[running], is_plain = judge(documents[running], rivals, objective.weights, racing)
                progress(is_plain.sum() * (1 - sum(share[b] for b in order[: place + 1])))
                running = running[~is_plain]
        nll[running] = (documents[running] * objective.weights).sum(1)  # bit for bit, whoever else is running
        return Scores(nll, documents, cost)

    return score


def kept(losses: Losses, path: epath.Path, stage: str, documents_at_once: int = 1) -> Losses:
    """The same losses, written down as they are found: nothing is asked for twice, not even by a process that goes on.

    Args:
        path: a file of records, for all stages.
        documents_at_once: of a block; one that goes on with other blocks asks again.

    Raises (when it is called):
        preemption.Preempted: the process was asked to stop; all losses so far are in the file.
    """
    records.keep(path, lambda record: True)  # drops a line cut off by a kill
    processes.wait_for_all(f"{stage}: scores")
    known = {
        (record["candidate"], record["block"]): record["nll"]
        for record in records.of_stage(path, stage, _RECORD)
        if record["documents_at_once"] == documents_at_once
    }
    told, fresh, written = {"stage": stage, "documents_at_once": documents_at_once}, [], time.monotonic()

    def remembered(block: int, candidates: RopeFactors) -> Float[np.ndarray, "C B"]:
        nonlocal fresh, written
        names = _names(candidates)
        if not all((name, block) in known for name in names):
            found = losses(block, candidates)
            for name, row in zip(names, found.tolist(), strict=True):
                known[name, block] = row
                fresh.append({**told, "candidate": name, "block": block, "nll": row})
            is_asked = preemption.requested()
            if is_asked or time.monotonic() - written > _KEEP_EVERY:
                records.append(path, fresh)
                fresh, written = [], time.monotonic()
            if is_asked:
                raise preemption.Preempted(stage, f"{len(known)} scores of candidates on documents are kept")
        rows = [[np.inf if nll is None else nll for nll in known[name, block]] for name in names]
        return np.array(rows, np.float64)

    return remembered


def _names(population: RopeFactors) -> list[str]:
    rows = zip(*(np.asarray(leaf) for leaf in jax.tree.leaves(population)), strict=True)
    return [hashlib.sha256(b"".join(leaf.tobytes() for leaf in row)).hexdigest()[:16] for row in rows]
