"""Mutation and crossover as pure functions of a PRNG key; all keep lam monotone and within the space.

They work on one candidate and are meant for `jax.vmap` over a whole generation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from longrope_jax.search.candidates import Genes
from longrope_jax.search.space import SearchSpace

_RELEASED_SWEEPS = 20


def redraw(key: PRNGKeyArray, parent: Genes, space: SearchSpace, probability: float, reach: int) -> Genes:
    """Visits every pair once, in order, and redraws its factor with `probability`; the other genes likewise.

    This is Algorithm 1's mutation (LongRoPE, arXiv 2402.13753, sec. 3.3), which leaves open what is drawn.

    Args:
        reach: breadth. A factor is drawn uniformly between those of the pairs `reach` places below and above (the
            bounds of the space beyond the ends), and those in between that it passes are taken along, so lam stays
            monotone. With 1 that is the gap between its neighbours, the narrowest reading of the paper, where the
            equal factors of a plateau hold each other in place; a wider reach moves several at once.
    """
    lam_key, chance_key, key = jax.random.split(key, 3)
    child = _with_others_mutated(key, parent, space, probability)
    visited = jax.random.uniform(chance_key, child.lam.shape) < probability
    return _with_redrawn(lam_key, child, visited, space, reach)


def sweep(key: PRNGKeyArray, parent: Genes, space: SearchSpace, probability: float, reach: int) -> Genes:
    """`redraw` of every pair, as in LongRoPE's released code (its `probability` there only says when to begin a sweep,
    until there was one); the other genes, which that code does not have, with `probability`.
    """
    lam_key, key = jax.random.split(key)
    child = _with_others_mutated(key, parent, space, probability)
    return _with_redrawn(lam_key, child, jnp.ones(child.lam.shape, bool), space, reach)


def redraw_few(key: PRNGKeyArray, parent: Genes, space: SearchSpace, probability: float, reach: int) -> Genes:
    """`redraw` with a probability that every child draws for itself, log-uniform between that of one pair and
    `probability`; one free pair is redrawn in any case.

    Most steps are small then, which is what improves a candidate that is good already, and some are as wide as ever:
    mutation rates with a heavy tail (Doerr et al., Fast Genetic Algorithms, 2017).
    """
    rate_key, pair_key, lam_key, chance_key, key = jax.random.split(key, 5)
    half = parent.lam.shape[-1]
    rate = probability * (1 / (half * probability)) ** jax.random.uniform(rate_key)
    child = _with_others_mutated(key, parent, space, rate)
    visited = jax.random.uniform(chance_key, (half,)) < rate
    visited |= jnp.arange(half) == jax.random.randint(pair_key, (), child.critical, half)
    return _with_redrawn(lam_key, child, visited, space, reach)


Mutation = Callable[..., Genes]
"""(key, parent, space, probability, reach) -> child."""

MUTATIONS: dict[str, Mutation] = {"redraw": redraw, "redraw_few": redraw_few, "sweep": sweep}
"""By the name that a config gives."""


def uniform_crossover(key: PRNGKeyArray, better: Genes, other: Genes, space: SearchSpace, probability: float) -> Genes:
    """The better parent with every gene replaced by the other parent's with `probability`.

    Where that breaks the order, lam is sorted: the values stay those of the parents and hardly move, and no child is
    lost (the released code throws such children away, which are most of them).
    """
    lam_key, key = jax.random.split(key)
    child = _with_others_crossed(key, better, other, probability)
    takes = jax.random.uniform(lam_key, better.lam.shape) < probability
    return child._replace(lam=_ordered(jnp.where(takes, other.lam, better.lam), child.critical, space))


def segment_crossover(key: PRNGKeyArray, better: Genes, other: Genes, space: SearchSpace, probability: float) -> Genes:
    """The better parent with the other parent's factors in a stretch of neighbouring pairs, sorted as in
    `uniform_crossover`; the other genes with `probability`.
    """
    lam_key, key = jax.random.split(key)
    child = _with_others_crossed(key, better, other, probability)
    half = better.lam.shape[-1]
    ends = jnp.sort(jax.random.uniform(lam_key, (2,))) * half
    pairs = jnp.arange(half) + 0.5
    takes = (pairs > ends[0]) & (pairs < ends[1])
    return child._replace(lam=_ordered(jnp.where(takes, other.lam, better.lam), child.critical, space))


def released_crossover(key: PRNGKeyArray, better: Genes, other: Genes, space: SearchSpace, probability: float) -> Genes:
    """LongRoPE's released code: sweeps over the better parent's pairs, of which each is visited with `probability` and
    then takes the other parent's factor or not, by a fair coin; the child is what there is after the first visit that
    left it both monotone and changed: in one pair alone, unless the parents are so far apart that nothing fits alone.
    Without any, after 20 sweeps, lam is the better parent's.
    """
    lam_key, key = jax.random.split(key)
    child = _with_others_crossed(key, better, other, probability / 2)
    half = better.lam.shape[-1]
    chances, coins = jax.random.uniform(lam_key, (2, _RELEASED_SWEEPS * half))
    visited, heads = chances < probability, coins < 0.5

    def is_child(lam):
        return _is_monotone(lam, child.critical) & (lam != better.lam).any()

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

CROSSOVERS: dict[str, Crossover] = {
    "uniform": uniform_crossover,
    "segment": segment_crossover,
    "released": released_crossover,
}
"""By the name that a config gives."""


def draw_on_grid(uniform, low, high, step):
    """A multiple of step in [low, high] from a uniform number in [0, 1); low where there is none."""
    tolerance = 0.05  # of a step: bounds are float32 multiples of it themselves, coarse at a large lam
    first, last = jnp.ceil(low / step - tolerance), jnp.floor(high / step + tolerance)
    drawn = (first + jnp.floor(uniform * (last - first + 1))) * step
    return jnp.where(first <= last, jnp.clip(drawn, low, high), low)


def _with_redrawn(
    key: PRNGKeyArray, genes: Genes, visited: Bool[Array, "half"], space: SearchSpace, reach: int
) -> Genes:
    """With those pairs redrawn one after the other, from the first to the last, see `redraw`."""
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


def _ordered(
    lam: Float[Array, "half"], critical: Int[Array | np.ndarray, ""], space: SearchSpace
) -> Float[Array, "half"]:
    """The candidate of the space that has these factors, sorted, in the pairs that are free."""
    is_free = jnp.arange(lam.shape[-1]) >= critical
    return space.completed(jnp.sort(jnp.where(is_free, lam, -jnp.inf)), critical)


def _is_monotone(lam: Float[Array, "half"], critical: Int[Array | np.ndarray, ""]) -> Bool[Array, ""]:
    """Whether the free pairs are in order."""
    return jnp.where(jnp.arange(1, lam.shape[-1]) > critical, jnp.diff(lam) >= 0, True).all()


def _with_others_mutated(key: PRNGKeyArray, parent: Genes, space: SearchSpace, probability: float | Array) -> Genes:
    """With the genes beside lam each redrawn with `probability`, and lam what it is for them."""
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


def _with_others_crossed(key: PRNGKeyArray, better: Genes, other: Genes, probability: float) -> Genes:
    """The better parent with the genes beside lam each taken from the other parent with `probability`."""
    takes = jax.random.uniform(key, (3,)) < probability
    n_hat, mscale, critical = (
        jnp.where(take, theirs, ours) for take, theirs, ours in zip(takes, other[1:], better[1:], strict=True)
    )
    return Genes(better.lam, n_hat, mscale, critical)


def _choose(uniform, options):
    return jnp.asarray(options, jnp.int32)[jnp.int32(uniform * len(options))]
