import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from longrope_jax.rope import (
    compose,
    critical_dimension,
    dynamic_ntk,
    frequencies,
    linear,
    llama3,
    longrope_mscale,
    ntk,
    ntk_critical,
    unscaled,
    yarn,
)

# head dimension, scale, base, original length: LLaMA2, LLaMA3, Mistral to 2M, SmolLM2, small
MODELS = [(128, 8, 1e4, 4096), (128, 16, 5e5, 8192), (128, 256, 1e4, 8192), (64, 4, 1e5, 2048), (32, 1, 1e4, 512)]
on_models = pytest.mark.parametrize(("head_dim", "scale", "base", "length"), MODELS)


def assert_factors(got, lam, mscale=1.0, n_hat=0):
    """As float64 says, unbatched, in the dtypes that every other part counts on."""
    assert (got.lam.dtype, got.n_hat.dtype, got.mscale.dtype) == (jnp.float32, jnp.int32, jnp.float32)
    assert (got.n_hat.shape, got.mscale.shape) == ((), ())
    np.testing.assert_allclose(got.lam, lam, rtol=1e-6)
    np.testing.assert_allclose(got.mscale, mscale, rtol=1e-6)
    assert int(got.n_hat) == n_hat
    got.check(2 * len(lam))


@on_models
def test_frequencies(head_dim, scale, base, length):
    np.testing.assert_allclose(frequencies(head_dim, base), reference.inv_freq(head_dim, base), rtol=1e-13)


@on_models
def test_unscaled(head_dim, scale, base, length):
    assert_factors(unscaled(head_dim), np.ones(head_dim // 2))


@on_models
def test_linear(head_dim, scale, base, length):
    assert_factors(linear(head_dim, scale), reference.lam_linear(head_dim, base, scale))


@on_models
def test_ntk(head_dim, scale, base, length):
    assert_factors(ntk(head_dim, scale), reference.lam_ntk(head_dim, base, scale))


def test_ntk_ends_at_1_and_s():
    lam = ntk(128, 32).lam
    np.testing.assert_allclose([lam[0], lam[-1]], [1, 32], rtol=1e-6)


@on_models
def test_ntk_critical(head_dim, scale, base, length):
    wanted = reference.lam_ntk_critical(head_dim, base, scale, length)
    assert_factors(ntk_critical(head_dim, scale, base, length), wanted)


def test_ntk_critical_reaches_s_at_the_critical_dimension():
    lam, critical = ntk_critical(128, 16, 5e5, 8192).lam, critical_dimension(128, 5e5, 8192)
    np.testing.assert_allclose(lam[critical], 16, rtol=1e-6)
    assert lam[critical - 1] < 15.5 and lam[critical + 1] > 16.5


def test_ntk_critical_needs_a_pair_that_makes_a_whole_turn():
    with pytest.raises(ValueError, match="original_length = 6"):
        ntk_critical(64, 2, 1e4, original_length=6)


def test_critical_dimension_of_llama3_8b_as_published():
    assert critical_dimension(128, 5e5, 8192) == 35


@on_models
@pytest.mark.parametrize("periods", [1, 10])
def test_critical_dimension_is_the_first_pair_with_too_few_turns(head_dim, scale, base, length, periods):
    turns = length * reference.inv_freq(head_dim, base) / (2 * math.pi)
    assert critical_dimension(head_dim, base, length, periods) == np.argmax(turns < periods)


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 10_000, 65_536])
def test_dynamic_ntk(length, factor):
    wanted = reference.lam_dynamic_ntk(128, 1e4, factor, length, 4096)
    assert_factors(dynamic_ntk(128, length, 4096, factor), wanted)
    assert np.any(wanted > 1.0001) == (length > 4096)


# Found by trying all lengths: factor * L / L - (factor - 1) comes out as 1 - 2^-52 or so.
@pytest.mark.parametrize(("original_length", "factor"), [(99, 1.7), (106, 3.3)])
def test_dynamic_ntk_leaves_lengths_up_to_l_alone_for_any_factor(original_length, factor):
    for length in (1, original_length):
        assert_factors(dynamic_ntk(64, length, original_length, factor), np.ones(32))


@on_models
def test_yarn(head_dim, scale, base, length):
    wanted = reference.lam_yarn(head_dim, base, scale, length)
    assert_factors(yarn(head_dim, scale, base, length), wanted, reference.mscale_yarn(scale))


def test_yarn_with_the_boundaries_of_mistral():
    wanted = reference.lam_yarn(128, 1e4, 16, 8192, beta_fast=128, beta_slow=2)
    assert not np.allclose(wanted, reference.lam_yarn(128, 1e4, 16, 8192))
    got = yarn(128, 16, 1e4, 8192, beta_fast=128, beta_slow=2)
    assert_factors(got, wanted, reference.mscale_yarn(16))


