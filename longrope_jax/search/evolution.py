"""Algorithm 1 of LongRoPE: its two moves, as pure functions of (key, state, iteration).

`populate` makes population 0 out of what a search starts with, and `advance` does one iteration. Each draws from
`fold_in(key, iteration)`, so a search that was killed goes on bit for bit from any saved state, and has only the
iterations left that it had not done.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from longrope_jax.search.candidates import Genes, Score, SearchState, joined, scored, unscored, without_known
from longrope_jax.search.operators import CROSSOVERS, MUTATIONS
from longrope_jax.search.space import SearchSpace
from longrope_jax.search.surrogate import promising
from longrope_jax.settings import NonNegativeInt, PositiveInt, Probability, Rule, Settings, one_of

_DRAWN_AT_ONCE = 32  # children that one call of a compiled operator makes
_TRIES = 20  # rounds of calls before a generation is left smaller


@dataclass(frozen=True)
class EvolutionSettings(Settings):
    """Algorithm 1's numbers and operators; the numbers are the paper's up to 512k tokens (sec. 4.1), and so are the
    operators of `paper`.

    What is the default was measured, with races and random ramps (docs/results/search.md): most mutations are small,
    and of sixteen children the one is scored of which a model of the score expects most. The reach is wider than the
    paper's narrowest reading because, of two tiny models extended four times, it took the one with 64 dimensions a
    head from a search perplexity of 7.31 [7.30, 7.33] to 7.17 [7.14, 7.20] (mean and range of two searches of 1344
    candidates on one document of 512 tokens), and the one with 32 from 6.60 [6.59, 6.62] to 6.54 [6.42, 6.66], which
    is no clear difference; the other crossovers showed no gain over that noise.

    Attributes:
        population: P, candidates in population 0, the seeds included.
        mutations, crossovers: N1 and N2, new candidates an iteration.
        parents: k, the best candidates so far, of which children are made.
        iterations: T.
        mutation: how a candidate is changed, one of `operators.MUTATIONS`.
        mutation_probability: p, of every gene.
        reach: breadth of a redraw in rotary pairs, see `operators.redraw`; 1 is the narrowest reading of the paper.
        crossover: how two parents are mixed, one of `operators.CROSSOVERS`.
        crossover_probability: of every gene to come from the worse parent.
        restarts: how often all of that begins anew, from the seeds and from random ramps of its own if there are any:
            a population settles after a while, and another one settles elsewhere.
        proposals: children made for each one that is scored; of more than one, a model of the score chooses those that
            are worth it, see `search/surrogate.py`.
    """

    population: PositiveInt = 64
    mutations: NonNegativeInt = 16
    crossovers: NonNegativeInt = 16
    parents: PositiveInt = 32
    iterations: NonNegativeInt = 40
    mutation: Annotated[str, one_of(MUTATIONS)] = "redraw_few"
    mutation_probability: Probability = 0.3
    reach: Annotated[int, Rule(lambda pairs: 0 < pairs <= 10_000, "must lie between 1 and 10,000 pairs")] = 4
    crossover: Annotated[str, one_of(CROSSOVERS)] = "uniform"
    crossover_probability: Probability = 0.3
    restarts: PositiveInt = 1
    proposals: PositiveInt = 16

    @classmethod
    def paper(cls, **changes: Any) -> "EvolutionSettings":
        """Algorithm 1 read literally: every gene is redrawn with p = 0.3, within the gap between its neighbours."""
        literal = dict(
            mutation="redraw", mutation_probability=0.3, reach=1, crossover="uniform", restarts=1, proposals=1
        )
        return cls(**{**literal, **changes})

    @classmethod
    def released(cls, **changes: Any) -> "EvolutionSettings":
        """LongRoPE's released code (its `dim_mono`): every pair is redrawn, and a crossover is mostly one pair."""
        return cls.paper(**dict(mutation="sweep", crossover="released") | changes)

    @property
    def evaluations(self) -> int:
        """How many candidates one start scores, the seeds included."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


def populate(
    key: PRNGKeyArray,
    state: SearchState,
    iteration: int,
    space: SearchSpace,
    settings: EvolutionSettings,
    score: Score,
    restart: int = 0,
) -> SearchState:
    """Population 0 of a start: the seeds, its ramps, and mutations of them until there are P candidates, all scored."""
    key = jax.random.fold_in(jax.random.fold_in(key, iteration), restart)
    own = state.own(restart)
    missing = max(settings.population - len(own), 0)
    return joined(state, scored(_mutations(key, state, own, missing, restart, space, settings), score, None, iteration))


def advance(
    key: PRNGKeyArray,
    state: SearchState,
    iteration: int,
    space: SearchSpace,
    settings: EvolutionSettings,
    score: Score,
    restart: int = 0,
) -> SearchState:
    """One iteration: mutations and crossovers of the k best candidates of a start so far, scored and appended.

    Host time is O(N) in the candidates so far, and with `proposals` some tenths of a second; all else is the
    objective's.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, iteration), restart)
    own = state.own(restart)
    elite = own[np.argsort(state.nll[own], kind="stable")[: settings.parents]]
    children = _children(key, state, elite, restart, space, settings)
    standing = state.standing(bar=state.nll[elite[-1]] if len(elite) == settings.parents else np.inf)
    return joined(state, scored(children, score, standing, iteration))


