"""YaRN tuned on the search documents, the baseline: its grid, and what the search makes of it."""

import dataclasses

import numpy as np
import pytest
import tiny_model

from longrope_jax.data.corpus import Document
from longrope_jax.rope import Trained, extend, linear, unscaled, yarn
from longrope_jax.search import seeds
from longrope_jax.search.candidates import OPERATORS
from longrope_jax.search.find import find_factors
from longrope_jax.search.seeds import YARN_BETA_FAST, YARN_BETA_SLOW, YARN_GRID_SIZE, YARN_SCALES, yarn_grid
from longrope_jax.search.settings import SearchSettings

L, TARGET, HEAD_DIM, BASE = 128, 1024, 32, 10000.0
PRETRAINED = Trained(L, unscaled(HEAD_DIM))


def test_the_published_yarn_is_in_the_grid():
    grid = yarn_grid(PRETRAINED, TARGET, HEAD_DIM, BASE)
    assert 32 in YARN_BETA_FAST and 1 in YARN_BETA_SLOW and 1 in YARN_SCALES
    published = extend("yarn_without_temperature", PRETRAINED, TARGET, HEAD_DIM, BASE).lam
    assert any(np.array_equal(factors.lam, published) for factors in grid.values())


def test_every_yarn_is_there_once_and_by_its_parameters():
    grid = yarn_grid(PRETRAINED, TARGET, HEAD_DIM, BASE)
    assert 100 < len(grid) < YARN_GRID_SIZE
    assert len({factors.lam.tobytes() for factors in grid.values()}) == len(grid)
    for (fast, slow, scale, temperature), factors in grid.items():
        np.testing.assert_array_equal(factors.lam, yarn(HEAD_DIM, scale, BASE, L, beta_fast=fast, beta_slow=slow).lam)
        assert not temperature and factors.mscale == 1
    both = yarn_grid(PRETRAINED, TARGET, HEAD_DIM, BASE, temperatures=True)
    assert {float(factors.mscale) > 1 for factors in both.values()} == {False, True} and len(both) == 2 * len(grid)


def test_a_second_extension_extends_what_the_model_was_tuned_with():
    tuned = Trained(8 * L, linear(HEAD_DIM, 8.0))
    grid = yarn_grid(tuned, 64 * L, HEAD_DIM, BASE)
    published = extend("yarn_without_temperature", tuned, 64 * L, HEAD_DIM, BASE).lam
    assert any(np.array_equal(factors.lam, published) for factors in grid.values())
    assert all((np.asarray(factors.lam) >= 8 * (1 - 1e-6)).all() for factors in grid.values())


def test_a_target_that_is_hardly_longer_has_a_grid_too():
    assert all(scale >= 1 for _, _, scale, _ in yarn_grid(PRETRAINED, L, HEAD_DIM, BASE))


@pytest.mark.parametrize("racing", [0.0, 0.9])
def test_the_search_finds_the_best_yarn_of_the_grid(racing, monkeypatch):
    monkeypatch.setattr(seeds, "_BATCH", 4)  # with four pairs there are few different ramps
    model, params = tiny_model.make()
    rng, target = np.random.default_rng(0), 4 * tiny_model.L
    documents = [Document(f"{k}", rng.integers(0, tiny_model.VOCABULARY, 200), 200) for k in range(5)]
    settings = SearchSettings(target_length=target, method="yarn_grid", racing=racing)
    state = find_factors(model, params, documents, settings)
    assert len(state) <= settings.candidates(start_tokens=3) and (state.n_hat == 0).all()
    grid = yarn_grid(Trained(tiny_model.L, unscaled(8)), target, 8, 10000.0)
    lam = np.unique([np.asarray(factors.lam) for factors in grid.values()], axis=0)
    first = state.lam[state.operator == OPERATORS.index("seed")]
    expected = np.unique(np.concatenate([lam, first]), axis=0)
    np.testing.assert_array_equal(np.unique(state.lam, axis=0), expected)
    if racing:
        whole = find_factors(model, params, documents, dataclasses.replace(settings, racing=0.0))
        assert state.nll.min() <= whole.nll.min() + 0.01 and state.cost.sum() < 0.9 * whole.cost.sum()
    else:
        assert state.cost.sum() == len(state) and state.nll.min() == state.nll[state.top(1)[0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ramps=4), "ramps = 4 is not for method = 'yarn_grid'"),
        (dict(space="critical_dimension"), "space = 'critical_dimension' is not for method = 'yarn_grid'"),
    ],
)
def test_settings_that_it_makes_no_use_of_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(target_length=TARGET, method="yarn_grid", **changes)
