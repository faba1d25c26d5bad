"""Scores kept one by one while an iteration of a search is under way: at two million tokens one takes hours."""

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
from longrope_jax.search.objective import Objective

_KEEP_EVERY = 30.0  # seconds; an object store takes a second for the file, a small model milliseconds for a candidate


def kept(
    objective: Objective,
    candidates_at_once: int,
    path: epath.Path,
    stage: str,
    progress: Callable[[int], Any] = lambda count: None,
) -> Objective:
    """The same objective, asked for a few candidates at a time, that writes down what it finds and asks for nothing
    twice, not even in another process that goes on.

    Args:
        path: a file of records, for all stages.
        progress: is told how many candidates were known already.

    Raises (when it is called):
        preemption.Preempted: the process was asked to stop; all scores so far are in the file.
    """
    records.keep(path, lambda record: True)  # drops a line cut off by a kill
    processes.wait_for_all(f"{stage}: scores")
    known = {record["candidate"]: record["nll"] for record in records.read(path) if record["stage"] == stage}
    written = time.monotonic()

    def score(population: RopeFactors) -> Float[np.ndarray, "P"]:
        nonlocal written
        names, fresh, size = _names(population), [], len(population.lam)
        for start in range(0, size, candidates_at_once):
            part = slice(start, min(start + candidates_at_once, size))
            if all(name in known for name in names[part]):
                progress(part.stop - part.start)
                continue
            found = objective(jax.tree.map(lambda leaf, part=part: np.asarray(leaf)[part], population))
            fresh += zip(names[part], map(float, found), strict=True)
            known.update(fresh)
            is_asked = preemption.requested() and part.stop < size
            if is_asked or time.monotonic() - written > _KEEP_EVERY:
                records.append(path, ({"stage": stage, "candidate": name, "nll": nll} for name, nll in fresh))
                fresh, written = [], time.monotonic()
            if is_asked:
                raise preemption.Preempted(stage, f"{part.stop} of {size} candidates of this iteration are scored")
        return np.array([np.inf if known[name] is None else known[name] for name in names])

    return score


def _names(population: RopeFactors) -> list[str]:
    rows = zip(*(np.asarray(leaf) for leaf in jax.tree.leaves(population)), strict=True)
    return [hashlib.sha256(b"".join(leaf.tobytes() for leaf in row)).hexdigest()[:16] for row in rows]
