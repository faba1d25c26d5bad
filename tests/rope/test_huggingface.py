"""Hugging Face's rope_parameters: there and back, and what has no place in them."""

import json

import numpy as np
import pytest
from reference import lam_llama3, lam_yarn, mscale_su, mscale_yarn

from longrope_jax.rope import (
    FactorTable,
    RopeFactors,
    from_huggingface,
    linear,
    to_huggingface,
    two_lengths,
    unscaled,
    unsupported_by_huggingface,
)

D, L = 8, 64
LONG = np.array([1.0, 2.5, 30.0, 63.7], np.float32)


def factors(lam, n_hat=0, mscale=1.0):
    return RopeFactors(np.asarray(lam, np.float32), np.int32(n_hat), np.float32(mscale))


@pytest.mark.parametrize("original", [L, 4096])
def test_there_and_back_is_exact(original):
    table = FactorTable.of({original: factors([1, 1.01, 1.1, 1.2], 0, 1.19), 64 * original: factors(LONG, 0, 1.19)})
    parameters = json.loads(json.dumps(to_huggingface(table, original)))
    assert parameters["rope_type"] == "longrope" and parameters["factor"] == 64
    found = from_huggingface(parameters, D, 10000.0, 64 * original)
    np.testing.assert_array_equal(found.boundaries, table.boundaries)
    for leaf in ("lam", "n_hat", "mscale"):
        np.testing.assert_array_equal(getattr(found.factors, leaf), getattr(table.factors, leaf))


def test_one_set_of_factors_serves_all_lengths():
    parameters = to_huggingface(FactorTable.of({8 * L: linear(D, 8)}), L)
    assert parameters["short_factor"] == parameters["long_factor"] == [8.0] * 4
    assert parameters["original_max_position_embeddings"] == L and parameters["factor"] == 8


LOST = {
    "start_tokens": ({L: unscaled(D), 8 * L: factors(LONG, 4)}, r"start tokens \(n_hat = 0, 4\)"),
    "lengths": ({L: unscaled(D), 2 * L: unscaled(D), 8 * L: factors(LONG)}, r"more than two lengths \(64, 128, 512\)"),
    "temperatures": ({L: unscaled(D), 8 * L: factors(LONG, 0, 1.2)}, r"temperatures .*\(mscale = 1, 1.2\)"),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_can_t_be_carried_is_never_dropped_in_silence(lost):
    entries, message = LOST[lost]
    table = FactorTable.of(entries)
    assert list(unsupported_by_huggingface(table)) == [lost]
    with pytest.raises(ValueError, match=message):
        to_huggingface(table, L)


def test_the_nearest_table_keeps_the_original_and_the_longest():
    entries = {L: unscaled(D), 2 * L: linear(D, 2), 8 * L: factors(LONG, 4, 1.2)}
    reduced = two_lengths(FactorTable.of(entries), L)
    assert not unsupported_by_huggingface(reduced)
    np.testing.assert_array_equal(reduced.boundaries, [L, 8 * L])
    np.testing.assert_array_equal(reduced.factors.lam, [np.ones(4), LONG])
    np.testing.assert_array_equal(reduced.factors.mscale, np.float32([1.2, 1.2]))


def test_ramps_are_those_of_the_reference():
    ramp = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    found = from_huggingface({"rope_type": "llama3", **ramp}, 16, 500000.0, 512)
    np.testing.assert_allclose(found.factors.lam[0], lam_llama3(16, 500000.0, 8.0, 64), rtol=1e-6)
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512, "beta_fast": 64}
    found = from_huggingface(yarn, 16, 10000.0, 8192)
    np.testing.assert_allclose(found.factors.lam[0], lam_yarn(16, 10000.0, 16.0, 512, beta_fast=64), rtol=1e-6)
    np.testing.assert_allclose(found.factors.mscale, mscale_yarn(16.0), rtol=1e-6)


def test_longrope_s_temperature_follows_from_the_scale_where_it_is_not_given():
    parameters = {"type": "su", "short_factor": [1.0] * 4, "long_factor": LONG.tolist()}
    found = from_huggingface({**parameters, "original_max_position_embeddings": 64}, D, 1e4, 512)
    np.testing.assert_allclose(found.factors.mscale, mscale_su(8, 64), rtol=1e-6)