def _children(key, state, elite, restart, space, settings) -> SearchState:
    """The new candidates of one iteration, unscored."""
    mutation_key, crossover_key, spare_key = jax.random.split(key, 3)
    mutations, crossovers = settings.proposals * settings.mutations, settings.proposals * settings.crossovers
    crossed = _crossovers(crossover_key, state, elite, crossovers, restart, space, settings)
    mutants = _mutations(mutation_key, joined(state, crossed), elite, mutations, restart, space, settings)
    # Parents that are much alike have few different children; mutations then take their places.
    missing = crossovers - len(crossed)
    spare = _mutations(spare_key, joined(state, crossed, mutants), elite, missing, restart, space, settings)
    children = joined(mutants, crossed, spare)
    if settings.proposals == 1:
        return children
    count = settings.mutations + settings.crossovers
    if not np.isfinite(state.nll).any():  # nothing to learn from, and the search will end with that
        return children.take(np.arange(min(count, len(children))))
    return children.take(promising(state, children, count, goal=state.nll[elite[0]]))


def _mutations(key, state, elite, count, restart, space, settings) -> SearchState:
    draw = partial(
        _mutants,
        space=space,
        kind=settings.mutation,
        probability=settings.mutation_probability,
        reach=settings.reach,
    )
    return _new_children(key, state, elite, count, restart, settings, "mutation", draw)


def _crossovers(key, state, elite, count, restart, space, settings) -> SearchState:
    count = count if len(elite) > 1 else 0
    draw = partial(_crosses, space=space, kind=settings.crossover, probability=settings.crossover_probability)
    return _new_children(key, state, elite, count, restart, settings, "crossover", draw)


@partial(jax.jit, static_argnames=("space", "kind", "probability", "reach"))
def _mutants(key, genes, rows, *, space, kind, probability, reach):
    """Mutations of random ones of the first `rows` rows of the genes: their parents' rows [children, 2], genes."""
    parent_key, key = jax.random.split(key)
    parents = jnp.int32(jax.random.uniform(parent_key, (_DRAWN_AT_ONCE,)) * rows)
    of_one = partial(MUTATIONS[kind], space=space, probability=probability, reach=reach)
    children = jax.vmap(of_one)(jax.random.split(key, _DRAWN_AT_ONCE), _rows(genes, parents))
    return jnp.stack([parents, jnp.full_like(parents, -1)], axis=1), children


@partial(jax.jit, static_argnames=("space", "kind", "probability"))
def _crosses(key, genes, rows, *, space, kind, probability):
    """Crossovers of random pairs of the first `rows` rows of the genes, which come best first; as `_mutants`."""
    parent_key, key = jax.random.split(key)
    first, second = jax.random.uniform(parent_key, (2, _DRAWN_AT_ONCE))
    first, second = jnp.int32(first * rows), jnp.int32(second * (rows - 1))
    second += second >= first  # uniform over the others
    better, other = jnp.minimum(first, second), jnp.maximum(first, second)
    cross = jax.vmap(partial(CROSSOVERS[kind], space=space, probability=probability))
    children = cross(jax.random.split(key, _DRAWN_AT_ONCE), _rows(genes, better), _rows(genes, other))
    return jnp.stack([better, other], axis=1), children


def _rows(genes: Genes, rows) -> Genes:
    return jax.tree.map(lambda leaf: leaf[rows], genes)


def _new_children(key, state, elite, count, restart, settings, operator, draw) -> SearchState:
    """Up to `count` unscored candidates drawn from the elite, different from each other and from all in `state`."""
    # One shape for every generation, so each operator compiles once; only the first len(elite) rows are drawn from.
    padded = np.resize(elite, max(settings.parents, len(elite)))
    documents = state.documents.shape[1]
    new = unscored(_rows(state.genes, np.zeros(0, int)), operator, documents)
    calls = 0
    for _ in range(_TRIES if count > 0 else 0):
        drawn = []
        for call in range(calls, calls + -(-(count - len(new)) // _DRAWN_AT_ONCE)):
            drawn.append(draw(jax.random.fold_in(key, call), _rows(state.genes, padded), len(elite)))
        calls += len(drawn)
        parents, genes = jax.tree.map(lambda *leaves: np.concatenate(leaves), *jax.device_get(drawn))
        parents = np.where(parents < 0, -1, elite[parents])
        new = joined(new, without_known(unscored(genes, operator, documents, parents, restart), state, new))
        new = new.take(np.arange(min(count, len(new))))
        if len(new) == count:
            break
    return new
