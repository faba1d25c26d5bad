import json
import re

import jax
import numpy as np
import pytest

from longrope_jax.rope import RopeFactors, load_factors, load_metadata, save_factors, stack, yarn


def make_factors(lam=(1.0, 1.5, 2.0, 4.0), n_hat=0, mscale=1.0):
    return RopeFactors(np.asarray(lam, np.float32), np.int32(n_hat), np.float32(mscale))


def awkward_lam(half=64, seed=0):
    """Float32 numbers that have no short decimal form, from just above 1 to several hundred."""
    lam = np.sort(np.exp(np.random.default_rng(seed).uniform(0, 6.5, half))).astype(np.float32)
    lam[0] = np.nextafter(np.float32(1), np.float32(2))
    return lam


def assert_same(got, wanted):
    for name in ("lam", "n_hat", "mscale"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name, strict=True)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*numbers):
    return "".join(f"{number}\n" for number in numbers)


def content(**replaced):
    """A good JSON file, but for what is replaced; None takes a key away."""
    good = {"format": "longrope_jax.factors", "lam": [1.0, 2.0], "n_hat": 4, "mscale": 1.5, "metadata": {}}
    return json.dumps({key: value for key, value in (good | replaced).items() if value is not None})


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_hat", [0, 1, 256])
@pytest.mark.parametrize(("suffix", "mscale"), [(".json", 1.1902381), (".json", 1), (".csv", 1)])
def test_files_give_back_the_same_float32(tmp_path, suffix, mscale, n_hat):
    factors, path = make_factors(awkward_lam(), n_hat, mscale), tmp_path / f"factors{suffix}"
    save_factors(path, factors)
    assert_same(load_factors(path), factors)
    assert_same(load_factors(path, head_dim=128), factors)


def test_factors_of_a_method_on_the_device_and_a_path_as_text(tmp_path):
    path = str(tmp_path / "yarn.json")
    save_factors(path, yarn(64, 8))
    assert_same(load_factors(path, head_dim=64), jax.device_get(yarn(64, 8)))


def test_an_odd_number_of_pairs_is_not_written_to_csv(tmp_path):
    with pytest.raises(ValueError, match="odd number"):
        save_factors(tmp_path / "odd.csv", make_factors((1.0, 2.0, 3.0)))


def test_csv_is_what_the_released_search_writes(tmp_path):
    save_factors(tmp_path / "plain.csv", make_factors())
    assert (tmp_path / "plain.csv").read_text() == "1.0\n1.5\n2.0\n4.0\n"
    save_factors(tmp_path / "start.csv", make_factors(n_hat=16))
    assert (tmp_path / "start.csv").read_text() == "16\n1.0\n1.5\n2.0\n4.0\n"


def test_metadata_comes_back(tmp_path):
    metadata = {"method": "search", "target_length": 131072, "scores": {"65536": 7.25}, "provenance": ["a", None]}
    save_factors(tmp_path / "factors.json", make_factors(), **metadata)
    assert load_metadata(tmp_path / "factors.json") == metadata
    assert_same(load_factors(tmp_path / "factors.json"), make_factors())


def test_no_metadata_is_an_empty_dict(tmp_path):
    save_factors(tmp_path / "factors.json", make_factors())
    assert load_metadata(tmp_path / "factors.json") == {}
    assert load_metadata(write(tmp_path / "bare.json", content(metadata=None))) == {}


# --- CSV layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [None, 8])
@pytest.mark.parametrize(
    "text",
    [
        "1,1.5,2,4\n" * 3,
        "1.0,1.50,2.00,4.0\n1,1.5,2,4",
        "1, 1.5, 2, 4,\n\n1, 1.5, 2, 4,\n",
        "1,1.5,2,4",
        "1\r\n1.5\r\n2\r\n4\r\n",
        "\n 1\n1.5\n\n2\n4\n\n",
        "1.0 1.5 2.0 4.0\n" * 3,
        " 1.000  1.500\t2.000 4.000 \n1 1.5 2 4",
    ],
    ids=[
        "rows",
        "same numbers in other digits",
        "spaces and blank lines",
        "one row",
        "windows",
        "column with blanks",
        "release",
        "blanks",
    ],
)
def test_csv_layouts(tmp_path, text, head_dim):
    assert_same(load_factors(write(tmp_path / "f.csv", text), head_dim), make_factors())


@pytest.mark.parametrize("head_dim", [None, 8])
@pytest.mark.parametrize(
    "text", ["12\n1\n1.5\n2\n4\n", "12.0,1,1.5,2,4\n" * 2, "12 1 1.5 2 4"], ids=["column", "rows", "blanks"]
)
def test_csv_with_one_number_more_has_n_hat_first(tmp_path, text, head_dim):
    assert_same(load_factors(write(tmp_path / "f.csv", text), head_dim), make_factors(n_hat=12))


