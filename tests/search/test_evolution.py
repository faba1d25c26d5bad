"""Algorithm 1 on objectives whose optimum is known, and its book-keeping."""

import jax
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.search.evolution import EvolutionSettings, advance, describe, search, start
from longrope_jax.search.space import SearchSpace, paper_seeds, paper_space

SPACE = paper_space(8.0, 128)
SEEDS = paper_seeds(32, 1024, 10000.0, 128, rope.Trained(128, rope.unscaled(32)), SPACE)
SETTINGS = EvolutionSettings(population=16, mutations=6, crossovers=6, parents=8, iterations=6)
TARGET = np.linspace(1, 9.5, 16)


def distance(population):
    """An objective with its optimum at (TARGET, 16 start tokens)."""
    lam = np.asarray(population.lam, np.float64)
    return np.square(lam - TARGET).mean(-1) + 0.01 * np.abs(np.asarray(population.n_hat) - 16)


def run(settings=SETTINGS, score=distance, key=0, **kwargs):
    return search(jax.random.key(key), SEEDS, SPACE, settings, score, **kwargs)


def test_population_zero_is_the_seeds_as_they_are_and_mutations_of_them():
    state = start(jax.random.key(0), SEEDS, SPACE, SETTINGS, distance)
    assert len(state.nll) == SETTINGS.population
    for row, seed in enumerate(SEEDS.values()):
        np.testing.assert_array_equal(state.lam[row], seed.lam)
        assert state.operator[row] == 0 and (state.parents[row] == -1).all()
    assert (state.operator[3:] == 1).all() and set(state.parents[3:, 0]) <= {0, 1, 2}


def test_it_finds_a_known_optimum():
    state = run(EvolutionSettings(iterations=40))
    seeds = state.nll[:3].min()
    assert state.nll.min() < seeds / 20
    assert abs(int(state.best().n_hat) - 16) <= 4
    np.testing.assert_allclose(state.best().lam, TARGET, atol=1.0)


def test_budget_elitism_and_monotone_progress():
    state = run()
    assert len(state.nll) == SETTINGS.evaluations == 16 + 6 * 12
    for iteration in range(1, SETTINGS.iterations + 1):
        children = np.flatnonzero(state.iteration == iteration)
        elite = np.argsort(state.nll[: children[0]], kind="stable")[: SETTINGS.parents]
        parents = state.parents[children]
        assert np.isin(parents[parents >= 0], elite).all()
    np.testing.assert_array_equal(state.top(5), np.argsort(state.nll, kind="stable")[:5])
    assert distance(rope.stack([state.best()]))[0] == state.nll.min()


def test_crossovers_have_two_different_parents_the_better_first():
    state = run()
    crossed = np.flatnonzero(state.operator == 2)
    assert len(crossed) == 6 * 6
    better, other = state.parents[crossed].T
    assert (better != other).all() and (state.nll[better] <= state.nll[other]).all()


def test_no_candidate_is_scored_twice_and_all_are_valid():
    state = run(EvolutionSettings(population=64, iterations=15))
    genes = [(*lam.round(6).tolist(), int(n)) for lam, n in zip(state.lam, state.n_hat, strict=True)]
    assert len(set(genes)) == len(genes)
    assert (np.diff(state.lam, axis=1) >= 0).all()
    assert state.lam.min() >= SPACE.low and state.lam.max() <= np.float32(SPACE.high)
    assert np.isin(state.n_hat, SPACE.n_hat).all()


def test_a_tiny_space_is_exhausted_without_repeating_or_hanging():
    space = SearchSpace(1.0, 1.02, 0.01, (0,))
    seeds = {"ones": rope.unscaled(4)}
    state = search(jax.random.key(0), seeds, space, SETTINGS, lambda p: np.asarray(p.lam, np.float64).sum(-1))
    assert len(state.nll) == 6  # (1, 1), (1, 1.01), (1, 1.02), (1.01, 1.01), (1.01, 1.02), (1.02, 1.02)


def test_identical_runs_are_identical_and_keys_matter():
    first, again, other = run(), run(), run(key=1)
    for leaf, same in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(leaf, same)
    assert (first.lam[3:] != other.lam[3:]).any()


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_a_stopped_search_goes_on_bit_for_bit_with_the_remaining_budget(stop_after):
    saved = []
    whole = run(save=saved.append)
    assert len(saved) == SETTINGS.iterations + 1
    scored = []

    def counted(population):
        scored.append(len(population.lam))
        return distance(population)

    resumed = run(score=counted, state=saved[stop_after])
    assert sum(scored) == SETTINGS.evaluations - len(saved[stop_after].nll)
    for leaf, same in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(leaf, same)


def test_every_candidate_is_described_with_its_origin():
    state = run()
    entries = describe(state, list(SEEDS))
    assert [entry["candidate"] for entry in entries] == list(range(SETTINGS.evaluations))
    assert [entry["seed"] for entry in entries[:3]] == ["linear", "ntk", "yarn"]
    assert {entry["operator"]: len(entry["parents"]) for entry in entries} == {"seed": 0, "mutation": 1, "crossover": 2}
    assert describe(state, list(SEEDS), 20) == entries[20:]


@pytest.mark.parametrize(
    "bad", [dict(population=0), dict(iterations=-1), dict(mutation_probability=0.0), dict(reach=0), dict(parents=0)]
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EvolutionSettings(**bad)


def test_advance_only_appends():
    state = start(jax.random.key(0), SEEDS, SPACE, SETTINGS, distance)
    later = advance(jax.random.key(0), state, SPACE, SETTINGS, distance)
    np.testing.assert_array_equal(later.lam[: len(state.nll)], state.lam)
    assert (later.iteration[len(state.nll) :] == 1).all()
