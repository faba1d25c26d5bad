"""Where a search starts: on a pretrained model, on a tuned one, and below the window that it was tuned for."""

import numpy as np
import pytest
import reference

from longrope_jax import rope
from longrope_jax.rope import RopeFactors, Trained
from longrope_jax.search.space import paper_seeds, paper_space

D, L = 32, 128
PRETRAINED = Trained(L, rope.unscaled(D))
TUNED = Trained(8 * L, RopeFactors(np.linspace(1, 9, 16).astype(np.float32), np.int32(12), np.float32(1.125)))


def seeds(trained, target, upper_bound=1.25):
    space = paper_space(target / L, L, upper_bound=upper_bound)
    found = paper_seeds(D, target, 1e4, L, trained, space)
    genes = [(seed.lam.tobytes(), int(seed.n_hat)) for seed in found.values()]
    assert len(set(genes)) == len(genes)
    for seed in found.values():
        seed.check(D)
        assert seed.lam.min() >= 1 and seed.lam.max() <= np.float32(space.high)
        assert seed.mscale == trained.factors.mscale  # a search compares rotations
    return found


def test_on_a_pretrained_model_they_are_the_published_methods_without_temperature():
    found = seeds(PRETRAINED, 8 * L)
    expected = {
        "linear": reference.lam_linear(D, 1e4, 8),
        "ntk": reference.lam_ntk(D, 1e4, 8),
        "yarn": reference.lam_yarn(D, 1e4, 8, L),
    }
    assert list(found) == list(expected)
    for name, lam in expected.items():
        np.testing.assert_allclose(found[name].lam, lam, rtol=1e-6)
        assert (found[name].n_hat, found[name].mscale) == (0, 1)


def test_beyond_the_tuned_window_they_extend_the_tuned_factors():
    found = seeds(TUNED, 64 * L)
    assert list(found) == ["linear", "ntk", "yarn", "yarn_mistral"]
    first = np.asarray(TUNED.factors.lam, np.float64)
    np.testing.assert_allclose(found["linear"].lam, np.minimum(8 * first, 80), rtol=1e-6)
    np.testing.assert_allclose(found["ntk"].lam, np.minimum(reference.lam_ntk(D, 1e4, 8) * first, 80), rtol=1e-6)
    # YaRN keeps pairs that turn often within the window by their effective wavelengths, not by the original ones.
    blind = first * reference.lam_yarn(D, 1e4, 8, 8 * L)
    assert np.abs(found["yarn"].lam / blind - 1).max() > 0.05
    assert all(seed.n_hat == 12 for seed in found.values())


def test_seeds_are_clipped_to_the_largest_factor_of_the_space():
    assert seeds(PRETRAINED, 8 * L, upper_bound=0.5)["linear"].lam.tolist() == [4.0] * 16
    assert seeds(TUNED, 64 * L, upper_bound=0.5)["linear"].lam.max() == 32.0


def test_at_the_original_length_there_are_the_trained_factors_and_none_at_all():
    found = seeds(TUNED, L, upper_bound=4.0)
    assert list(found) == ["trained_clipped", "unscaled"]  # every method is none there
    np.testing.assert_allclose(found["trained_clipped"].lam, np.minimum(TUNED.factors.lam, 4), rtol=1e-6)
    assert found["trained_clipped"].n_hat == 12
    np.testing.assert_array_equal(found["unscaled"].lam, np.ones(16))


def test_a_pretrained_model_has_one_seed_at_its_own_length():
    assert list(seeds(PRETRAINED, L, upper_bound=4.0)) == ["trained"]


@pytest.mark.parametrize("target", [2 * L, 8 * L])
def test_up_to_the_tuned_window_the_methods_extend_the_original_model(target):
    found = seeds(TUNED, target)
    trained = "trained" if target == 8 * L else "trained_clipped"  # up to 1.25 * 8, and to 1.25 * 2
    assert list(found) == [trained, "unscaled", "linear", "ntk", "yarn", "yarn_mistral"]
    np.testing.assert_allclose(found["linear"].lam, target / L)
    np.testing.assert_allclose(found["yarn"].lam, reference.lam_yarn(D, 1e4, target / L, L), rtol=1e-6)
    assert found["linear"].n_hat == 0
