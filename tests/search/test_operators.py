"""Mutation and crossover: what they may and must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.search.candidates import Genes
from longrope_jax.search.operators import CROSSOVERS, MUTATIONS, redraw
from longrope_jax.search.space import SearchSpace, critical_space, paper_space

SPACE = paper_space(8.0, 128)
WITH_MSCALE = paper_space(8.0, 128, mscale=(0.9, 1.3))
CRITICAL = critical_space(8.0, 128, 32, 10000.0, mscale=(1.0, 1.2))


def genes(lam, n_hat=0, mscale=1.0, critical=0):
    return Genes(jnp.asarray(lam, jnp.float32), jnp.int32(n_hat), jnp.float32(mscale), jnp.int32(critical))


PLATEAU = genes([1.0, 1.5, 8.0, 8.0, 8.0, 8.0, 8.0, 9.0])
SEEDS = {
    "linear": genes(rope.linear(32, 8.0).lam),
    "ntk": genes(rope.ntk(32, 8.0).lam, 4),
    "yarn": genes(rope.yarn(32, 8.0, original_length=128, temperature=False).lam, 16),
}


def mutants(parent, kind="redraw", reach=1, probability=0.3, count=300, space=SPACE) -> Genes:
    keys = jax.random.split(jax.random.key(0), count)
    return jax.device_get(jax.vmap(lambda key: MUTATIONS[kind](key, parent, space, probability, reach))(keys))


def crossovers(better, other, kind, probability=0.3, count=300, space=SPACE) -> Genes:
    keys = jax.random.split(jax.random.key(0), count)
    return jax.device_get(jax.vmap(lambda key: CROSSOVERS[kind](key, better, other, space, probability))(keys))


def assert_within(children, space):
    assert (np.diff(children.lam, axis=-1) >= 0).all()
    assert children.lam.min() >= np.float32(space.low) and children.lam.max() <= np.float32(space.high)
    assert np.isin(children.n_hat, space.n_hat).all()


def assert_critical(children, space):
    """NTK below the critical pair, monotone in [s, 2 s] from it on (LongRoPE2 sec. 3.2)."""
    assert set(children.critical.tolist()) <= set(space.critical)
    for lam, critical in zip(children.lam.astype(float), children.critical, strict=True):
        np.testing.assert_allclose(lam[:critical], lam[critical] ** (np.arange(critical) / critical), rtol=1e-5)
        assert (np.diff(lam[critical:]) >= 0).all()
        assert lam[critical:].min() >= 8 and lam.max() <= 16


def on_grid(values, step):
    steps = np.asarray(values, np.float64) / step
    return np.abs(steps - np.round(steps)) < 1e-3


def critical_parents():
    """A flat one and a steep one that begin at different pairs."""
    first, last = CRITICAL.critical[0], CRITICAL.critical[-1]
    assert first < last
    return [
        genes(CRITICAL.completed(jnp.asarray(lam, jnp.float32), jnp.int32(critical)), n_hat, 1.1, critical)
        for lam, n_hat, critical in ((np.full(16, 8.0), 0, last), (np.linspace(9, 16, 16), 8, first))
    ]


@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("reach", [1, 2, 16])
def test_mutants_of_every_seed_stay_monotone_and_within_the_space(kind, reach):
    for seed in SEEDS.values():
        assert_within(mutants(seed, kind, reach), SPACE)


@pytest.mark.parametrize("kind", MUTATIONS)
def test_what_a_mutation_changes_is_a_multiple_of_the_step(kind):
    seed = SEEDS["ntk"]
    lam = mutants(seed, kind, 3).lam
    assert (on_grid(lam, SPACE.step) | np.isin(lam, seed.lam)).all()
    assert on_grid(mutants(PLATEAU, kind, 3).lam, SPACE.step).all()


@pytest.mark.parametrize("kind", MUTATIONS)
def test_most_mutants_are_new_and_together_they_reach_every_gene(kind):
    children = mutants(SEEDS["yarn"], kind, 2, count=2000, space=WITH_MSCALE)
    assert (children.lam != SEEDS["yarn"].lam).any(axis=0).all()
    assert (children.lam != SEEDS["yarn"].lam).any(axis=1).mean() > 0.7
    assert set(children.n_hat.tolist()) == set(SPACE.n_hat)


@pytest.mark.parametrize("kind", MUTATIONS)
def test_the_temperature_stays_on_its_grid_within_its_bounds(kind):
    children = mutants(SEEDS["yarn"], kind, count=2000, space=WITH_MSCALE)
    mscale = children.mscale
    assert on_grid(mscale, WITH_MSCALE.step).all()
    assert mscale.min() == np.float32(0.9) and mscale.max() == np.float32(1.3)
    prior = (0.3 - 1 / 16) / np.log(0.3 * 16) if kind == "redraw_few" else 0.3
    assert abs((mscale != 1).mean() - prior * 40 / 41) < 0.05
    assert (mutants(SEEDS["yarn"], kind).mscale == 1).all()  # one that is fixed


def test_few_pairs_are_redrawn_more_often_than_many():
    lam = mutants(genes(np.linspace(1.5, 8, 32)), "redraw_few", count=2000).lam
    changed = (lam != np.linspace(1.5, 8, 32, dtype=np.float32)).sum(1)
    assert changed.min() >= 1 and (changed <= 4).mean() > 0.4 and (changed > 8).mean() > 0.05
    many = mutants(genes(np.linspace(1.5, 8, 32)), "redraw", count=2000).lam
    assert ((many != np.linspace(1.5, 8, 32, dtype=np.float32)).sum(1) <= 4).mean() < 0.1


@pytest.mark.parametrize("kind", MUTATIONS)
def test_mutants_obey_a_critical_dimension(kind):
    for parent in critical_parents():
        children = mutants(parent, kind, 2, space=CRITICAL)
        assert_critical(children, CRITICAL)
        assert set(children.critical.tolist()) == set(CRITICAL.critical)
        assert len(np.unique(children.lam, axis=0)) > 100


@pytest.mark.parametrize("kind", MUTATIONS)
def test_mutation_is_a_function_of_its_key(kind):
    first, again = (MUTATIONS[kind](jax.random.key(7), PLATEAU, SPACE, 0.9, 2) for _ in range(2))
    other = MUTATIONS[kind](jax.random.key(8), PLATEAU, SPACE, 0.9, 2)
    assert (first.lam == again.lam).all() and first.n_hat == again.n_hat
    assert (first.lam != other.lam).any()


def test_a_redraw_with_probability_one_visits_and_with_zero_leaves_alone():
    children = mutants(PLATEAU, reach=2, probability=0.0)
    assert (children.lam == PLATEAU.lam).all() and (children.n_hat == 0).all()
    children = mutants(PLATEAU, reach=8, probability=1.0)
    assert (children.lam != PLATEAU.lam).any(axis=0).all()
    assert set(children.n_hat.tolist()) == set(SPACE.n_hat)


def test_a_narrow_redraw_cannot_move_the_inside_of_a_plateau_and_a_wide_one_can():
    inside = slice(3, 6)
    narrow = mutants(PLATEAU, reach=1, probability=0.1).lam
    moved_alone = narrow[(narrow[:, [2, 6]] == 8).all(axis=1)]
    assert (moved_alone[:, inside] == 8).all()
    wide = mutants(PLATEAU, reach=4, probability=0.1).lam
    assert (wide[:, inside] > 8).any() and (wide[:, inside] < 8).any()


def test_a_narrow_redraw_draws_between_the_neighbours_uniformly():
    parent = genes([1.0, 4.0, 5.0, 10.0])
    space = SearchSpace(1.0, 10.0, 0.01, (0,))

    def second_alone(key):
        lam = redraw(key, parent, space, 0.5, 1).lam
        return jnp.where((lam[0] == 1) & (lam[2] == 5) & (lam[1] != 4), lam[1], jnp.nan)

    drawn = np.asarray(jax.vmap(second_alone)(jax.random.split(jax.random.key(1), 20000)))
    drawn = drawn[np.isfinite(drawn)]
    assert len(drawn) > 500 and drawn.min() < 1.05 and drawn.max() > 4.95
    assert abs(drawn.mean() - 3.0) < 5 * drawn.std() / np.sqrt(len(drawn))


@pytest.mark.parametrize("kind", CROSSOVERS)
def test_children_of_two_parents_stay_within_the_space(kind):
    for better in SEEDS.values():
        for other in SEEDS.values():
            assert_within(crossovers(better, other, kind), SPACE)


@pytest.mark.parametrize("kind", CROSSOVERS)
def test_the_other_genes_come_from_one_parent_each(kind):
    better, other = genes(np.linspace(1, 9, 16), 4, 1.0), genes(np.linspace(2, 10, 16), 16, 1.2)
    children = crossovers(better, other, kind, space=WITH_MSCALE)
    for child, ours, theirs in ((children.n_hat, 4, 16), (children.mscale, np.float32(1), np.float32(1.2))):
        assert np.isin(child, [ours, theirs]).all()
        assert 0 < (child == theirs).mean() < 0.45


@pytest.mark.parametrize("kind", CROSSOVERS)
def test_children_of_two_parents_obey_a_critical_dimension(kind):
    flat, steep = critical_parents()
    for pair in ((flat, steep), (steep, flat)):
        children = crossovers(*pair, kind, space=CRITICAL)
        assert_critical(children, CRITICAL)
        assert set(children.critical.tolist()) == {CRITICAL.critical[0], CRITICAL.critical[-1]}


def test_most_uniform_crossovers_mix_several_pairs_and_hardly_any_is_a_copy():
    better, other = SEEDS["ntk"], SEEDS["yarn"]
    lam = crossovers(better, other, "uniform").lam
    copies = (lam == better.lam).all(axis=1) | (lam == other.lam).all(axis=1)
    assert copies.mean() < 0.15
    assert np.median((lam != better.lam).sum(axis=1)) >= 3


@pytest.mark.parametrize("kind", CROSSOVERS)
def test_children_have_values_of_their_parents(kind):
    better, other = SEEDS["ntk"], SEEDS["yarn"]
    assert np.isin(crossovers(better, other, kind).lam, np.concatenate([better.lam, other.lam])).all()


def test_a_released_crossover_ends_with_the_first_change_that_keeps_the_order():
    better, other = genes(np.linspace(1, 8, 16)), genes(np.linspace(1.2, 8.2, 16))
    changed = (crossovers(better, other, "released").lam != better.lam).sum(axis=1)
    assert (changed == 1).all()  # where any mixture is in order
    steps = genes([*np.full(8, 2.0), *np.full(8, 4.0)]), genes([*np.full(8, 3.0), *np.full(8, 5.0)])
    lam = crossovers(*steps, "released").lam
    # What raises a step is complete only with all pairs up to its end; a child that never gets there is given up.
    raised = (lam != steps[0].lam).reshape(-1, 2, 8)
    assert raised.any(axis=(1, 2)).mean() > 0.5 and (np.diff(raised.astype(int), axis=-1) >= 0).all()


def test_a_released_crossover_of_likes_is_the_better_parent():
    lam = crossovers(SEEDS["ntk"], SEEDS["ntk"], "released").lam
    assert (lam == SEEDS["ntk"].lam).all()


def test_space_is_table_4_capped_by_the_original_length():
    space = paper_space(8.0, 24)
    assert (space.low, space.high, space.step) == (1.0, 10.0, 0.01)
    assert space.n_hat == (0, 2, 4, 8, 12, 16, 20, 24)
    assert paper_space(4.0, 4096).n_hat[-1] == 256
    recovery = paper_space(1.0, 128, upper_bound=4.0)  # short contexts: no extension, but a maximum of its own
    assert (recovery.low, recovery.high, recovery.n_hat[-1]) == (1.0, 4.0, 128)


def test_a_critical_space_begins_between_ten_periods_and_one():
    turns = 128 / (2 * np.pi * 10000.0 ** (np.arange(16) / 16))  # of every pair in the original length
    first, last = CRITICAL.critical[0], CRITICAL.critical[-1]
    assert turns[first] <= 10 < turns[first - 1] and turns[last] <= 1 < turns[last - 1]
    assert (CRITICAL.low, CRITICAL.high) == (8.0, 16.0)


@pytest.mark.parametrize(
    "bad",
    [
        dict(scale=0.99),
        dict(scale=1.0, upper_bound=1.0),
        dict(scale=0.5),
        dict(upper_bound=0.1),
        dict(step=0.0),
        dict(step=100.0),
        dict(mscale=(1.2, 1.0)),
        dict(n_hat=(2, 4)),
    ],
)
def test_a_space_without_room_is_refused(bad):
    with pytest.raises(ValueError, match="="):
        paper_space(**{"scale": 8.0, "original_length": 128, **bad})