# Where the ramp's boundaries (low, high) end up, and which of the clamps made them so.
YARN_CORNERS = {
    "low below 0": (32, 1e4, 128, (0, 6)),
    "ramp longer than the head": (4, 1e4, 4096, (0, 2)),
    "high above the last pair, below D - 1": (32, 1e4, 200_000, (11, 19)),
    "high above D - 1": (32, 1e4, 2**29, (25, 31)),
    "low and high both above D - 1": (32, 1e4, 2**40, (38, 31)),
    "low and high both at D - 1": (32, 1e4, 13_000_000_000, (31, 31)),
    "low and high both 0": (32, 1e4, 6, (0, 0)),
    "high below 0": (32, 1e4, 1, (0, -3)),
}


@pytest.mark.parametrize(("head_dim", "base", "length", "boundaries"), YARN_CORNERS.values(), ids=YARN_CORNERS)
def test_yarn_clamps_its_ramp_like_the_released_code(head_dim, base, length, boundaries):
    assert reference.yarn_range(head_dim, base, length) == boundaries
    wanted = reference.lam_yarn(head_dim, base, 8, length)
    assert_factors(yarn(head_dim, 8, base, length), wanted, reference.mscale_yarn(8))


@pytest.mark.parametrize("head_dim", [4, 6, 48, 80, 256])
def test_yarn_finds_the_ramp_of_any_model(head_dim):
    lengths = np.unique(np.geomspace(2, 2**31, 60).astype(int))
    for base in (100.0, 1e4, 5e5, 1e7):
        for length in lengths:
            wanted = reference.lam_yarn(head_dim, base, 4, int(length))
            np.testing.assert_allclose(yarn(head_dim, 4, base, int(length)).lam, wanted, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_yarn_with_a_single_pair():
    assert_factors(yarn(2, 4, 1e4, 4096), reference.lam_yarn(2, 1e4, 4, 4096), reference.mscale_yarn(4))


def test_yarn_temperature_can_be_left_out():
    assert_factors(yarn(64, 8, temperature=False), reference.lam_yarn(64, 1e4, 8, 4096), mscale=1)
    np.testing.assert_allclose(yarn(64, 8).mscale, 0.1 * math.log(8) + 1, rtol=1e-6)
    assert yarn(64, 1).mscale == 1


@on_models
def test_llama3(head_dim, scale, base, length):
    assert_factors(llama3(head_dim, scale, base, length), reference.lam_llama3(head_dim, base, scale, length))


def test_llama3_with_other_boundaries():
    wanted = reference.lam_llama3(128, 5e5, 8, 8192, low_freq_factor=2, high_freq_factor=16)
    assert not np.allclose(wanted, reference.lam_llama3(128, 5e5, 8, 8192))
    assert_factors(llama3(128, 8, low_freq_factor=2, high_freq_factor=16), wanted)


@pytest.mark.parametrize(
    ("scale", "length"), [(0.5, 4096), (1, 4096), (1.01, 4096), (32, 4096), (512, 4096), (8, 8192)]
)
def test_longrope_mscale(scale, length):
    assert longrope_mscale(scale, length) == pytest.approx(reference.mscale_su(scale, length), rel=1e-12)


def test_longrope_mscale_of_a_single_token_has_no_bound():
    assert longrope_mscale(8, 1) == np.inf and longrope_mscale(1, 1) == 1


# --- extending twice --------------------------------------------------------------------------------------------------


def test_pi_after_pi_is_pi_of_the_product():
    assert_factors(compose(linear(64, 8), lambda _: linear(64, 4), 64), linear(64, 32).lam)


@pytest.mark.parametrize("method", [linear, ntk, yarn])
def test_unscaled_is_the_identity_of_composition(method):
    original = method(64, 8).replace(n_hat=jnp.int32(12))
    for composed in (
        compose(original, lambda _: unscaled(64), 64),
        compose(unscaled(64), lambda _: original, 64),
    ):
        assert_factors(composed, original.lam, float(original.mscale), n_hat=12)


def test_method_sees_the_wavelengths_of_the_extended_model():
    seen = []
    compose(ntk(64, 8), lambda w: seen.append(w) or unscaled(64), 64, base=5e5)
    extended_base = 5e5 * 8 ** (64 / 62)
    np.testing.assert_allclose(seen[0], 2 * np.pi / reference.inv_freq(64, extended_base), rtol=1e-6)
    assert seen[0].dtype == np.float64


@pytest.mark.parametrize(
    ("first", "second", "base", "length"), [(8, 4, 1e4, 4096), (32, 8, 5e5, 8192), (3, 5, 1e4, 900)]
)
def test_yarn_after_pi_takes_wavelengths_for_s_times_longer(first, second, base, length):
    """Wavelengths that are s_1 times longer go into L as often as the original ones into L / s_1."""
    method = partial(yarn, 128, second, base, length)
    got = compose(linear(128, first), lambda w: method(wavelengths=w), 128, base)
    wanted = first * reference.lam_yarn(128, base, second, length / first)
    assert not np.allclose(wanted, first * reference.lam_yarn(128, base, second, length), rtol=1e-3)
    assert_factors(got, wanted, reference.mscale_yarn(second))


def test_yarn_after_ntk_is_yarn_on_a_model_with_the_larger_base():
    length, larger_base = 32_768, 1e4 * 8 ** (128 / 126)
    got = compose(ntk(128, 8), lambda w: yarn(128, 4, original_length=length, wavelengths=w), 128)
    wanted = reference.lam_ntk(128, 1e4, 8) * reference.lam_yarn(128, larger_base, 4, length)
    assert_factors(got, wanted, reference.mscale_yarn(4))


def test_yarn_after_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    """The effective wavelengths are not geometric here; which pairs are kept can be counted all the same."""
    first, length = yarn(128, 8), 32_768
    got = compose(first, lambda w: yarn(128, 4, original_length=length, wavelengths=w), 128)
    lam = np.asarray(first.lam, np.float64)
    turns = length * reference.inv_freq(128, 1e4) / (2 * np.pi * lam)
    ratio = np.asarray(got.lam) / lam
    last_kept, first_interpolated = np.flatnonzero(turns >= 32)[-1], np.flatnonzero(turns <= 1)[0]
    np.testing.assert_array_equal(ratio < 1 + 1e-6, np.arange(64) <= last_kept)
    np.testing.assert_array_equal(ratio > 4 - 1e-5, np.arange(64) >= first_interpolated)
    assert float(got.mscale) == pytest.approx(reference.mscale_yarn(8) * reference.mscale_yarn(4), rel=1e-6)


@pytest.mark.parametrize(("first", "second"), [(4, 0), (0, 4), (8, 4), (4, 8)])
def test_composition_keeps_the_larger_n_hat(first, second):
    start = lambda n_hat: linear(16, 2).replace(n_hat=jnp.int32(n_hat))  # noqa: E731
    assert int(compose(start(first), lambda _: start(second), 16).n_hat) == max(first, second)


# --- refusals ---------------------------------------------------------------------------------------------------------

WITH_SCALE = {"linear": linear, "ntk": ntk, "ntk_critical": ntk_critical, "yarn": yarn, "llama3": llama3}
ALL = WITH_SCALE | {
    "unscaled": lambda head_dim, scale: unscaled(head_dim),
    "dynamic_ntk": lambda head_dim, scale: dynamic_ntk(head_dim, 8192, 4096),
    "frequencies": lambda head_dim, scale: frequencies(head_dim),
}


@pytest.mark.parametrize("method", WITH_SCALE.values(), ids=WITH_SCALE)
@pytest.mark.parametrize("scale", [0.99, 0, -2, math.nan, math.inf])
def test_scale_must_be_a_number_from_1_on(method, scale):
    with pytest.raises(ValueError, match=f"scale = {scale}"):
        method(64, scale)


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
@pytest.mark.parametrize("head_dim", [63, 1])
def test_head_dim_must_be_even(method, head_dim):
    with pytest.raises(ValueError, match=f"head_dim = {head_dim}"):
        method(head_dim, 4)


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"ntk_critical"}))
@pytest.mark.parametrize("head_dim", [0, -4])
def test_head_dim_must_be_positive(name, head_dim):
    with pytest.raises(ValueError, match=f"head_dim = {head_dim}"):
        ALL[name](head_dim, 4)


