"""What holds of all factors, wherever they come from: methods, files, tables, Hugging Face's parameters."""

import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from properties.draws import factor_sets, tables

from longrope_jax.interop.architectures import Rotation
from longrope_jax.interop.factor_files import read_factors, write_factors
from longrope_jax.rope import (
    METHODS,
    FactorTable,
    RopeFactors,
    Trained,
    extend,
    from_huggingface,
    load_factors,
    load_table,
    save_factors,
    save_table,
    to_huggingface,
    two_lengths,
    unscaled,
    unsupported_by_huggingface,
)
from longrope_jax.search.seeds import rescaled

scales = st.floats(1, 512)
head_dims = st.integers(1, 96).map(lambda half: 2 * half)
bases = st.floats(2, 1e7)
lengths = st.integers(16, 2**17)


def assert_same(found, wanted):
    for name in ("lam", "n_hat", "mscale"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)


def assert_same_table(found, wanted):
    np.testing.assert_array_equal(found.boundaries, wanted.boundaries)
    assert_same(found.factors, wanted.factors)


@settings(max_examples=100)
@given(st.sampled_from(sorted(METHODS)), head_dims, bases, lengths, scales)
def test_every_method_makes_factors_between_nothing_and_the_scale(method, head_dim, base, length, scale):
    factors = extend(method, Trained(length, unscaled(head_dim)), round(scale * length), head_dim, base)
    factors.check(head_dim)
    grown = round(scale * length) / length
    assert np.asarray(factors.lam).max() <= max(grown, 1) * (1 + 1e-6)
    assert 1 <= factors.mscale <= 1 + 0.1 * math.log(max(grown, 1)) + 1e-6


@settings(max_examples=60)
@given(st.sampled_from(sorted(METHODS)), head_dims, bases, lengths, scales, scales)
def test_a_second_extension_goes_on_from_the_first_and_none_changes_nothing(method, head_dim, base, length, one, two):
    trained = Trained(length, extend(method, Trained(length, unscaled(head_dim)), int(one * length), head_dim, base))
    again = extend(method, trained, length, head_dim, base)
    assert_same(again, trained.factors)
    further = extend(method, trained, int(two * length), head_dim, base).check(head_dim)
    assert (np.asarray(further.lam) >= np.asarray(trained.factors.lam) * (1 - 1e-6)).all()


