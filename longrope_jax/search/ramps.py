"""Random ramps: candidates all over the space to choose starts from, where mutations of a few seeds stay near them.

The score has many local minima, and the published methods are a few points. A ramp leaves the first pairs alone,
climbs, and keeps its height, as YaRN and the piecewise operators of the released search do, with ends, height and
bend at random; of a hundred some are far better than every published one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from longrope_jax.search.candidates import Genes, Score, SearchState, joined, scored, unscored, without_known
from longrope_jax.search.space import SearchSpace

_AT_ONCE = 32  # ramps scored before the best that later ones have to come under are chosen again
_PROMISING = 8  # how many those are
# Ranges that ramps are drawn from: in shares of all pairs, of log high, and the exponent of the climb.
_BEGIN, _WIDTH, _HEIGHT, _BEND = (-0.1, 0.6), (0.03, 0.7), (0.75, 1.0), (0.5, 2.0)


def scan(
    key: PRNGKeyArray,
    state: SearchState,
    iteration: int,
    space: SearchSpace,
    count: int,
    score: Score,
    restart: int = 0,
) -> SearchState:
    """Scores `count` random ramps for a start of the search, with the other genes of its best candidate so far; the
    first ones in full, where a race is on the others only until they can't come under the best.
    """
    key = jax.random.fold_in(key, iteration)
    lam = np.asarray(draw_ramps(key, count, state.lam.shape[1], space))
    own = state.take(state.own(restart))
    fixed = jax.tree.map(lambda leaf: np.repeat(leaf[own.top(1)], count, axis=0), own.genes)
    critical = np.asarray(space.critical, np.int32)[np.arange(count) % len(space.critical)]
    genes = Genes(np.asarray(space.completed(lam, critical)), fixed.n_hat, fixed.mscale, critical)
    documents = state.documents.shape[1]
    new = without_known(unscored(genes, "ramp", documents, restart=restart), state)
    for first in range(0, len(new), _AT_ONCE):
        some = new.take(np.arange(first, min(first + _AT_ONCE, len(new))))
        bar = np.sort(state.nll[state.own(restart)])[:_PROMISING][-1]
        standing = state.standing(bar) if first else None
        state = joined(state, scored(some, score, standing, iteration))
    return state


def draw_ramps(key: PRNGKeyArray, count: int, half: int, space: SearchSpace) -> Float[Array, "count half"]:
    """log lam = log height * climb(pair), multiples of the step of the space within its bounds, of which a height is in
    the upper quarter, in logarithms.
    """
    begin, width, height, bend = jax.random.uniform(key, (4, count, 1))
    begin, width, height = (
        low + (high - low) * drawn for (low, high), drawn in ((_BEGIN, begin), (_WIDTH, width), (_HEIGHT, height))
    )
    bend = _BEND[0] * (_BEND[1] / _BEND[0]) ** bend
    climb = jnp.clip((jnp.arange(half) / half - begin) / width, 0, 1) ** bend
    low, high = np.log(space.low), np.log(space.high)
    lam = jnp.exp(low + (high - low) * height * climb)
    return jnp.clip(jnp.round(lam / space.step) * space.step, space.low, space.high)