def test_head_dim_decides_about_the_first_number(tmp_path):
    path = write(tmp_path / "f.csv", lines(1, 2, 3, 4))
    assert_same(load_factors(path), make_factors((1, 2, 3, 4)))
    assert_same(load_factors(path, head_dim=8), make_factors((1, 2, 3, 4)))
    assert_same(load_factors(path, head_dim=6), make_factors((2, 3, 4), n_hat=1))
    path = write(tmp_path / "odd.csv", lines(1, 2, 3))
    assert_same(load_factors(path), make_factors((2, 3), n_hat=1))
    assert_same(load_factors(path, head_dim=6), make_factors((1, 2, 3)))


def test_rows_that_differ_are_refused(tmp_path):
    path = write(tmp_path / "layers.csv", "1,2,3,4\n1,2,3,4\n1,2,3,5\n")
    with pytest.raises(ValueError, match=r"layers\.csv: row 2 differs from row 0; .* by layer are not supported"):
        load_factors(path)


def test_rows_of_different_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layers\.csv: row 1 differs from row 0"):
        load_factors(write(tmp_path / "layers.csv", "1,2,3,4\n1,2,3\n"))


@pytest.mark.parametrize(("name", "text"), [("f.csv", lines(1, 3, 2, 4)), ("f.json", content(lam=[1, 3, 2, 4]))])
def test_falling_factors_made_elsewhere_only_warn(tmp_path, name, text):
    path = write(tmp_path / name, text)
    with pytest.warns(UserWarning, match=r"lam\[2\] = 2\.0 is smaller"):
        np.testing.assert_array_equal(load_factors(path).lam, [1, 3, 2, 4])


# --- malformed files --------------------------------------------------------------------------------------------------

MALFORMED = {
    "empty csv": ("f.csv", "", "empty"),
    "blank csv": ("f.csv", "\n ,\n", "empty"),
    "text csv": ("f.csv", "hello\nworld\n", "'hello'.*numbers only"),
    "csv header": ("f.csv", "lam\n1\n2\n", "'lam'.*numbers only"),
    "json in csv": ("f.csv", content(), "numbers only"),
    "bytes csv": ("f.csv", b"\xff\xfe1\n", "decode"),
    "nan csv": ("f.csv", lines(1, "nan", 3, 4), "'nan' is no number"),
    "nan n_hat csv": ("f.csv", lines("nan", 1, 2), "'nan' is no number"),
    "infinite csv": ("f.csv", lines(1, 2, 3, "inf"), "'inf' is no number"),
    "lam below 1 csv": ("f.csv", lines(1, 2, 0.5, 4), r"lam\[2\] = 0\.5 is below 1"),
    "negative n_hat csv": ("f.csv", lines(-4, 1, 2), "n_hat = -4 is not a number"),
    "fractional n_hat csv": ("f.csv", lines(1.5, 2, 3), "n_hat = 1.5 must be a whole number"),
    "n_hat only csv": ("f.csv", lines(5), "lam has shape"),
    "empty json": ("f.json", "", "Expecting value"),
    "text json": ("f.json", "hello", "Expecting value"),
    "csv in json": ("f.json", "1\n2\n", "Extra data"),
    "cut off json": ("f.json", content()[:-5], "delimiter|Expecting|Unterminated"),
    "bytes json": ("f.json", b"\xff\xfe", "decode"),
    "list json": ("f.json", "[1, 2]", "must hold a JSON object"),
    "other json": ("f.json", '{"lam": [1, 2], "n_hat": 0, "mscale": 1}', "not a factors file"),
    "other format json": ("f.json", content(format="other"), "not a factors file"),
    "lam missing": ("f.json", content(lam=None), "lam = None"),
    "n_hat missing": ("f.json", content(n_hat=None), "n_hat = None"),
    "mscale missing": ("f.json", content(mscale=None), "mscale = None"),
    "nan json": ("f.json", content(lam=[1, float("nan")]), "lam = .* must be a list of numbers"),
    "infinite json": ("f.json", content(lam=[1, float("inf")]), "lam = .* must be a list of numbers"),
    "text lam json": ("f.json", content(lam="1, 2"), "lam = .* must be a list of numbers"),
    "text in lam json": ("f.json", content(lam=[1, "2"]), "lam = .* must be a list of numbers"),
    "true in lam json": ("f.json", content(lam=[True, 2]), "lam = .* must be a list of numbers"),
    "batched json": ("f.json", content(lam=[[1, 2], [1, 2]]), "lam = .* must be a list of numbers"),
    "no lam json": ("f.json", content(lam=[]), "lam has shape"),
    "lam below 1 json": ("f.json", content(lam=[0.99, 2]), r"lam\[0\] = 0\.99.* is below 1"),
    "lam beyond float32 json": ("f.json", content(lam=[1, 1e39]), "lam = .* must be a list of numbers below"),
    "negative n_hat json": ("f.json", content(n_hat=-1), "n_hat = -1 is not a number"),
    "fractional n_hat json": ("f.json", content(n_hat=1.5), "n_hat = 1.5 must be a whole number"),
    "nan n_hat json": ("f.json", content(n_hat=float("nan")), "n_hat = nan must be a whole number"),
    "text n_hat json": ("f.json", content(n_hat="4"), "n_hat = '4' must be a whole number"),
    "nan mscale json": ("f.json", content(mscale=float("nan")), "mscale = nan must be a number"),
    "zero mscale json": ("f.json", content(mscale=0), "mscale = 0.0 is not a positive number"),
    "wrong suffix": ("f.txt", lines(1, 2), r"\.json or \.csv"),
    "no suffix": ("f", content(), r"\.json or \.csv"),
}