@pytest.mark.parametrize("head_dim", [63, 0, -4])
def test_critical_dimension_needs_a_positive_even_head_dim(head_dim):
    with pytest.raises(ValueError, match=f"head_dim = {head_dim}"):
        critical_dimension(head_dim, 1e4, 4096)


@pytest.mark.parametrize("base", [1, 0.5, 0, -10, math.nan])
def test_base_must_be_above_1(base):
    with pytest.raises(ValueError, match=f"base = {base}"):
        frequencies(64, base)


@pytest.mark.parametrize(("fast", "slow"), [(1, 32), (4, 4)])
def test_boundaries_of_ramps_must_be_in_order(fast, slow):
    with pytest.raises(ValueError, match=f"beta_fast = {fast} must be above beta_slow = {slow}"):
        yarn(64, 4, beta_fast=fast, beta_slow=slow)
    with pytest.raises(ValueError, match=f"high_freq_factor = {fast} must be above low_freq_factor = {slow}"):
        llama3(64, 4, high_freq_factor=fast, low_freq_factor=slow)


@pytest.mark.parametrize(("length", "original_length"), [(0, 4096), (-1, 4096), (8192, 0)])
def test_dynamic_ntk_needs_positive_lengths(length, original_length):
    with pytest.raises(ValueError, match=f"length = {length}, original_length = {original_length}"):
        dynamic_ntk(64, length, original_length)
