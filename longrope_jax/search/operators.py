"""Mutation and crossover, as pure functions of a PRNG key. All keep lam monotone and within the space.

An operator works on one candidate. `draw_mutations` and `draw_crossovers` apply it to a whole generation with
`jax.vmap`, in batches of one shape, so each operator compiles once.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from longrope_jax.search.candidates import Genes, SearchState, concatenate, new_candidates, remove_duplicates
from longrope_jax.search.space import SearchSpace

_BATCH = 32  # children per call of a compiled operator
_MAX_ROUNDS = 20  # rounds of calls; after them a generation stays smaller
_CROSSOVER_PROBABILITY = 0.3  # of every gene to come from the worse parent
_RELEASED_SWEEPS = 20


def redraw(key: PRNGKeyArray, parent: Genes, space: SearchSpace, probability: float, reach: int) -> Genes:
    """Visits every pair once, in order, and redraws its factor with `probability`; the other genes likewise.

    This is Algorithm 1's mutation (LongRoPE, arXiv 2402.13753, sec. 3.3). The paper does not say what is drawn.

    Args:
        reach: breadth. A factor is drawn uniformly between the factors of the pairs `reach` places below and above
            (the bounds of the space beyond the ends). Factors in between that it passes take its value, so lam stays
            monotone. With 1 that is the gap between its neighbours, the narrowest reading of the paper: the equal
            factors of a plateau then hold each other in place. A wider reach moves several at once.
    """
    lam_key, chance_key, key = jax.random.split(key, 3)
    child = _mutate_others(key, parent, space, probability)
    visited = jax.random.uniform(chance_key, child.lam.shape) < probability
    return _redraw_visited(lam_key, child, visited, space, reach)


def redraw_few(key: PRNGKeyArray, parent: Genes, space: SearchSpace, probability: float, reach: int) -> Genes:
    """`redraw` with a probability that every child draws for itself, log-uniform between that of one pair and
    `probability`. At least one free pair is redrawn.

    Most mutations are small, which improves a candidate that is good already, and some are large: a mutation rate with
    a heavy tail (Doerr et al., Fast Genetic Algorithms, 2017).
    """
    rate_key, pair_key, lam_key, chance_key, key = jax.random.split(key, 5)
    half = parent.lam.shape[-1]
    rate = probability * (1 / (half * probability)) ** jax.random.uniform(rate_key)
    child = _mutate_others(key, parent, space, rate)
    visited = jax.random.uniform(chance_key, (half,)) < rate
    visited |= jnp.arange(half) == jax.random.randint(pair_key, (), child.critical, half)
    return _redraw_visited(lam_key, child, visited, space, reach)


Mutation = Callable[..., Genes]
"""(key, parent, space, probability, reach) -> child."""

MUTATIONS: dict[str, Mutation] = {"redraw": redraw, "redraw_few": redraw_few}
"""By name in a config."""


def uniform_crossover(key: PRNGKeyArray, better: Genes, other: Genes, space: SearchSpace, probability: float) -> Genes:
    """The better parent, with every gene replaced by the other parent's with `probability`. lam is sorted afterwards.

    The released code throws children away whose lam is out of order, which are most of them.
    """
    lam_key, key = jax.random.split(key)
    child = _cross_others(key, better, other, probability)
    takes = jax.random.uniform(lam_key, better.lam.shape) < probability
    is_free = jnp.arange(better.lam.shape[-1]) >= child.critical
    lam = jnp.where(is_free, jnp.where(takes, other.lam, better.lam), -jnp.inf)
    return child._replace(lam=space.completed(jnp.sort(lam), child.critical))


def released_crossover(key: PRNGKeyArray, better: Genes, other: Genes, space: SearchSpace, probability: float) -> Genes:
    """The crossover of LongRoPE's released code.

    It sweeps over the pairs of the better parent, up to 20 times. It visits each pair with `probability`, and a fair
    coin decides whether the pair takes the other parent's factor. It stops after the first visit that leaves lam both
    monotone and changed, which usually changes one pair. If there is no such visit, lam is the better parent's.
    """
    lam_key, key = jax.random.split(key)
    child = _cross_others(key, better, other, probability / 2)
    half = better.lam.shape[-1]
    chances, coins = jax.random.uniform(lam_key, (2, _RELEASED_SWEEPS * half))
    visited, heads = chances < probability, coins < 0.5

    def is_child(lam):
        is_monotone = jnp.where(jnp.arange(1, half) > child.critical, jnp.diff(lam) >= 0, True).all()
        return is_monotone & (lam != better.lam).any()

    def visit(carry):
        step, lam = carry
        pair = step % half
        return step + 1, lam.at[pair].set(jnp.where(visited[step] & heads[step], other.lam[pair], lam[pair]))

    _, lam = jax.lax.while_loop(
        lambda carry: (carry[0] < len(visited)) & ~is_child(carry[1]), visit, (jnp.int32(0), better.lam)
    )
    return child._replace(lam=space.completed(jnp.where(is_child(lam), lam, better.lam), child.critical))


Crossover = Callable[..., Genes]
"""(key, better, other, space, probability) -> child."""

CROSSOVERS: dict[str, Crossover] = {"uniform": uniform_crossover, "released": released_crossover}
"""By name in a config."""


def draw_mutations(
    key: PRNGKeyArray,
    state: SearchState,
    parents: Int[np.ndarray, "k"],
    count: int,
    max_parents: int,
    restart: int,
    space: SearchSpace,
    kind: str,
    probability: float,
    reach: int,
) -> SearchState:
    """Up to `count` mutations of random parents, without scores, different from each other and from all of `state`.

    Args:
        parents: rows of the state.
        max_parents: how many parents there may be; fewer are padded to this number, for one shape.
        kind: of `MUTATIONS`.
    """
    draw = partial(_mutation_batch, space=space, kind=kind, probability=probability, reach=reach)
    return _draw_children(key, state, parents, count, max_parents, restart, "mutation", draw)


def draw_crossovers(
    key: PRNGKeyArray,
    state: SearchState,
    parents: Int[np.ndarray, "k"],
    count: int,
    max_parents: int,
    restart: int,
    space: SearchSpace,
    kind: str,
) -> SearchState:
    """The same for crossovers of random pairs of parents, which come best first; `kind` is one of `CROSSOVERS`."""
    draw = partial(_crossover_batch, space=space, kind=kind)
    count = count if len(parents) > 1 else 0
    return _draw_children(key, state, parents, count, max_parents, restart, "crossover", draw)


def _draw_children(key, state, parents, count, max_parents, restart, operator, draw) -> SearchState:
    # Only the first len(parents) of the padded rows are drawn from.
    padded = _rows(state.genes, np.resize(parents, max(max_parents, len(parents))))
    documents = state.documents.shape[1]
    new = new_candidates(_rows(state.genes, np.zeros(0, int)), operator, documents)
    calls = 0
    for _ in range(_MAX_ROUNDS if count > 0 else 0):
        drawn = []
        for call in range(calls, calls + -(-(count - len(new)) // _BATCH)):
            drawn.append(draw(jax.random.fold_in(key, call), padded, len(parents)))
        calls += len(drawn)
        rows, genes = jax.tree.map(lambda *leaves: np.concatenate(leaves), *jax.device_get(drawn))
        rows = np.where(rows < 0, -1, parents[rows])
        new = concatenate(new, remove_duplicates(new_candidates(genes, operator, documents, rows, restart), state, new))
        new = new.take(np.arange(min(count, len(new))))
        if len(new) == count:
            break
    return new


@partial(jax.jit, static_argnames=("space", "kind", "probability", "reach"))
def _mutation_batch(key, genes, count, *, space, kind, probability, reach):
    """Parents [children, 2] among the first `count` rows of the genes, and the genes of their mutations."""
    parent_key, key = jax.random.split(key)
    parents = jnp.int32(jax.random.uniform(parent_key, (_BATCH,)) * count)
    mutate = jax.vmap(partial(MUTATIONS[kind], space=space, probability=probability, reach=reach))
    children = mutate(jax.random.split(key, _BATCH), _rows(genes, parents))
    return jnp.stack([parents, jnp.full_like(parents, -1)], axis=1), children


@partial(jax.jit, static_argnames=("space", "kind"))
def _crossover_batch(key, genes, count, *, space, kind):
    """As `_mutation_batch`, for pairs of different parents, the better one first."""
    parent_key, key = jax.random.split(key)
    first, second = jax.random.uniform(parent_key, (2, _BATCH))
    first, second = jnp.int32(first * count), jnp.int32(second * (count - 1))
    second += second >= first  # uniform over the others
    better, other = jnp.minimum(first, second), jnp.maximum(first, second)
    cross = jax.vmap(partial(CROSSOVERS[kind], space=space, probability=_CROSSOVER_PROBABILITY))
    children = cross(jax.random.split(key, _BATCH), _rows(genes, better), _rows(genes, other))
    return jnp.stack([better, other], axis=1), children


def _rows(genes: Genes, rows) -> Genes:
    return jax.tree.map(lambda leaf: leaf[rows], genes)


def draw_on_grid(uniform, low, high, step):
    """A multiple of step in [low, high] from a uniform number in [0, 1); low where there is none."""
    tolerance = 0.05  # of a step: bounds are float32 multiples of it themselves, coarse at a large lam
    first, last = jnp.ceil(low / step - tolerance), jnp.floor(high / step + tolerance)
    drawn = (first + jnp.floor(uniform * (last - first + 1))) * step
    return jnp.where(first <= last, jnp.clip(drawn, low, high), low)


def _redraw_visited(
    key: PRNGKeyArray, genes: Genes, visited: Bool[Array, "half"], space: SearchSpace, reach: int
) -> Genes:
    """Redraws those pairs one after the other, from the first to the last, see `redraw`."""
    half = genes.lam.shape[-1]
    pairs = jnp.arange(half)
    draws = jax.random.uniform(key, (half,))

    def visit(pair, lam):
        below = jnp.where(pair - reach < genes.critical, space.low, lam[jnp.maximum(pair - reach, 0)])
        above = jnp.where(pair + reach >= half, space.high, lam[jnp.minimum(pair + reach, half - 1)])
        drawn = draw_on_grid(draws[pair], below, above, space.step)
        moved = jnp.where(pairs < pair, jnp.minimum(lam, drawn), jnp.maximum(lam, drawn)).at[pair].set(drawn)
        return jnp.where(visited[pair] & (pair >= genes.critical), moved, lam)

    return genes._replace(lam=space.completed(jax.lax.fori_loop(0, half, visit, genes.lam), genes.critical))


def _mutate_others(key: PRNGKeyArray, parent: Genes, space: SearchSpace, probability: float | Array) -> Genes:
    """Redraws each gene beside lam with `probability`; lam is completed for the new critical pair."""
    chances, draws = jax.random.uniform(key, (2, 3))
    redrawn = chances < probability
    n_hat = jnp.where(redrawn[0], _choose(draws[0], space.n_hat), parent.n_hat)
    mscale = parent.mscale
    if space.mscale[0] < space.mscale[1]:
        mscale = jnp.where(redrawn[1], draw_on_grid(draws[1], *space.mscale, space.step), mscale)
    critical = parent.critical
    if space.critical != (0,):
        critical = jnp.where(redrawn[2], _choose(draws[2], space.critical), critical)
    return Genes(space.completed(parent.lam, critical), n_hat, mscale, critical)


def _cross_others(key: PRNGKeyArray, better: Genes, other: Genes, probability: float) -> Genes:
    """The better parent, with each gene beside lam taken from the other parent with `probability`."""
    takes = jax.random.uniform(key, (3,)) < probability
    n_hat, mscale, critical = (
        jnp.where(take, theirs, ours) for take, theirs, ours in zip(takes, other[1:], better[1:], strict=True)
    )
    return Genes(better.lam, n_hat, mscale, critical)


def _choose(uniform: Float[Array, ""], options: tuple[int, ...]) -> Int[Array, ""]:
    return jnp.asarray(options, jnp.int32)[jnp.int32(uniform * len(options))]
