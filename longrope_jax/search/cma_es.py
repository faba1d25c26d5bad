"""CMA-ES, an optimiser off the shelf, on the monotone parametrisation of lam: a baseline for the others to beat.

Hansen and Ostermeier, "Completely derandomized self-adaptation in evolution strategies", 2001; the `cmaes` package.
"""

from dataclasses import dataclass
from typing import Annotated

import cmaes
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from longrope_jax.search.candidates import (
    Genes,
    Score,
    SearchState,
    identities,
    joined,
    scored,
    unscored,
    without_known,
)
from longrope_jax.search.gradient import from_lam, on_grid, to_lam
from longrope_jax.search.space import SearchSpace
from longrope_jax.settings import PositiveFloat, PositiveInt, Rule, Settings


@dataclass(frozen=True)
class CmaEsSettings(Settings):
    """How CMA-ES is run.

    Attributes:
        population: candidates a generation.
        iterations: generations.
        sigma: step size of the first generation, in logarithms of lam, see `gradient.to_lam`.
    """

    population: Annotated[int, Rule(lambda count: count >= 2, "must be at least 2")] = 32
    iterations: PositiveInt = 40
    sigma: PositiveFloat = 0.2

    @property
    def evaluations(self) -> int:
        """How many candidates are scored, but for those that fall on one that was."""
        return self.population * self.iterations


def generation(
    key: PRNGKeyArray, state: SearchState, iteration: int, space: SearchSpace, settings: CmaEsSettings, score: Score
) -> SearchState:
    """One generation around the best seed, whose n_hat, mscale and critical pair all keep.

    The optimiser has a state of its own, which is what the candidates so far make of it: it is told of all generations
    before this one again, which takes milliseconds, and so a search goes on from its candidates alone.
    """
    start = state.take(np.flatnonzero(state.iteration == 0))
    start = start.take(start.top(1))
    seed = int(np.random.default_rng(np.asarray(jax.random.key_data(key))).integers(2**31))
    optimizer = cmaes.CMA(
        from_lam(start.lam, space)[0].astype(np.float64),
        settings.sigma,
        population_size=settings.population,
        seed=seed,
    )
    known = dict(zip(identities(state.genes), state.nll.tolist(), strict=True))
    for _ in range(1, iteration):
        asked, genes = _ask(optimizer, start, space, settings)
        optimizer.tell([(x, known[identity]) for x, identity in zip(asked, identities(genes), strict=True)])
    _, genes = _ask(optimizer, start, space, settings)
    new = without_known(unscored(genes, "cma_es", state.documents.shape[1]), state)
    return joined(state, scored(new, score, None, iteration))


def _ask(optimizer, start: SearchState, space: SearchSpace, settings: CmaEsSettings) -> tuple[list, Genes]:
    asked = [optimizer.ask() for _ in range(settings.population)]
    fixed = start.take(np.zeros(settings.population, int)).genes
    lam = to_lam(np.asarray(asked, np.float32), fixed.critical, space)
    return asked, on_grid(fixed._replace(lam=lam), space)