@pytest.mark.parametrize("suffix", [".json", ".csv"])
@settings(max_examples=60)
@given(data=st.data())
def test_what_a_file_takes_it_gives_back_to_the_bit(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("factors") / f"some{suffix}"
    if suffix == ".json":
        factors = data.draw(factor_sets())
    else:
        factors = data.draw(factor_sets(half=st.integers(1, 32).map(lambda half: 2 * half), mscale=st.just(1.0)))
    save_factors(path, factors)
    for head_dim in (None, 2 * len(factors.lam)):
        assert_same(load_factors(path, head_dim), factors)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(tables(), json_values)
def test_a_table_and_its_metadata_come_back(tmp_path_factory, table, told):
    path = tmp_path_factory.mktemp("table") / "table.json"
    save_table(path, table, told=told)
    assert_same_table(load_table(path), table)
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"]["told"] == told


@settings(max_examples=25)
@given(tables(), st.data())
def test_a_length_gets_the_factors_of_the_first_boundary_that_reaches_it(table, data):
    # Beyond 2^24 the table's gather, in float32, can't tell every n_hat from its neighbours.
    table = table.replace(factors=table.factors.replace(n_hat=table.factors.n_hat % 2**24))
    length = data.draw(st.integers(1, int(table.boundaries[-1])) | st.sampled_from(table.boundaries.tolist()))
    row = next(row for row, boundary in enumerate(table.boundaries) if length <= boundary)
    chosen = table.select(length)
    assert_same(chosen, RopeFactors(table.factors.lam[row], table.factors.n_hat[row], table.factors.mscale[row]))
    with pytest.raises(ValueError, match="beyond this table's last boundary"):
        table.select(int(table.boundaries[-1]) + 1)


@settings(max_examples=60)
@given(tables(most=3, n_hat=st.integers(0, 64)), st.integers(1, 2**20))
def test_rope_parameters_carry_all_or_say_what_they_lose(table, original):
    lost = unsupported_by_huggingface(table)
    head_dim = 2 * table.factors.lam.shape[-1]
    if lost:
        with pytest.raises(ValueError, match="does not support"):
            to_huggingface(table, original)
        table = two_lengths(table, original)
    assert not unsupported_by_huggingface(table)
    parameters = json.loads(json.dumps(to_huggingface(table, original)))
    found = from_huggingface(parameters, head_dim, 1e4, int(table.boundaries[-1]))
    for length in {1, *table.boundaries.tolist()}:
        wanted, got = table.select(length), found.select(length)
        np.testing.assert_array_equal(got.lam, wanted.lam)
        np.testing.assert_array_equal(got.mscale, wanted.mscale)


@settings(max_examples=40)
@given(tables(most=2, n_hat=st.just(0), mscale=st.just(1.25)), st.integers(1, 2**20), st.floats(1.5, 1e8))
def test_kinds_of_files_turn_into_each_other(tmp_path_factory, table, original, base):
    assume(original <= table.boundaries[0])
    folder = tmp_path_factory.mktemp("kinds")
    found = Rotation(table, base, original if len(table.boundaries) == 1 else int(table.boundaries[0]))
    for kind in ("longrope_jax", "huggingface"):
        write_factors(folder / f"{kind}.json", found, kind)
        again = read_factors(folder / f"{kind}.json")
        assert (again.base, again.original_length) == (found.base, found.original_length)
        for length in {1, *table.boundaries.tolist()}:
            np.testing.assert_array_equal(again.table.select(length).lam, table.select(length).lam)


@settings(max_examples=60)
@given(factor_sets(half=st.integers(1, 32)), st.just(1.0) | st.floats(1.01, 64), st.floats(1, 64))
def test_a_seed_at_another_scale_is_still_sound(factors, scale, new_scale):
    rescaled(factors, scale, new_scale).check(2 * len(factors.lam))


@settings(max_examples=60)
@given(factor_sets(half=st.integers(2, 32)), st.data())
def test_one_thing_wrong_is_refused_by_name(factors, data):
    lam, kind = factors.lam.copy(), data.draw(st.sampled_from(["below 1", "not finite", "falls", "n_hat", "mscale"]))
    where = data.draw(st.integers(1, len(lam) - 1))
    if kind == "falls":
        lam[where:] += 1
        lam[where] = np.nextafter(lam[where - 1], np.float32(0))
        assume(lam[where] >= 1)
    elif kind in ("below 1", "not finite"):
        wrong = st.floats(-1e9, 0.9990234375, width=32) if kind == "below 1" else st.sampled_from([np.nan, np.inf])
        lam[where] = data.draw(wrong)
    n_hat = data.draw(st.integers(-(2**31), -1)) if kind == "n_hat" else factors.n_hat
    mscale = data.draw(st.sampled_from([0.0, -1.0, np.nan, np.inf])) if kind == "mscale" else factors.mscale
    name = kind if kind in ("n_hat", "mscale") else rf"lam\[{where}\]"
    with pytest.raises(ValueError, match=name):
        RopeFactors(lam, np.int32(n_hat), np.float32(mscale)).check()


@settings(max_examples=40)
@given(st.lists(factor_sets(half=st.just(4)), min_size=1, max_size=4), st.data())
def test_a_table_does_not_depend_on_the_order_in_which_it_is_reported(sets, data):
    boundaries = data.draw(st.lists(lengths, min_size=len(sets), max_size=len(sets), unique=True))
    entries = list(zip(boundaries, sets, strict=True))
    shuffled = data.draw(st.permutations(entries))
    assert_same_table(FactorTable.of(dict(shuffled)), FactorTable.of(dict(entries)))
