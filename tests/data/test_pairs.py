"""Planted key-value pairs: where they are, how far apart, and how they are found again."""

import io
import re

import numpy as np
import pytest
import scipy.stats

from longrope_jax.data.corpus import DataSettings, Document
from longrope_jax.data.pairs import DIGITS, MARK, find_answers, plant
from longrope_jax.data.sources import open_source, read_documents
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.search.objective import TermSettings, make_terms

LINES = b"".join(b"line %d of a text\n" % number for number in range(20_000))
PAIR = re.compile(rb"([A-Z][a-z]+) = (\d{7})\n?")


def distances_in(text):
    """(Place of a number, distance from the same number in the last line with its city), reading line by line."""
    before, found, place = {}, [], 0
    for line in text.splitlines(keepends=True):
        if pair := PAIR.fullmatch(line):
            start = place + pair.start(2)
            last, number = before.get(pair[1], (0, b""))
            found += [(start, start - last)] if number == pair[2] else []
            before[pair[1]] = start, pair[2]
        place += len(line)
    return found


def test_pairs_come_back_at_log_uniform_distances_between_the_lines_of_the_text():
    name, text = plant("a", LINES, 1.0, 0.4, (64, 4096))
    assert name == "a" + MARK
    lines = text.splitlines(keepends=True)
    pairs = [line for line in lines if PAIR.fullmatch(line)]
    assert b"".join(line for line in lines if not PAIR.fullmatch(line)) == LINES
    assert 0.35 < sum(map(len, pairs)) / len(text) < 0.45
    assert all(len(set(PAIR.fullmatch(pair)[2])) == DIGITS for pair in pairs)
    far = np.log([distance for _, distance in distances_in(text)])
    # A distance ends with a line: up to 17 bytes of text, and the pairs that are due there too, are added.
    assert far.min() >= np.log(64) and np.exp(far.max()) < 4096 + 300
    uniform = scipy.stats.uniform(np.log(64), np.log(4096 / 64))
    assert scipy.stats.kstest(far, uniform.cdf).statistic < 0.12


def test_a_document_depends_on_its_name_only_and_a_share_of_them_has_pairs():
    first, again, other = (plant(name, LINES[:3000], 1.0, 0.4, (64, 4096))[1] for name in "aab")
    assert first == again != other
    assert plant("a", LINES, 0.0, 0.4, (64, 4096)) == ("a", LINES)
    planted = [plant(str(number), LINES[:1000], 0.3, 0.8, (1, 2))[0].endswith(MARK) for number in range(1000)]
    assert 0.25 < np.mean(planted) < 0.35


@pytest.mark.parametrize("text", [b"", b"one line", b"one line\n", b"two\nlines", b"a\rb\nc\n", b"a\r\nb\r\n"])
def test_short_texts(text):
    name, found = plant("a", text, 1.0, 0.4, (1, 2))
    assert b"".join(line for line in io.BytesIO(found) if not PAIR.fullmatch(line)) == text
    assert name.endswith(MARK) == (found != text)


def test_answers_are_the_values_of_pairs_that_the_row_has_before():
    text = np.frombuffer(plant("a", LINES, 1.0, 0.4, (32, 512))[1], np.uint8)
    rows = np.stack([text[:5000], text[5000:10_000], text[:5000]])
    found = find_answers(["a" + MARK, "a" + MARK, "a"], rows)
    wanted = [(row, place, far) for row in (0, 1) for place, far in distances_in(rows[row].tobytes())]
    assert list(zip(*found, strict=True)) == wanted and len(wanted) > 100
    targets = rows[:, 1:][found.places()]
    assert all(bytes(value).isdigit() and len(set(value)) == DIGITS for value in targets)
    assert find_answers(["a"], rows).places()[1].shape == (0, DIGITS)


def test_a_source_has_pairs_in_all_its_splits(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(LINES[: 1000 + number])
    folder, data = str(tmp_path / "texts"), tmp_path / "data"
    plain = open_source(DataSettings(folder=folder), data)
    mixed = read_documents(DataSettings(folder=folder, pair_share=0.5), data)
    for split, texts in open_source(DataSettings(folder=folder, pair_share=0.5), data).items():
        wanted = [plant(*document, 0.5, 0.4, (32, 8192)) for document in plain[split].read(0, len(texts))]
        assert list(texts.read(0, len(texts))) == wanted
        read = [(document.name, ByteTokenizer().decode(document.tokens), document.size) for document in mixed[split]]
        assert read == [(name, text.decode(errors="replace"), len(text)) for name, text in wanted]
    marked = [document.name.endswith(MARK) for documents in mixed.values() for document in documents]
    assert 10 < sum(marked) < 30


def test_only_values_count_in_the_objective_of_pairs():
    texts = [plant(name, LINES[:30_000], 1.0, 0.4, (32, 512)) for name in "abc"] + [("plain", LINES)]
    documents = [Document(name, np.frombuffer(text, np.uint8), len(text)) for name, text in texts]
    (term,) = make_terms({"far": TermSettings("pairs")}, documents, ByteTokenizer(), 600, 3, 0).values()
    assert term.tokens.shape == (3, 601) and "plain" not in term.names
    for tokens, weights in zip(term.tokens, term.weights, strict=True):
        counting = bytes(tokens[1:][weights > 0].astype(np.uint8))
        assert len(counting) == DIGITS * len(distances_in(tokens.astype(np.uint8).tobytes()))
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="^objective.far: no document has pairs; set pair_share"):
        make_terms({"far": TermSettings("pairs")}, documents[3:], ByteTokenizer(), 600, 3, 0)
    with pytest.raises(ValueError, match="^objective.far: length = 40: the window of '.+' has no pair twice"):
        make_terms({"far": TermSettings("pairs")}, documents, ByteTokenizer(), 40, 3, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pair_share", 1.5),
        ("pair_share", -0.1),
        ("pair_density", 0.95),
        ("pair_density", 0.0),
        ("pair_distances", (5,)),
        ("pair_distances", (9, 5)),
        ("pair_distances", (0, 5)),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"^{field} = "):
        DataSettings(**{field: value})
