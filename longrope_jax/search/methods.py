"""The methods of searching, as plans: a list of moves, each (state, iteration) -> state with more candidates.

The first move scores what a search starts with. The number of a move is the iteration that its candidates are born in,
so a search goes on from its candidates alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from longrope_jax.search import cma_es, evolution, gradient, ramps
from longrope_jax.search.candidates import Genes, Score, SearchState, joined, scored, unscored, without_known
from longrope_jax.search.objective import Objective
from longrope_jax.search.settings import SearchSettings
from longrope_jax.search.space import SearchSpace

Move = Callable[[SearchState | None, int], SearchState]


def plan(
    settings: SearchSettings,
    key: PRNGKeyArray,
    seeds: Genes,
    space: SearchSpace,
    objective: Objective,
    score: Score,
    kept: gradient.Kept | None = None,
    progress: Callable[[float], Any] = lambda candidates: None,
) -> list[Move]:
    """All moves of a search by `settings.method`, in order.

    Args:
        seeds: what to start with, a leading axis over them.
        kept: where a descent under way is kept; nowhere without it.
        progress: is told what a gradient step costs, in candidates scored; what scoring costs `score` tells itself.
    """
    common: dict[str, Any] = dict(space=space, score=score)
    begin = partial(_begin, seeds=seeds, documents=len(objective.weights), score=score)
    scan = [partial(ramps.scan, key, count=settings.ramps, **common)] * (settings.ramps > 0)
    populate: Move = partial(evolution.populate, key, settings=settings.evolution, **common)
    advance = [partial(evolution.advance, key, settings=settings.evolution, **common)] * settings.evolution.iterations
    descend = partial(
        gradient.descend, key, settings=settings.gradient, objective=objective, kept=kept, progress=progress, **common
    )
    descents = [descend] * settings.gradient.rounds

    def every_start(*moves: Callable[..., SearchState]) -> list[Move]:
        return [partial(move, restart=restart) for restart in range(settings.evolution.restarts) for move in moves]

    if settings.method == "evolution" and not scan:
        first, *others = every_start(populate, *advance)
        return [lambda state, iteration: first(begin(state, iteration), iteration), *others]
    if settings.method == "evolution":
        return [begin, *every_start(*scan, populate, *advance)]
    if settings.method == "hybrid":
        return [begin, *every_start(*scan, *descents, populate, *advance)]
    if settings.method == "gradient":
        return [begin, *scan, *descents]
    if settings.method == "cma_es":
        generation = partial(cma_es.generation, key, settings=settings.cma_es, **common)
        return [begin, *[generation] * settings.cma_es.iterations]
    return [begin, partial(_sweep_start_tokens, space=space, score=score)]


def search(
    moves: list[Move], state: SearchState | None = None, save: Callable[[SearchState], Any] = lambda state: None
) -> SearchState:
    """All moves that `state` has not seen, from the first one if there is none; `save` hears of each that found new
    candidates.

    Raises:
        ValueError: there are no moves.
        FloatingPointError: no candidate has a finite score.
    """
    done = -1 if state is None else int(state.iteration[-1])
    for iteration, move in enumerate(moves):
        if iteration <= done:
            continue
        before = 0 if state is None else len(state)
        state = move(state, iteration)
        if len(state) > before:
            save(state)
    if state is None:
        raise ValueError("moves is empty; there is nothing to search with")
    if not np.isfinite(state.nll.min()):
        raise FloatingPointError(f"not one of {len(state)} candidates has a finite score")
    return state


def _begin(_: SearchState | None, iteration: int, seeds: Genes, documents: int, score: Score) -> SearchState:
    return scored(unscored(seeds, "seed", documents), score, None, iteration)


def _sweep_start_tokens(state: SearchState, iteration: int, space: SearchSpace, score: Score) -> SearchState:
    rows = np.repeat(np.arange(len(state)), len(space.n_hat))
    genes = jax.tree.map(lambda leaf: leaf[rows], state.genes)._replace(n_hat=np.tile(space.n_hat, len(state)))
    parents = np.stack([rows, np.full(len(rows), -1)], axis=1)
    documents = state.documents.shape[1]
    new = without_known(unscored(genes, "start_tokens", documents, parents), state)
    return joined(state, scored(new, score, None, iteration))
