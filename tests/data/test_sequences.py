import re

import jax
import numpy as np
import pytest

from longrope_jax.data.corpus import Document
from longrope_jax.data.sequences import IGNORED, DisjointWindows, NeedleRows, PackedPieces, Pieces, pack_texts
from longrope_jax.data.tokenizer import ByteTokenizer

BOS, EOS = 60000, 60001


def test_texts_follow_each_other_between_bos_and_eos():
    row = pack_texts([np.array([1, 2, 3], np.uint16), np.array([7], np.uint16)], 8, 4, BOS, EOS)
    assert row.tokens.tolist() == [BOS, 1, 2, 3, BOS, 7, 0, 0]
    assert row.targets.tolist() == [1, 2, 3, EOS, 7, EOS, IGNORED, IGNORED]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert row.context == 4
    assert {leaf.dtype.name for leaf in row} == {"int32"}


def test_a_row_may_be_full():
    row = pack_texts([np.array([1, 2, 3])], 4, 4, BOS, EOS)
    assert row.targets.tolist() == [1, 2, 3, EOS]
    assert row.segment_ids.tolist() == [1, 1, 1, 1]


def test_a_bin_is_its_pieces_in_order():
    document = Document("name", np.arange(20, dtype=np.uint16), 20)
    pieces = Pieces(np.array([0, 0, 0]), np.array([1, 4, 9]), np.array([4, 6, 11]))
    rows = PackedPieces([document], pieces, [[2, 0], [1]], length=7, context=5, bos=BOS, eos=EOS)
    assert len(rows) == 2
    assert rows[0].tokens.tolist() == [BOS, 9, 10, BOS, 1, 2, 3]
    assert rows[1].targets.tolist() == [4, 5, EOS] + [IGNORED] * 4


def test_windows_are_rows_without_segments():
    documents = [Document("name", np.arange(start, start + 9, dtype=np.uint16), 9) for start in (0, 100)]
    windows = DisjointWindows(documents, 4)
    assert len(windows) == 4
    row = windows[3]
    assert row.tokens.tolist() == [104, 105, 106, 107]
    assert row.targets.tolist() == [105, 106, 107, 108]
    assert row.positions.tolist() == [0, 1, 2, 3]
    assert row.segment_ids is None
    assert row.context == 4


def test_a_document_without_a_token_is_no_window():
    documents = [Document("name", np.arange(size, dtype=np.uint16), size) for size in (0, 9, 0, 5)]
    windows = DisjointWindows(documents, 4)
    assert [windows[row].tokens[0] for row in range(len(windows))] == [0, 4, 0]


def test_a_batch_goes_through_jit_with_and_without_segments():
    row = pack_texts([np.array([1, 2, 3])], 6, 4, BOS, EOS)
    for batch in (row, row._replace(segment_ids=None)):
        result = jax.jit(lambda batch: batch)(batch)
        jax.tree.map(np.testing.assert_array_equal, result, batch)


TOKENIZER = ByteTokenizer()
NEEDLE = re.compile(r"\nThe magic number of (\w+) is (\d{7})\.\n")


def make_stories():
    """Texts in which any stretch of some bytes is found once; the last is too short for most rows."""
    sizes = {"a": 99, "b": 50, "c": 3}
    texts = ["".join(f"{name}{number} ran.\n" for number in range(count)) for name, count in sizes.items()]
    return texts, [Document(text[0], TOKENIZER.encode(text), len(text)) for text in texts]


def text_of(row):
    return TOKENIZER.decode(np.append(row.tokens, row.targets[-1]))


def words(text):
    """A text without line breaks, which needles bring along, and without needles."""
    return re.sub(r"The magic number of \w+ is \d{7}\.", "", text).replace("\n", "")


def test_a_needle_row_is_text_with_a_needle_and_ends_with_the_answer():
    texts, documents = make_stories()
    rows, owners, places = NeedleRows(documents, 128, TOKENIZER, seed=0), set(), set()
    for index in range(40):
        row = rows[index]
        assert row.tokens.shape == row.targets.shape == (128,)
        np.testing.assert_array_equal(row.tokens[1:], row.targets[:-1])
        assert row.tokens[0] == TOKENIZER.bos
        assert row.positions.tolist() == list(range(128))
        assert (row.segment_ids, row.context) == (None, 128)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(row)} == {"int32"}
        text = text_of(row)
        [(city, number)] = set(NEEDLE.findall(text))
        asked = f"\nThe magic number of {city} is {number}"
        assert text.endswith(asked)
        [owner] = [whole[0] for whole in texts if words(text.removesuffix(asked)) in words(whole)]
        owners.add(owner)
        places.add(text.index(asked))
    assert owners == {"a", "b"}
    assert len(places) > 5


def test_needle_rows_depend_on_seed_and_number_alone():
    _, documents = make_stories()
    rows, again, other = (NeedleRows(documents, 128, TOKENIZER, seed) for seed in (1, 1, 2))
    seen = [text_of(rows[index]) for index in range(20)]
    assert [text_of(again[index]) for index in reversed(range(20))] == seen[::-1]
    assert not {text_of(other[index]) for index in range(20)} & set(seen)
    assert len({NEEDLE.search(text)[2] for text in seen}) == 20
    assert text_of(rows[10**12]) not in seen


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (77, "length = 77 tokens is too short for needles, which take 78 with question and answer"),
        (2000, "none of 3 training documents has the 2000 tokens that needles are hidden in; the longest has 883"),
    ],
)
def test_what_needles_cannot_be_made_of(length, message):
    with pytest.raises(ValueError, match=message):
        NeedleRows(make_stories()[1], length, TOKENIZER, seed=0)


def test_a_length_that_is_not_refused_is_enough_for_all_rows():
    rows = NeedleRows(make_stories()[1], 78, TOKENIZER, seed=0)
    texts = [text_of(rows[index]) for index in range(60)]
    assert sum(text.startswith("\nThe magic") for text in texts) > 5  # nothing around the needle
    assert {len(text) for text in texts} == {78}  # 79 tokens, of which BOS is no text


def test_without_documents_there_are_no_needles():
    with pytest.raises(ValueError, match="none of 0 training documents .* the longest has 0"):
        NeedleRows([], 128, TOKENIZER, seed=0)