# Readers and conversions raise other exceptions than ValueError for these.
OUT_OF_RANGE = {
    "infinite n_hat csv": ("f.csv", lines("inf", 1, 2)),
    "n_hat beyond int32 csv": ("f.csv", lines("1e12", 1, 2)),
    "very long line csv": ("f.csv", "x" * 200_000),
    "nested too deep json": ("f.json", "[" * 100_000),
    "n_hat beyond int32 json": ("f.json", content(n_hat=3_000_000_000)),
    "integer beyond float64 json": ("f.json", content(lam=[1, 10**400])),
}


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize(("name", "text", "why"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_are_named_with_a_reason(tmp_path, name, text, why):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=f"(?s)^{re.escape(str(path))}: .*{why}"):
        load_factors(path)


@pytest.mark.parametrize(("name", "text"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_numbers_out_of_range_are_named_as_well(tmp_path, name, text):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
        load_factors(path)


@pytest.mark.parametrize(
    ("name", "text", "head_dim"),
    [
        ("f.json", content(), 8),
        ("f.json", content(), 2),
        ("f.csv", lines(1, 2), 8),
        ("f.csv", lines(1, 2, 3, 4), 4),
        ("f.csv", lines(8, 1, 2, 3, 4), 16),
    ],
)
def test_factors_of_another_model_are_refused(tmp_path, name, text, head_dim):
    path = write(tmp_path / name, text)
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))}: .*head dimension of {head_dim} needs {head_dim // 2}"
    ):
        load_factors(path, head_dim)


@pytest.mark.parametrize("text", ["", "[1]", content(format="other")], ids=["empty", "list", "other format"])
def test_metadata_of_another_file_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="not a factors file|Expecting value|must hold a JSON object"):
        load_metadata(write(tmp_path / "f.json", text))


@pytest.mark.parametrize("text", ["", "[1]", content(format="other")], ids=["empty", "list", "other format"])
def test_load_metadata_names_the_file(tmp_path, text):
    path = write(tmp_path / "f.json", text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
        load_metadata(path)


@pytest.mark.parametrize("load", [load_factors, load_metadata])
def test_a_missing_file_is_named(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load(tmp_path / "nowhere.json")


# --- what is not written ----------------------------------------------------------------------------------------------

UNWRITABLE = {
    "mscale in csv": ("f.csv", make_factors(mscale=1.25), {}, "no place for metadata or an mscale of 1.25"),
    "metadata in csv": ("f.csv", make_factors(), {"method": "yarn"}, "no place for metadata"),
    "other suffix": ("f.txt", make_factors(), {}, r"\.json or \.csv"),
    "population in json": ("f.json", stack([make_factors()] * 2), {}, r"one set of factors, these have shape \(2, 4\)"),
    "population in csv": ("f.csv", stack([make_factors()] * 2), {}, r"one set of factors, these have shape \(2, 4\)"),
    "falling": ("f.json", make_factors((1, 3, 2, 4)), {}, r"lam\[2\] = 2\.0 is smaller than its predecessor"),
    "below 1": ("f.csv", make_factors((0.5, 2)), {}, r"lam\[0\] = 0\.5 is below 1"),
    "nan": ("f.json", make_factors((1, np.nan)), {}, r"lam\[1\] = nan is not finite"),
    "negative n_hat": ("f.json", make_factors(n_hat=-1), {}, "n_hat = -1 is not a number"),
}


@pytest.mark.parametrize(("name", "factors", "metadata", "why"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_a_file_cannot_hold_is_refused_and_nothing_written(tmp_path, name, factors, metadata, why):
    with pytest.raises(ValueError, match=why):
        save_factors(tmp_path / name, factors, **metadata)
    assert list(tmp_path.iterdir()) == []
