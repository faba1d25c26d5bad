"""Factors by sequence length: which a sequence gets, under every transformation, and the file that holds them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longrope_jax.rope import FactorTable, RopeFactors, linear, load_table, save_table, stack, unscaled


def make_factors(lam=(1.0, 1.5, 2.0, 4.0), n_hat=0, mscale=1.0):
    return RopeFactors(np.asarray(lam, np.float32), np.int32(n_hat), np.float32(mscale))


SHORT = make_factors((1, 1.1, 1.2, 1.3), 8, 1.0)
MIDDLE = make_factors((1, 1.5, 2.5, 4.1), 0, 1.19)
LONG = make_factors((1.01, 3.3, 7.7, 17.3), 2**24 - 1, 1.3)
TABLE = FactorTable.of({1024: LONG, 128: SHORT, 256: MIDDLE})
BY_LENGTH = {1: SHORT, 127: SHORT, 128: SHORT, 129: MIDDLE, 256: MIDDLE, 257: LONG, 1024: LONG}


def assert_same(got, wanted):
    for name in ("lam", "n_hat", "mscale"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name, strict=True)


# --- making one -------------------------------------------------------------------------------------------------------

BAD_TABLES = {
    "empty": ({}, "a factor table needs one boundary at least"),
    "zero": ({0: SHORT}, "boundary = 0 is not a positive number of tokens"),
    "negative": ({128: SHORT, -1: SHORT}, "boundary = -1 is not a positive number of tokens"),
    "part of a token": ({128.5: SHORT}, "boundary = 128.5 is not a positive number of tokens"),
    "beyond int32": ({2**31: SHORT}, "boundary = 2147483648 is not a positive number of tokens"),
    "other head": ({128: SHORT, 256: make_factors((1, 2))}, "boundary 256: lam has 2 factors; a head dimension of 8"),
    "batched": ({128: SHORT, 256: stack([SHORT, LONG])}, "boundary 256: lam has shape (2, 4); an entry is one set"),
    "nonsense": ({128: make_factors(mscale=0), 256: LONG}, "boundary 128: mscale = 0.0 is not a positive number"),
}


@pytest.mark.parametrize(("entries", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_entries_are_named(entries, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        FactorTable.of(entries)


def test_entries_are_sorted_and_a_fall_only_warns():
    with pytest.warns(UserWarning, match=r"lam\[1\] = 1.0 is smaller"):
        table = FactorTable.of({256: make_factors((2, 1, 3, 4)), 128: SHORT})
    np.testing.assert_array_equal(table.boundaries, [128, 256])
    np.testing.assert_array_equal(table.factors.lam[0], SHORT.lam)


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_length_gets_the_smallest_boundary_not_below_it(transform):
    select = transform(TABLE.select)
    for length, wanted in BY_LENGTH.items():
        assert_same(select(jnp.int32(length)), wanted)


def test_every_sequence_of_a_batch_gets_its_own():
    lengths = np.array([[129, 1024], [1, 256]], np.int32)
    wanted = stack([stack([MIDDLE, LONG]), stack([SHORT, MIDDLE])])
    assert_same(TABLE.select(lengths), wanted)
    assert_same(jax.jit(lambda table, lengths: table.select(lengths))(TABLE, lengths), wanted)
    assert_same(jax.vmap(TABLE.select)(lengths), wanted)


def test_gradients_reach_the_entries_that_were_chosen():
    lengths, weights = np.array([100, 1000, 1001]), np.array([1.0, 10.0, 100.0], np.float32)

    @jax.jit
    @jax.grad
    def gradient(leaves):
        lam, mscale = leaves
        factors = FactorTable(TABLE.boundaries, RopeFactors(lam, TABLE.factors.n_hat, mscale)).select(lengths)
        return jnp.sum(weights[:, None] * factors.lam) + jnp.sum(weights * factors.mscale**2)

    lam, mscale = gradient((TABLE.factors.lam, TABLE.factors.mscale))
    np.testing.assert_allclose(lam, np.repeat([[1.0], [0.0], [110.0]], 4, axis=1))
    np.testing.assert_allclose(mscale, [2 * 1.0, 0, 2 * 110 * 1.3], rtol=1e-6)


def test_it_is_one_gather():
    text = str(jax.make_jaxpr(lambda table, lengths: table.select(lengths))(TABLE, jnp.array([3, 500])))
    assert len(re.findall(r"\bgather\[", text)) == 1
    assert not re.search(r"\b(cond|while|scan|dynamic_slice)\[", text)


def test_a_traced_length_beyond_the_last_boundary_has_no_numbers():
    factors = jax.jit(TABLE.select)(jnp.array([1024, 1025, 2**31 - 1]))
    assert np.isfinite(factors.lam[0]).all() and np.isfinite(factors.mscale[0])
    assert np.isnan(factors.lam[1:]).all() and np.isnan(factors.mscale[1:]).all()


@pytest.mark.parametrize("length", [1025, np.array([3, 1025]), jnp.int32(1025)], ids=["int", "array", "device"])
def test_a_known_length_beyond_the_last_boundary_is_refused_by_name(length):
    message = "a sequence of 1025 tokens is beyond this table's last boundary, 1024; it has 128, 256, 1024"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        TABLE.select(length)


def test_a_table_of_what_methods_return():
    table = FactorTable.of({128: unscaled(8), 1024: linear(8, 8)})
    assert_same(table.select(200), jax.device_get(linear(8, 8)))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_the_same_numbers(tmp_path):
    lam = np.sort(np.exp(np.random.default_rng(0).uniform(0, 6, (3, 64))).astype(np.float32), axis=1)
    lam[0, 0] = np.nextafter(np.float32(1), np.float32(2))
    entries = {
        128: make_factors(lam[0]),
        8192: make_factors(lam[1], 3, 1.1902381),
        2**21: make_factors(lam[2], 256, 1.3),
    }
    table = FactorTable.of(entries)
    save_table(tmp_path / "table.json", table, stage="table", sources={"128": "original"})
    for head_dim in (None, 128):
        jax.tree.map(
            lambda got, wanted: np.testing.assert_array_equal(got, wanted, strict=True),
            load_table(tmp_path / "table.json", head_dim),
            table,
        )
    metadata = json.loads((tmp_path / "table.json").read_text())["metadata"]
    assert metadata == {"stage": "table", "sources": {"128": "original"}}


def test_a_table_is_json_only(tmp_path):
    with pytest.raises(ValueError, match=r"t\.csv: a table of factors is stored in a \.json file"):
        save_table(tmp_path / "t.csv", TABLE)


def entry(**replaced):
    good = {"boundary": 128, "lam": [1.0, 2.0], "n_hat": 4, "mscale": 1.5}
    return {key: value for key, value in (good | replaced).items() if value is not None}


def file_of(*entries, **replaced):
    return json.dumps({"format": "longrope_jax.factor_table", "entries": list(entries), "metadata": {}} | replaced)


MALFORMED = {
    "text": ("hello", "Expecting value"),
    "plain factors": (json.dumps({"format": "longrope_jax.factors", **entry()}), "not a factors file.*factor_table"),
    "no entries": (file_of(), "needs one boundary"),
    "entries no list": (file_of(entries={"128": {}}), "entries = .* must be a list, of an object each"),
    "entry no object": (file_of(3), "entries = .* must be a list, of an object each"),
    "entries missing": (json.dumps({"format": "longrope_jax.factor_table"}), "'entries' is missing"),
    "no boundary": (file_of(entry(boundary=None)), "boundary = None must be a positive whole number"),
    "boundary text": (file_of(entry(boundary="128")), "boundary = '128' must be a positive whole number"),
    "boundary zero": (file_of(entry(boundary=0)), "boundary = 0 must be a positive whole number"),
    "part of a token": (file_of(entry(boundary=1.5)), "boundary = 1.5 must be a positive whole number"),
    "boundary twice": (file_of(entry(), entry(lam=[1.0, 3.0])), "a boundary occurs twice"),
    "boundary nan": (file_of(entry(boundary=float("nan"))), "boundary = nan must be a positive whole number"),
    "lam missing": (file_of(entry(lam=None)), "lam = None"),
    "n_hat missing": (file_of(entry(), entry(boundary=256, n_hat=None)), "n_hat = None"),
    "mscale missing": (file_of(entry(mscale=None)), "mscale = None"),
    "lam below 1": (file_of(entry(lam=[0.5, 2])), r"boundary 128: lam\[0\] = 0.5 is below 1"),
    "heads differ": (file_of(entry(), entry(boundary=256, lam=[1, 2, 3])), "boundary 256: lam has 3 factors"),
}


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_name_the_file_and_what_is_wrong(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json: .*{message}"):
        load_table(tmp_path / "bad.json")


def test_a_table_for_another_model_is_refused(tmp_path):
    save_table(tmp_path / "t.json", TABLE)
    with pytest.raises(ValueError, match=r"t\.json: lam has 4 factors; a head dimension of 128 needs 64"):
        load_table(tmp_path / "t.json", head_dim=128)
