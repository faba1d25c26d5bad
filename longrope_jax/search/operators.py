"""Mutation and crossover as pure functions of a PRNG key; both keep lam monotone and within the space.

They work on one candidate and are meant to be `vmap`ped over a whole generation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from longrope_jax.search.space import SearchSpace

Genes = tuple[Float[Array, "half"], Int[Array, ""]]
"""lam and n_hat of one candidate."""


def mutate(key: PRNGKeyArray, parent: Genes, space: SearchSpace, probability: float, reach: int) -> Genes:
    """Visits every pair once, in order, and redraws its factor with `probability`; n_hat likewise from its grid.

    Args:
        reach: breadth. A factor is drawn uniformly between those of the pairs `reach` places below and above (the
            bounds of the space beyond the ends), and those in between that it passes are taken along, so lam stays
            monotone. With 1 that is the gap between its neighbours, the narrowest reading of the paper, where the
            equal factors of a plateau hold each other in place; a wider reach moves several at once.
    """
    lam, n_hat = parent
    half = lam.shape[-1]
    pairs = jnp.arange(half)
    # One row decides which genes are visited, the other what they become; lam's come first, n_hat's is the last.
    chances, draws = jax.random.uniform(key, (2, half + 1))
    visited = chances < probability

    def visit(pair, lam):
        below = jnp.where(pair < reach, space.low, lam[jnp.maximum(pair - reach, 0)])
        above = jnp.where(pair + reach >= half, space.high, lam[jnp.minimum(pair + reach, half - 1)])
        drawn = _draw_on_grid(draws[pair], below, above, space.step)
        moved = jnp.where(pairs < pair, jnp.minimum(lam, drawn), jnp.maximum(lam, drawn)).at[pair].set(drawn)
        return jnp.where(visited[pair], moved, lam)

    lam = jax.lax.fori_loop(0, half, visit, lam)
    grid = jnp.asarray(space.n_hat, jnp.int32)
    return lam, jnp.where(visited[half], grid[jnp.int32(draws[half] * len(grid))], n_hat)


def crossover(key: PRNGKeyArray, better: Genes, other: Genes, probability: float) -> Genes:
    """The better parent with every gene replaced by the other parent's with `probability`.

    Where that breaks the order, lam is sorted: the values stay those of the parents and hardly move, and no child is
    lost (the released code throws such children away, which are most of them).
    """
    take = jax.random.uniform(key, (better[0].shape[-1] + 1,)) < probability
    lam = jnp.sort(jnp.where(take[:-1], other[0], better[0]))
    return lam, jnp.where(take[-1], other[1], better[1])


def _draw_on_grid(uniform, low, high, step):
    """A multiple of step in [low, high] from a uniform number in [0, 1); low where there is none."""
    tolerance = 0.05  # of a step: bounds are float32 multiples of it themselves, coarse at a large lam
    first, last = jnp.ceil(low / step - tolerance), jnp.floor(high / step + tolerance)
    drawn = (first + jnp.floor(uniform * (last - first + 1))) * step
    return jnp.where(first <= last, jnp.clip(drawn, low, high), low)