def test_yarn_s_scale_follows_from_the_lengths_where_it_is_not_given():
    found = from_huggingface({"rope_type": "yarn", "original_max_position_embeddings": 64}, 16, 1e4, 1024)
    np.testing.assert_allclose(found.factors.lam[0], lam_yarn(16, 1e4, 16.0, 64), rtol=1e-6)
    np.testing.assert_allclose(found.factors.mscale, mscale_yarn(16.0), rtol=1e-6)


SU = {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": LONG.tolist()}


@pytest.mark.parametrize("original", [64, 128])
def test_longrope_without_room_for_long_sequences_has_short_factors_alone(original):
    found = from_huggingface({**SU, "original_max_position_embeddings": original}, D, 1e4, 64)
    np.testing.assert_array_equal(found.boundaries, [64])
    np.testing.assert_array_equal(found.factors.lam, np.float32([SU["short_factor"]]))
    np.testing.assert_array_equal(found.factors.mscale, [1.0])


def test_a_type_that_is_nothing_is_not_given():
    found = from_huggingface({"rope_type": None, "type": "linear", "factor": 2.0}, D, 1e4, 64)
    np.testing.assert_array_equal(found.factors.lam, [[2.0] * 4])
    np.testing.assert_array_equal(from_huggingface({"type": None}, D, 1e4, 64).factors.lam, [[1.0] * 4])


def test_yarn_with_lists_of_factors_is_what_phi_3_once_called_longrope():
    parameters = {**SU, "original_max_position_embeddings": 16}
    as_su, as_yarn = (from_huggingface({**parameters, "type": kind}, D, 1e4, 64) for kind in ("su", "yarn"))
    np.testing.assert_array_equal(as_yarn.factors.lam, as_su.factors.lam)
    np.testing.assert_array_equal(as_yarn.factors.mscale, as_su.factors.mscale)


@pytest.mark.parametrize(("mscale", "is_told"), [(1.2, True), (mscale_su(8, L), False)])
def test_a_temperature_of_its_own_is_reported_under_the_names_of_other_readers_too(mscale, is_told):
    """They have the formula as their default, and know no attention_factor."""
    table = FactorTable.of({L: factors(np.ones(4), 0, mscale), 8 * L: factors(LONG, 0, mscale)})
    parameters = to_huggingface(table, L)
    mscales = {name: parameters[name] for name in ("short_mscale", "long_mscale") if name in parameters}
    assert mscales == (
        dict.fromkeys(["short_mscale", "long_mscale"], parameters["attention_factor"]) if is_told else {}
    )
    assert np.float32(parameters["attention_factor"]) == np.float32(mscale)


WRONG = {
    "type": ({"rope_type": "dynamic", "factor": 2.0}, "rope_type = 'dynamic' is not supported; known are default"),
    "no factor": ({"rope_type": "linear"}, "factor = None must be a positive number"),
    "text": ({"rope_type": "linear", "factor": "2"}, "factor = '2' must be"),
    "nan": ({"rope_type": "linear", "factor": float("nan")}, "factor = nan must be"),
    "truncate": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "truncate": False},
        "trunc",
    ),
    "short list": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0],
            "long_factor": [1.0] * 4,
            "original_max_position_embeddings": 8,
        },
        r"short_factor = \[1.0\] must be a list of 4 numbers",
    ),
    "layers": ({"full_attention": {"rope_type": "default"}}, "one object for all layers"),
    "list": ([1.0], "must be one object"),
    "huge": ({"rope_type": "linear", "factor": 10**400}, "factor = 10+... must be a positive number"),
    "half a token": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5},
        "original_max_position_embeddings = 0.5 must be a positive whole number",
    ),
    "no factor of llama3": (
        {"rope_type": "llama3", "original_max_position_embeddings": 8},
        "low_freq_factor = None must be a positive number",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_nonsense_is_named(wrong):
    parameters, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        from_huggingface(parameters, D, 10000.0, 64)
