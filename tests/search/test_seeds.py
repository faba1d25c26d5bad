"""Where a search starts: on a pretrained model, on a tuned one, and below the window that it was tuned for."""

import numpy as np
import pytest
import reference

from longrope_jax import rope
from longrope_jax.rope import RopeFactors, Trained
from longrope_jax.search.seeds import as_genes, critical_seeds, paper_seeds, rescaled
from longrope_jax.search.space import critical_space, paper_space

D, L = 32, 128
PRETRAINED = Trained(L, rope.unscaled(D))
TUNED = Trained(8 * L, RopeFactors(np.linspace(1, 9, 16).astype(np.float32), np.int32(12), np.float32(1.125)))


def seeds(trained, target, upper_bound=1.25):
    temperature = float(trained.factors.mscale)
    space = paper_space(target / L, L, upper_bound=upper_bound, mscale=(temperature, temperature))
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


def test_yarn_has_its_temperature_only_where_it_is_searched():
    fixed, searched = (paper_space(8, L, mscale=mscale) for mscale in ((1.0, 1.0), (1.0, 1.5)))
    assert list(paper_seeds(D, 8 * L, 1e4, L, PRETRAINED, fixed)) == ["linear", "ntk", "yarn"]
    found = paper_seeds(D, 8 * L, 1e4, L, PRETRAINED, searched)
    assert list(found) == ["linear", "ntk", "yarn", "yarn_with_temperature"]
    assert [float(seed.mscale) for seed in found.values()] == pytest.approx([1, 1, 1, 0.1 * np.log(8) + 1])
    np.testing.assert_array_equal(found["yarn"].lam, found["yarn_with_temperature"].lam)
    low = paper_seeds(D, 8 * L, 1e4, L, PRETRAINED, paper_space(8, L, mscale=(1.0, 1.1)))
    assert low["yarn_with_temperature"].mscale == np.float32(1.1)  # within the space


def test_own_seeds_are_rescaled_as_the_released_code_does():
    own = RopeFactors(np.linspace(1, 4, 16).astype(np.float32), np.int32(8), np.float32(1.2))
    found = rescaled(own, 4, 8)
    np.testing.assert_allclose(found.lam, 1 + (np.linspace(1, 4, 16) - 1) * 7 / 3, rtol=1e-6)
    assert found.lam.dtype == np.float32 and (found.n_hat, found.mscale) == (8, np.float32(1.2))
    np.testing.assert_allclose(rescaled(found, 8, 4).lam, own.lam, rtol=1e-6)
    np.testing.assert_array_equal(rescaled(own, 4, 4).lam, own.lam)
    np.testing.assert_array_equal(rescaled(own, 1, 8).lam, own.lam)  # made for no extension at all
    np.testing.assert_array_equal(rescaled(own, 4, 1).lam, np.ones(16))


def test_seeds_become_candidates_of_the_space_each_once():
    space = paper_space(8, L)
    own = RopeFactors(np.linspace(0.5, 20, 16), np.int32(3), np.float32(1))
    same = own.replace(lam=np.clip(own.lam, 1, 10))
    names, genes = as_genes({"own": own, "same": same, "other": same.replace(n_hat=np.int32(0))}, space)
    assert names == ["own", "other"]
    np.testing.assert_array_equal(genes.lam, np.float32([same.lam, same.lam]))
    assert genes.n_hat.tolist() == [3, 0] and genes.critical.tolist() == [0, 0]


def test_critical_seeds_lie_in_the_space():
    space = critical_space(8, L, D, 1e4)
    assert len(space.critical) > 2
    found, critical = critical_seeds(space, D, 3 * len(space.critical), 1.2, seed=0)
    assert len(found) == len(critical) == 3 * len(space.critical) and critical[: len(space.critical) + 1] == [
        *space.critical,
        space.critical[0],
    ]
    for seed, pair in zip(found.values(), critical, strict=True):
        seed.check(D)
        constant = seed.lam[pair]
        assert 8 <= constant <= 16 and abs(constant * 100 - np.round(constant * 100)) < 1e-2
        np.testing.assert_array_equal(seed.lam[pair:], constant)
        np.testing.assert_allclose(seed.lam[:pair], constant ** (np.arange(pair) / max(pair, 1)), rtol=1e-5)
        assert (seed.n_hat, seed.mscale) == (0, np.float32(1.2))
    assert len({float(seed.lam[-1]) for seed in found.values()}) > len(found) / 2
    again, _ = critical_seeds(space, D, 3, 1.2, seed=0)
    other, _ = critical_seeds(space, D, 3, 1.2, seed=1)
    heights = [[float(seed.lam[-1]) for seed in seeds.values()][:3] for seeds in (again, found, other)]
    assert heights[0] == heights[1] != heights[2]


def test_own_seeds_in_the_critical_space_free_the_fewest_pairs():
    space = critical_space(8, L, D, 1e4)
    names, genes = as_genes({"own": RopeFactors(np.linspace(1, 9, 16), np.int32(0), np.float32(1))}, space)
    last = space.critical[-1]
    assert names == ["own"] and genes.critical.tolist() == [last]
    np.testing.assert_allclose(genes.lam[0, last:], np.maximum(np.linspace(1, 9, 16), 8)[last:], rtol=1e-6)
    np.testing.assert_allclose(genes.lam[0, :last], genes.lam[0, last] ** (np.arange(last) / last), rtol=1e-5)
