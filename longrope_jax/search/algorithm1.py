"""Algorithm 1 of LongRoPE (arXiv 2402.13753, sec. 3.3).

::

    P_0 <- the seeds, and mutations of the seeds until there are P candidates
    for i = 1 .. T:
        top-k <- the k candidates with the lowest loss so far
        P_i   <- N1 mutations and N2 crossovers of the top-k, none of them scored before
        score P_i
    return the candidate with the lowest loss

Both steps are pure functions of (key, state, iteration), and draw from `fold_in(key, iteration)`. A search that was
stopped therefore continues bit for bit from any saved state. Everything beyond the paper plugs in: a surrogate that
selects among the children (`surrogate.py`), races (`racing.py`, inside `score`), and restarts.
"""

from functools import partial

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from longrope_jax.search.candidates import Score, SearchState, concatenate, evaluate
from longrope_jax.search.operators import draw_crossovers, draw_mutations
from longrope_jax.search.settings import EvolutionSettings
from longrope_jax.search.space import SearchSpace
from longrope_jax.search.surrogate import select_by_expected_improvement


def populate(
    key: PRNGKeyArray,
    state: SearchState,
    iteration: int,
    space: SearchSpace,
    settings: EvolutionSettings,
    score: Score,
    restart: int = 0,
) -> SearchState:
    """Appends population 0 of a restart: mutations of the seeds and of its ramps, until it has P candidates."""
    key = jax.random.fold_in(jax.random.fold_in(key, iteration), restart)
    seeds = state.candidates_of_restart(restart)
    missing = max(settings.population - len(seeds), 0)
    mutations = _mutate(key, state, seeds, missing, restart, space, settings)
    return concatenate(state, evaluate(mutations, score, None, iteration))


def advance(
    key: PRNGKeyArray,
    state: SearchState,
    iteration: int,
    space: SearchSpace,
    settings: EvolutionSettings,
    score: Score,
    restart: int = 0,
) -> SearchState:
    """Appends one iteration: scored mutations and crossovers of the k best candidates of a restart.

    Time on the host is O(N) in the candidates so far. A surrogate adds some tenths of a second.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, iteration), restart)
    rows = state.candidates_of_restart(restart)
    top_k = rows[np.argsort(state.nll[rows], kind="stable")[: settings.parents]]
    children = _children(key, state, top_k, restart, space, settings)
    threshold = state.nll[top_k[-1]] if len(top_k) == settings.parents else np.inf
    return concatenate(state, evaluate(children, score, state.incumbents(threshold), iteration))


def _children(
    key: PRNGKeyArray,
    state: SearchState,
    top_k: Int[np.ndarray, "k"],
    restart: int,
    space: SearchSpace,
    settings: EvolutionSettings,
) -> SearchState:
    """Up to N1 mutations and N2 crossovers of the top-k, without scores."""
    mutation_key, crossover_key, spare_key = jax.random.split(key, 3)
    drawn = settings.candidates_per_evaluation
    crossovers = draw_crossovers(
        crossover_key, state, top_k, drawn * settings.crossovers, settings.parents, restart, space, settings.crossover
    )
    mutations = _mutate(
        mutation_key, concatenate(state, crossovers), top_k, drawn * settings.mutations, restart, space, settings
    )
    # Similar parents have few different crossovers. Mutations fill up the generation.
    missing = drawn * settings.crossovers - len(crossovers)
    known = concatenate(state, crossovers, mutations)
    spare = _mutate(spare_key, known, top_k, missing, restart, space, settings)
    children = concatenate(mutations, crossovers, spare)
    if drawn == 1:
        return children
    count = settings.mutations + settings.crossovers
    if not np.isfinite(state.nll).any():  # the surrogate has nothing to learn from
        return children.take(np.arange(min(count, len(children))))
    return children.take(select_by_expected_improvement(state, children, count, goal=state.nll[top_k[0]]))


def _mutate(key, state, parents, count, restart, space, settings) -> SearchState:
    mutate = partial(draw_mutations, space=space, kind=settings.mutation, probability=settings.mutation_probability)
    return mutate(key, state, parents, count, settings.parents, restart, reach=settings.reach)
