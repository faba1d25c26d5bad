"""Mutation and crossover on any parents: children stay in the space, are new only where they may be, and are a function
of their key.
"""

from functools import cache

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from properties.draws import HALF, seeds

from longrope_jax.search.candidates import Genes
from longrope_jax.search.operators import CROSSOVERS, MUTATIONS
from longrope_jax.search.space import critical_space, paper_space

CHILDREN = 16
SPACES = {
    "paper": paper_space(8.0, 128, mscale=(0.9, 1.3)),
    "paper, coarse": paper_space(3.0, 40, step=0.25, n_hat=(0, 2, 32, 64)),
    "critical": critical_space(8.0, 128, 2 * HALF, 10000.0, mscale=(1.0, 1.2)),
}


@st.composite
def parents(draw, space, is_on_grid=False):
    """A candidate of a space, with plateaus, bounds and neighbouring values among its factors."""
    if is_on_grid:
        first, last = np.ceil(space.low / space.step), np.floor(space.high / space.step)
        numbers = [draw(st.integers(int(first), int(last))) * space.step for _ in range(HALF)]
    else:
        low, high = (float(np.float32(bound)) for bound in (space.low, space.high))
        number = st.sampled_from([low, high, (low + high) / 2]) | st.floats(low, high)
        numbers = [draw(number) for _ in range(HALF)]
    critical = draw(st.sampled_from(space.critical))
    lam = space.completed(jnp.sort(jnp.asarray(numbers, jnp.float32)), jnp.int32(critical))
    steps = [round(bound / space.step) for bound in space.mscale]
    mscale = draw(st.integers(*steps)) * space.step if space.mscale[0] < space.mscale[1] else space.mscale[0]
    return Genes(np.asarray(lam), np.int32(draw(st.sampled_from(space.n_hat))), np.float32(mscale), np.int32(critical))


@cache
def mutation(kind, space, reach):
    """Of many keys at once, compiled once."""
    one = lambda key, parent, chance: MUTATIONS[kind](key, parent, SPACES[space], chance, reach)  # noqa: E731
    return jax.jit(jax.vmap(one, in_axes=(0, None, None)))


@cache
def crossover(kind, space):
    one = lambda key, better, other, chance: CROSSOVERS[kind](key, better, other, SPACES[space], chance)  # noqa: E731
    return jax.jit(jax.vmap(one, in_axes=(0, None, None, None)))


def keys(seed):
    return jax.random.split(jax.random.key(seed), CHILDREN)


def is_on_grid(values, step):
    steps = np.asarray(values, np.float64) / step
    return np.abs(steps - np.round(steps)) < 1e-3


def assert_in_space(children, space):
    lam, critical = np.asarray(children.lam, np.float64), np.asarray(children.critical)
    free = np.arange(HALF) >= critical[:, None]
    assert np.isin(critical, space.critical).all() and np.isin(children.n_hat, space.n_hat).all()
    assert (lam[free] >= np.float32(space.low)).all() and (lam <= np.float32(space.high)).all()
    assert (np.diff(lam, axis=1)[free[:, :-1]] >= 0).all()
    low, high = (np.float32(bound) for bound in space.mscale)
    assert ((children.mscale >= low) & (children.mscale <= high)).all()
    followed = space.followed(jnp.asarray(children.lam), jnp.asarray(critical))
    np.testing.assert_allclose(followed, children.lam, rtol=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", MUTATIONS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_mutant_is_a_candidate_whatever_its_parent(kind, space, data):
    parent, seed = data.draw(parents(SPACES[space])), data.draw(seeds)
    mutate = mutation(kind, space, data.draw(st.sampled_from([1, 3, HALF])))
    chance = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    children = jax.device_get(mutate(keys(seed), parent, chance))
    assert_in_space(children, SPACES[space])
    # What was drawn is on the grid; all else is a parent's, or follows from the critical pair.
    free = np.arange(HALF) >= children.critical[:, None]
    old = np.isin(children.lam, parent.lam) | np.isin(children.lam, np.float32([SPACES[space].low, SPACES[space].high]))
    assert (old | is_on_grid(children.lam, SPACES[space].step))[free].all()
    assert (is_on_grid(children.mscale, SPACES[space].step) | (children.mscale == parent.mscale)).all()
    again = jax.device_get(mutate(keys(seed), parent, chance))
    assert all(map(np.array_equal, children, again))
    if chance == 0 and kind == "redraw":
        assert (children.lam == parent.lam).all() and (children.n_hat == parent.n_hat).all()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", MUTATIONS)
@settings(max_examples=10)
@given(data=st.data())
def test_mutants_of_a_parent_on_the_grid_are_on_it(kind, space, data):
    parent = data.draw(parents(SPACES[space], is_on_grid=True))
    children = jax.device_get(mutation(kind, space, 3)(keys(data.draw(seeds)), parent, 0.5))
    free = np.arange(HALF) >= children.critical[:, None]
    bounds = np.isin(children.lam, np.float32([SPACES[space].low, SPACES[space].high]))
    followed = np.isin(children.lam, parent.lam)  # of a pair that was below the critical one and is free now
    assert (is_on_grid(children.lam, SPACES[space].step) | bounds | followed)[free].all()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", CROSSOVERS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_child_is_a_candidate_of_its_parents_values(kind, space, data):
    better, other = data.draw(parents(SPACES[space])), data.draw(parents(SPACES[space]))
    seed, cross = data.draw(seeds), crossover(kind, space)
    chance = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    children = jax.device_get(cross(keys(seed), better, other, chance))
    assert_in_space(children, SPACES[space])
    free = np.arange(HALF) >= children.critical[:, None]
    both = np.concatenate([better.lam, other.lam, np.float32([SPACES[space].low])])
    assert np.isin(children.lam, both)[free].all()
    for name in ("n_hat", "mscale", "critical"):
        assert np.isin(getattr(children, name), [getattr(better, name), getattr(other, name)]).all()
    again = jax.device_get(cross(keys(seed), better, other, chance))
    assert all(map(np.array_equal, children, again))
    likes = jax.device_get(cross(keys(seed), better, better, chance))
    assert all((leaf == own).all() for leaf, own in zip(likes, better, strict=True))
