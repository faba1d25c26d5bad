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

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from longrope_jax.search.candidates import Score, SearchState, concatenate, evaluate
from longrope_jax.search.operators import draw_crossovers, draw_mutations
from longrope_jax.search.settings import EvolutionSettings
from longrope_jax.search.space import SearchSpace
from longrope_jax.search.surrogate import select_by_expected_improvement


@dataclass(frozen=True)
class Algorithm1:
    """The steps of the algorithm.

    Attributes:
        key: of all draws.
        space: the candidates that may be drawn.
        settings: sizes of populations, and how they are drawn.
        score: scores candidates.
    """

    key: PRNGKeyArray
    space: SearchSpace
    settings: EvolutionSettings
    score: Score

    def populate(self, state: SearchState, iteration: int, restart: int = 0) -> SearchState:
        """Appends population 0 of a restart: mutations of the seeds and of its ramps, until it has P candidates."""
        key = jax.random.fold_in(jax.random.fold_in(self.key, iteration), restart)
        seeds = state.candidates_of_restart(restart)
        mutations = self._mutate(key, state, seeds, max(self.settings.population - len(seeds), 0), restart)
        return concatenate(state, evaluate(mutations, self.score, None, iteration))

    def advance(self, state: SearchState, iteration: int, restart: int = 0) -> SearchState:
        """Appends one iteration: scored mutations and crossovers of the k best candidates of a restart.

        Time on the host is O(N) in the candidates so far. A surrogate adds some tenths of a second.
        """
        key = jax.random.fold_in(jax.random.fold_in(self.key, iteration), restart)
        rows = state.candidates_of_restart(restart)
        top_k = rows[np.argsort(state.nll[rows], kind="stable")[: self.settings.parents]]
        children = self._children(key, state, top_k, restart)
        threshold = state.nll[top_k[-1]] if len(top_k) == self.settings.parents else np.inf
        return concatenate(state, evaluate(children, self.score, state.incumbents(threshold), iteration))

    def _children(
        self, key: PRNGKeyArray, state: SearchState, top_k: Int[np.ndarray, "k"], restart: int
    ) -> SearchState:
        """Up to N1 mutations and N2 crossovers of the top-k, without scores."""
        settings = self.settings
        mutation_key, crossover_key, spare_key = jax.random.split(key, 3)
        drawn = settings.candidates_per_evaluation
        counts = drawn * settings.mutations, drawn * settings.crossovers
        crossovers = draw_crossovers(
            crossover_key, state, top_k, counts[1], settings.parents, restart, self.space, settings.crossover
        )
        mutations = self._mutate(mutation_key, concatenate(state, crossovers), top_k, counts[0], restart)
        # Similar parents have few different crossovers. Mutations fill up the generation.
        known = concatenate(state, crossovers, mutations)
        spare = self._mutate(spare_key, known, top_k, counts[1] - len(crossovers), restart)
        children = concatenate(mutations, crossovers, spare)
        if drawn == 1:
            return children
        count = settings.mutations + settings.crossovers
        if not np.isfinite(state.nll).any():  # the surrogate has nothing to learn from
            return children.take(np.arange(min(count, len(children))))
        return children.take(select_by_expected_improvement(state, children, count, goal=state.nll[top_k[0]]))

    def _mutate(
        self, key: PRNGKeyArray, state: SearchState, parents: Int[np.ndarray, "k"], count: int, restart: int
    ) -> SearchState:
        kind, probability, reach = self.settings.mutation, self.settings.mutation_probability, self.settings.reach
        return draw_mutations(
            key, state, parents, count, self.settings.parents, restart, self.space, kind, probability, reach
        )
