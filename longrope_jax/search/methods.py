"""The methods of a search, as lists of steps. Each step is (state, iteration) -> state with more candidates.

The first step scores the seeds. The number of a step is the iteration of its candidates, so a search continues from its
candidates alone.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import cmaes
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from longrope_jax.rope import RopeFactors
from longrope_jax.search import gradient
from longrope_jax.search.algorithm1 import Algorithm1
from longrope_jax.search.candidates import (
    Genes,
    Score,
    SearchState,
    concatenate,
    evaluate,
    gene_keys,
    new_candidates,
    remove_duplicates,
)
from longrope_jax.search.objective import Objective
from longrope_jax.search.seeds import scan_ramps, scan_yarn_grid
from longrope_jax.search.settings import CmaEsSettings, SearchSettings
from longrope_jax.search.space import SearchSpace

SearchStep = Callable[[SearchState | None, int], SearchState]

_CMA_ES_SIGMA = 0.2  # step size of the first generation, in logarithms of lam, see `gradient.to_lam`


def search_steps(
    settings: SearchSettings,
    key: PRNGKeyArray,
    seeds: Genes,
    space: SearchSpace,
    objective: Objective,
    score: Score,
    checkpoint: gradient.RefinementCheckpoint | None = None,
    progress: Callable[[float], Any] = lambda candidates: None,
    grid: Collection[RopeFactors] = (),
) -> list[SearchStep]:
    """All steps of a search by `settings.method`, in order.

    Args:
        seeds: the first candidates, on a leading axis.
        checkpoint: of a gradient refinement; without it a stopped one starts again.
        progress: is called with the cost of each gradient step, in candidates; `score` reports its own.
        grid: of the method "yarn_grid".
    """
    common: dict[str, Any] = dict(space=space, score=score)
    score_seeds = partial(_score_seeds, seeds=seeds, documents=len(objective.weights), score=score)
    ramps = [partial(scan_ramps, key, count=settings.ramps, **common)] * (settings.ramps > 0)
    algorithm1 = Algorithm1(key, space, settings.evolution, score)
    evolve = [algorithm1.populate, *[algorithm1.advance] * settings.evolution.iterations]
    refine = partial(
        gradient.refine,
        key,
        settings=settings.gradient,
        objective=objective,
        checkpoint=checkpoint,
        progress=progress,
        **common,
    )
    refinements = [refine] * settings.gradient.rounds

    def every_restart(*steps: Callable[..., SearchState]) -> list[SearchStep]:
        return [partial(step, restart=restart) for restart in range(settings.evolution.restarts) for step in steps]

    if settings.method == "evolution" and not ramps:
        first, *others = every_restart(*evolve)
        return [lambda state, iteration: first(score_seeds(state, iteration), iteration), *others]
    if settings.method == "evolution":
        return [score_seeds, *every_restart(*ramps, *evolve)]
    if settings.method == "hybrid":
        return [score_seeds, *every_restart(*ramps, *refinements, *evolve)]
    if settings.method == "gradient":
        return [score_seeds, *ramps, *refinements]
    if settings.method == "yarn_grid":
        return [score_seeds, partial(scan_yarn_grid, key, grid=grid, **common)]
    generation = partial(cma_es_generation, key, settings=settings.cma_es, **common)
    return [score_seeds, *[generation] * settings.cma_es.iterations]


def search(
    steps: list[SearchStep], state: SearchState | None = None, save: Callable[[SearchState], Any] = lambda state: None
) -> SearchState:
    """Runs all steps that `state` does not contain yet, and calls `save` after each that found new candidates.

    Raises:
        ValueError: there are no steps.
        FloatingPointError: no candidate has a finite score.
    """
    done = -1 if state is None else int(state.iteration[-1])
    for iteration, step in enumerate(steps):
        if iteration <= done:
            continue
        before = 0 if state is None else len(state)
        state = step(state, iteration)
        if len(state) > before:
            save(state)
    if state is None:
        raise ValueError("steps is empty; there is nothing to search with")
    if not np.isfinite(state.nll.min()):
        raise FloatingPointError(f"not one of {len(state)} candidates has a finite score")
    return state


def _score_seeds(_: SearchState | None, iteration: int, seeds: Genes, documents: int, score: Score) -> SearchState:
    return evaluate(new_candidates(seeds, "seed", documents), score, None, iteration)


def cma_es_generation(
    key: PRNGKeyArray, state: SearchState, iteration: int, space: SearchSpace, settings: CmaEsSettings, score: Score
) -> SearchState:
    """One generation of CMA-ES, a baseline, on the monotone parametrisation of lam (Hansen and Ostermeier, "Completely
    derandomized self-adaptation in evolution strategies", 2001; the `cmaes` package).

    It starts at the best seed, and keeps the seed's n_hat, mscale and critical pair. The optimizer's state is rebuilt
    from all earlier generations, which takes milliseconds, so a search continues from its candidates alone.
    """
    start = state.take(np.flatnonzero(state.iteration == 0))
    start = start.take(start.top(1))
    seed = int(np.random.default_rng(np.asarray(jax.random.key_data(key))).integers(2**31))
    mean = gradient.from_lam(start.lam, space)[0].astype(np.float64)
    optimizer = cmaes.CMA(mean, _CMA_ES_SIGMA, population_size=settings.population, seed=seed)
    known = dict(zip(gene_keys(state.genes), state.nll.tolist(), strict=True))
    for _ in range(1, iteration):
        points, genes = _sample(optimizer, start, space, settings.population)
        optimizer.tell([(point, known[name]) for point, name in zip(points, gene_keys(genes), strict=True)])
    _, genes = _sample(optimizer, start, space, settings.population)
    new = remove_duplicates(new_candidates(genes, "cma_es", state.documents.shape[1]), state)
    return concatenate(state, evaluate(new, score, None, iteration))


def _sample(optimizer, start: SearchState, space: SearchSpace, count: int) -> tuple[list, Genes]:
    points = [optimizer.ask() for _ in range(count)]
    fixed = start.take(np.zeros(count, int)).genes
    lam = gradient.to_lam(np.asarray(points, np.float32), fixed.critical, space)
    return points, gradient.on_grid(fixed._replace(lam=lam), space)
