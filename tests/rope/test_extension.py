"""The next extension of a model, pretrained or tuned, by a published method."""

import jax
import numpy as np
import pytest
import reference

from longrope_jax import rope
from longrope_jax.rope import METHODS, RopeFactors, Trained, extend

D, L, BASE = 64, 512, 10000.0
FIRST = np.sort(np.random.default_rng(0).uniform(1, 8, D // 2)).astype(np.float32)
TUNED = Trained(8 * L, RopeFactors(FIRST, np.int32(16), np.float32(1.2)))
PLAIN = {
    "unscaled": rope.unscaled(D),
    "linear": rope.linear(D, 8),
    "ntk": rope.ntk(D, 8),
    "yarn": rope.yarn(D, 8, BASE, L),
    "yarn_without_temperature": rope.yarn(D, 8, BASE, L, temperature=False),
    "yarn_mistral": rope.yarn(D, 8, BASE, L, beta_fast=128, beta_slow=2, temperature=False),
}


def ramp_by_wavelengths(wavelengths, scale, window):
    """YaRN in float64 on any wavelengths: pairs with 32 turns in the window or more are kept, with 1 or less / s.

    Where a wavelength falls between two pairs, the pair number is linear in its logarithm.
    """
    numbers = np.arange(len(wavelengths))
    low, high = (np.interp(np.log(window / turns), np.log(wavelengths), numbers) for turns in (32, 1))
    low, high = np.floor(low), np.ceil(high)
    interpolated = np.clip((numbers - low) / (high - low), 0, 1)
    return 1 / (interpolated / scale + 1 - interpolated)


def test_all_methods_are_known():
    assert set(METHODS) == set(PLAIN)


@pytest.mark.parametrize("method", PLAIN)
def test_of_a_pretrained_model_it_is_the_plain_method(method):
    got = extend(method, Trained(L, rope.unscaled(D)), 8 * L, D, BASE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), got, PLAIN[method])


def test_of_a_tuned_model_linear_stretches_what_it_was_tuned_with():
    got = extend("linear", TUNED, 32 * L, D, BASE)
    np.testing.assert_allclose(got.lam, FIRST.astype(np.float64) * 4, rtol=1e-7)
    assert (got.n_hat, got.mscale) == (16, np.float32(1.2))


def test_of_a_tuned_model_ntk_and_temperature_multiply():
    got = extend("ntk", TUNED, 32 * L, D, BASE)
    np.testing.assert_allclose(got.lam, FIRST * reference.lam_ntk(D, BASE, 4), rtol=1e-6)
    yarn = extend("yarn", TUNED, 32 * L, D, BASE)
    assert yarn.mscale == pytest.approx(1.2 * reference.mscale_yarn(4), rel=1e-6)
    assert extend("yarn_without_temperature", TUNED, 32 * L, D, BASE).mscale == np.float32(1.2)


def test_a_second_yarn_sees_the_wavelengths_that_the_model_was_tuned_with():
    effective = 2 * np.pi / reference.inv_freq(D, BASE) * FIRST.astype(np.float64)
    second = ramp_by_wavelengths(effective, 4, 8 * L)
    got = extend("yarn", TUNED, 32 * L, D, BASE)
    np.testing.assert_allclose(got.lam, FIRST * second, rtol=1e-6)
    blind = reference.lam_yarn(D, BASE, 4, 8 * L)
    assert np.abs(second / blind - 1).max() > 0.05  # with the original wavelengths it would be another
    plain = ramp_by_wavelengths(2 * np.pi / reference.inv_freq(D, BASE), 4, 8 * L)
    np.testing.assert_allclose(plain, blind, rtol=1e-12)  # the check itself, where there is a published formula


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("length", [1, L, 8 * L])
def test_up_to_the_trained_window_it_is_the_trained_factors(method, length):
    jax.tree.map(np.testing.assert_array_equal, extend(method, TUNED, length, D, BASE), TUNED.factors)


def test_unscaled_is_the_trained_factors_at_any_length():
    jax.tree.map(np.testing.assert_array_equal, extend("unscaled", TUNED, 64 * L, D, BASE), TUNED.factors)
