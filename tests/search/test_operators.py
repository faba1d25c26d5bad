"""Mutation and crossover: what they may and must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.search.operators import crossover, mutate
from longrope_jax.search.space import SearchSpace, paper_seeds, paper_space

SPACE = paper_space(8.0, 128)
PLATEAU = (jnp.asarray([1.0, 1.5, 8.0, 8.0, 8.0, 8.0, 8.0, 9.0]), jnp.int32(0))


def mutants(parent, reach, probability=0.3, count=300, space=SPACE):
    keys = jax.random.split(jax.random.key(0), count)
    return jax.vmap(lambda key: mutate(key, parent, space, probability, reach))(keys)


def assert_within(lam, space):
    assert (np.diff(lam, axis=-1) >= 0).all()
    assert lam.min() >= np.float32(space.low) and lam.max() <= np.float32(space.high)


@pytest.mark.parametrize("reach", [1, 2, 16])
def test_mutants_of_every_seed_stay_monotone_and_within_the_space(reach):
    for seed in paper_seeds(32, 1024, 10000.0, 128, rope.Trained(128, rope.unscaled(32)), SPACE).values():
        lam, n_hat = mutants((seed.lam, seed.n_hat), reach)
        assert_within(np.asarray(lam), SPACE)
        assert set(np.asarray(n_hat).tolist()) <= set(SPACE.n_hat)


@pytest.mark.parametrize("reach", [1, 3])
def test_what_is_drawn_is_a_multiple_of_the_step(reach):
    lam, _ = mutants(PLATEAU, reach)
    steps = np.asarray(lam, np.float64) / SPACE.step
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


def test_probability_one_visits_and_zero_leaves_alone():
    lam, n_hat = mutants(PLATEAU, 2, probability=0.0)
    assert (lam == PLATEAU[0]).all() and (n_hat == 0).all()
    lam, n_hat = mutants(PLATEAU, 8, probability=1.0)
    assert (lam != PLATEAU[0]).any(axis=0).all()
    assert set(np.asarray(n_hat).tolist()) == set(SPACE.n_hat)


def test_a_narrow_mutation_cannot_move_the_inside_of_a_plateau_and_a_wide_one_can():
    inside = slice(3, 6)
    narrow, _ = mutants(PLATEAU, 1, probability=0.1)
    moved_alone = np.asarray(narrow)[(np.asarray(narrow)[:, [2, 6]] == 8).all(axis=1)]
    assert (moved_alone[:, inside] == 8).all()
    wide, _ = mutants(PLATEAU, 4, probability=0.1)
    assert (np.asarray(wide)[:, inside] > 8).any() and (np.asarray(wide)[:, inside] < 8).any()


def test_a_narrow_mutation_draws_between_the_neighbours_uniformly():
    parent = (jnp.asarray([1.0, 4.0, 5.0, 10.0]), jnp.int32(0))
    space = SearchSpace(1.0, 10.0, 0.01, (0,))

    def second_alone(key):
        lam, _ = mutate(key, parent, space, 0.5, 1)
        return jnp.where((lam[0] == 1) & (lam[2] == 5) & (lam[1] != 4), lam[1], jnp.nan)

    drawn = np.asarray(jax.vmap(second_alone)(jax.random.split(jax.random.key(1), 20000)))
    drawn = drawn[np.isfinite(drawn)]
    assert len(drawn) > 500 and drawn.min() < 1.05 and drawn.max() > 4.95
    assert abs(drawn.mean() - 3.0) < 5 * drawn.std() / np.sqrt(len(drawn))


def test_mutation_is_a_function_of_its_key():
    first, again = (mutate(jax.random.key(7), PLATEAU, SPACE, 0.3, 2) for _ in range(2))
    other = mutate(jax.random.key(8), PLATEAU, SPACE, 0.3, 2)
    assert (first[0] == again[0]).all() and first[1] == again[1]
    assert (first[0] != other[0]).any()


def test_crossover_keeps_order_and_values_of_the_parents():
    better = (rope.ntk(32, 8.0).lam, jnp.int32(4))
    other = (rope.yarn(32, 8.0, original_length=128).lam, jnp.int32(16))
    keys = jax.random.split(jax.random.key(0), 200)
    lam, n_hat = jax.vmap(lambda key: crossover(key, better, other, 0.3))(keys)
    assert (np.diff(np.asarray(lam), axis=-1) >= 0).all()
    assert np.isin(np.asarray(lam), np.concatenate([better[0], other[0]])).all()
    assert set(np.asarray(n_hat).tolist()) == {4, 16}
    # Most children mix several pairs of both; hardly any is a copy of a parent.
    copies = (np.asarray(lam) == better[0]).all(axis=1) | (np.asarray(lam) == other[0]).all(axis=1)
    assert copies.mean() < 0.1


def test_space_is_table_4_capped_by_the_original_length():
    space = paper_space(8.0, 24)
    assert (space.low, space.high, space.step) == (1.0, 10.0, 0.01)
    assert space.n_hat == (0, 2, 4, 8, 12, 16, 20, 24)
    assert paper_space(4.0, 4096).n_hat[-1] == 256
    recovery = paper_space(1.0, 128, upper_bound=4.0)  # short contexts: no extension, but a maximum of its own
    assert (recovery.low, recovery.high, recovery.n_hat[-1]) == (1.0, 4.0, 128)


@pytest.mark.parametrize(
    "bad",
    [
        dict(scale=0.99),
        dict(scale=1.0, upper_bound=1.0),
        dict(scale=0.5),
        dict(upper_bound=0.1),
        dict(lower_bound=0.5),
        dict(lower_bound=11.0),
        dict(step=0.0),
        dict(step=100.0),
    ],
)
def test_a_space_without_room_is_refused(bad):
    with pytest.raises(ValueError, match="="):
        paper_space(**{"scale": 8.0, "original_length": 128, **bad})
