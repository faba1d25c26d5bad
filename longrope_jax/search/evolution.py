"""Algorithm 1 of LongRoPE as a pure function of (key, state): every candidate ever scored is the state.

`start` scores population 0 and `advance` does one iteration. Each iteration draws from `fold_in(key, iteration)`, so
a search that was killed goes on bit for bit from any saved state, and has only the iterations left that it had not
done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float, Int, PRNGKeyArray

from longrope_jax.rope import RopeFactors
from longrope_jax.search import operators
from longrope_jax.search.objective import Objective
from longrope_jax.search.space import SearchSpace

OPERATORS = ("seed", "mutation", "crossover")
_DRAWN_AT_ONCE = 32  # children that one call of a compiled operator makes
_TRIES = 20  # calls before a generation is left smaller


@dataclass(frozen=True)
class EvolutionSettings:
    """Algorithm 1's numbers; the defaults are the paper's up to 512k tokens (sec. 4.1).

    Attributes:
        population: P, candidates in population 0, the seeds included.
        mutations, crossovers: N1 and N2, new candidates an iteration.
        parents: k, the best candidates so far, of which children are made.
        iterations: T.
        mutation_probability: p, of every gene.
        reach: breadth of a mutation in rotary pairs, see `operators.mutate`; 1 is the narrowest reading of the paper.
        crossover_probability: of every gene to come from the worse parent.
    """

    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    parents: int = 32
    iterations: int = 40
    mutation_probability: float = 0.3
    reach: int = 1
    crossover_probability: float = 0.3

    def __post_init__(self):
        if self.population < 3:
            raise ValueError(f"population = {self.population} must be at least 3, the seeds")
        for name in ("parents", "reach"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        for name in ("mutations", "crossovers", "iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
        for name in ("mutation_probability", "crossover_probability"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} must lie in (0, 1]")

    @property
    def evaluations(self) -> int:
        """How many candidates a whole search scores."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


@flax.struct.dataclass
class SearchState:
    """Every candidate scored so far, in order.

    Attributes:
        lam, n_hat: their genes.
        nll: their scores, nats per token.
        parents: rows of the candidates that each was made of, -1 for none; a mutation has one, a crossover two.
        operator: index into `OPERATORS`.
        iteration: the iteration that each was born in, 0 for population 0.
    """

    lam: Float[np.ndarray, "N half"]
    n_hat: Int[np.ndarray, "N"]
    nll: Float[np.ndarray, "N"]
    parents: Int[np.ndarray, "N 2"]
    operator: Int[np.ndarray, "N"]
    iteration: Int[np.ndarray, "N"]

    def top(self, k: int) -> Int[np.ndarray, "k"]:
        """Rows of the k best, best first, of equals the older one: over all history, Algorithm 1's elitist top-k."""
        return np.argsort(self.nll, kind="stable")[:k]

    def best(self) -> RopeFactors:
        """The best candidate so far, with mscale 1."""
        row = self.top(1)[0]
        return RopeFactors(self.lam[row], self.n_hat[row], np.float32(1))


def start(
    key: PRNGKeyArray, seeds: dict[str, RopeFactors], space: SearchSpace, settings: EvolutionSettings, score: Objective
) -> SearchState:
    """Population 0: the seeds as they are, and mutations of them, all scored."""
    genes = [(np.asarray(seed.lam, np.float32), np.asarray(seed.n_hat, np.int32)) for seed in seeds.values()]
    lam, n_hat = (np.stack(leaves) for leaves in zip(*genes, strict=True))
    count = len(genes)
    seeded = SearchState(
        lam, n_hat, np.zeros(count), np.full((count, 2), -1), np.zeros(count, int), np.zeros(count, int)
    )
    mutants = _mutations(
        jax.random.fold_in(key, 0), seeded, np.arange(count), max(settings.population - count, 0), space, settings
    )
    population = _joined(seeded, mutants)
    return population.replace(nll=_scored(population, score))


def advance(
    key: PRNGKeyArray, state: SearchState, space: SearchSpace, settings: EvolutionSettings, score: Objective
) -> SearchState:
    """One iteration: mutations and crossovers of the k best candidates so far, scored and appended.

    Host time is O(N) in the candidates so far; all else is the objective's.
    """
    iteration = int(state.iteration[-1]) + 1
    mutation_key, crossover_key, spare_key = jax.random.split(jax.random.fold_in(key, iteration), 3)
    elite = state.top(settings.parents)
    crossed = _crossovers(crossover_key, state, elite, settings)
    mutants = _mutations(mutation_key, _joined(state, crossed), elite, settings.mutations, space, settings)
    # Parents that are much alike have few different children; mutations then take their places.
    missing = settings.crossovers - len(crossed.n_hat)
    spare = _mutations(spare_key, _joined(state, crossed, mutants), elite, missing, space, settings)
    children = _joined(mutants, crossed, spare)
    children = children.replace(nll=_scored(children, score), iteration=np.full(len(children.n_hat), iteration))
    return _joined(state, children)


def search(
    key: PRNGKeyArray,
    seeds: dict[str, RopeFactors],
    space: SearchSpace,
    settings: EvolutionSettings,
    score: Objective,
    state: SearchState | None = None,
    save: Callable[[SearchState], Any] = lambda state: None,
) -> SearchState:
    """Algorithm 1 to its end, from `state` if there is one; `save` hears of population 0 and of every iteration."""
    if state is None:
        state = start(key, seeds, space, settings, score)
        save(state)
    while state.iteration[-1] < settings.iterations:
        scored = len(state.nll)
        state = advance(key, state, space, settings, score)
        if len(state.nll) == scored:
            logging.warning("search: no new candidates are left in %s after %d", space, scored)
            break
        save(state)
    return state


def describe(state: SearchState, seed_names: list[str], first: int = 0) -> list[dict[str, Any]]:
    """One JSON-able entry a candidate from row `first` on: where it came from, its genes and its score."""
    return [
        {
            "candidate": row,
            "iteration": int(state.iteration[row]),
            "operator": OPERATORS[state.operator[row]],
            "parents": [int(parent) for parent in state.parents[row] if parent >= 0],
            **({"seed": seed_names[row]} if state.operator[row] == 0 else {}),
            "nll": float(state.nll[row]),
            "n_hat": int(state.n_hat[row]),
            "lam": state.lam[row].tolist(),
        }
        for row in range(first, len(state.nll))
    ]


def _mutations(key, state, elite, count, space, settings) -> SearchState:
    draw = partial(_mutants, space=space, probability=settings.mutation_probability, reach=settings.reach)
    return _new_children(key, state, elite, count, settings, OPERATORS.index("mutation"), draw)


def _crossovers(key, state, elite, settings) -> SearchState:
    count = settings.crossovers if len(elite) > 1 else 0
    draw = partial(_crosses, probability=settings.crossover_probability)
    return _new_children(key, state, elite, count, settings, OPERATORS.index("crossover"), draw)


@partial(jax.jit, static_argnames=("space", "probability", "reach"))
def _mutants(key, lam, n_hat, rows, *, space, probability, reach):
    """Mutations of random ones of the first `rows` rows of (lam, n_hat): their parents' rows [children, 2], genes."""
    parent_key, key = jax.random.split(key)
    parents = jnp.int32(jax.random.uniform(parent_key, (_DRAWN_AT_ONCE,)) * rows)
    mutate = partial(operators.mutate, space=space, probability=probability, reach=reach)
    children = jax.vmap(mutate)(jax.random.split(key, _DRAWN_AT_ONCE), (lam[parents], n_hat[parents]))
    return jnp.stack([parents, jnp.full_like(parents, -1)], axis=1), children


@partial(jax.jit, static_argnames="probability")
def _crosses(key, lam, n_hat, rows, *, probability):
    """Crossovers of random pairs of the first `rows` rows of (lam, n_hat), which come best first; as `_mutants`."""
    parent_key, key = jax.random.split(key)
    first, second = jax.random.uniform(parent_key, (2, _DRAWN_AT_ONCE))
    first, second = jnp.int32(first * rows), jnp.int32(second * (rows - 1))
    second += second >= first  # uniform over the others
    better, other = jnp.minimum(first, second), jnp.maximum(first, second)
    cross = jax.vmap(partial(operators.crossover, probability=probability))
    keys = jax.random.split(key, _DRAWN_AT_ONCE)
    return jnp.stack([better, other], axis=1), cross(keys, (lam[better], n_hat[better]), (lam[other], n_hat[other]))


def _new_children(key, state, elite, count, settings, operator, draw) -> SearchState:
    """Up to `count` unscored candidates drawn from the elite, different from each other and from all in `state`."""
    # One shape for every generation, so each operator compiles once; only the first len(elite) rows are drawn from.
    padded = np.resize(elite, max(settings.parents, len(elite)))
    seen = {_identity(lam, n_hat) for lam, n_hat in zip(state.lam, state.n_hat, strict=True)}
    new = []
    for attempt in range(_TRIES if count > 0 else 0):
        drawn = draw(jax.random.fold_in(key, attempt), state.lam[padded], state.n_hat[padded], len(elite))
        parents, (lam, n_hat) = jax.device_get(drawn)
        for child in zip(lam, n_hat, np.where(parents < 0, -1, elite[parents]), strict=True):
            if len(new) < count and _identity(*child[:2]) not in seen:
                seen.add(_identity(*child[:2]))
                new.append(child)
        if len(new) == count:
            break
    lam, n_hat, parents = zip(*new, strict=True) if new else ((), (), ())
    return SearchState(
        np.asarray(lam, np.float32).reshape(-1, state.lam.shape[1]),
        np.asarray(n_hat, np.int32),
        np.zeros(len(new)),
        np.asarray(parents, int).reshape(-1, 2),
        np.full(len(new), operator),
        np.zeros(len(new), int),
    )


def _identity(lam: np.ndarray, n_hat: np.ndarray) -> tuple:
    """Two candidates are the same if all their genes are, to a millionth."""
    return (int(n_hat), *np.round(lam.astype(np.float64), 6).tolist())


def _scored(candidates: SearchState, score: Objective) -> np.ndarray:
    mscale = np.ones(len(candidates.n_hat), np.float32)
    return score(RopeFactors(candidates.lam, candidates.n_hat, mscale))


def _joined(*states: SearchState) -> SearchState:
    return jax.tree.map(lambda *rows: np.concatenate(rows), *states)
