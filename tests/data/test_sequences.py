import jax
import numpy as np

from longrope_jax.data.corpus import Document
from longrope_jax.data.pieces import Pieces
from longrope_jax.data.sequences import IGNORED, DisjointWindows, PackedPieces, bookended

BOS, EOS = 60000, 60001


def test_texts_follow_each_other_between_bos_and_eos():
    row = bookended([np.array([1, 2, 3], np.uint16), np.array([7], np.uint16)], 8, 4, BOS, EOS)
    assert row.tokens.tolist() == [BOS, 1, 2, 3, BOS, 7, 0, 0]
    assert row.targets.tolist() == [1, 2, 3, EOS, 7, EOS, IGNORED, IGNORED]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert row.context == 4
    assert {leaf.dtype.name for leaf in row} == {"int32"}


def test_a_row_may_be_full():
    row = bookended([np.array([1, 2, 3])], 4, 4, BOS, EOS)
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


def test_a_batch_goes_through_jit_with_and_without_segments():
    row = bookended([np.array([1, 2, 3])], 6, 4, BOS, EOS)
    for batch in (row, row._replace(segment_ids=None)):
        result = jax.jit(lambda batch: batch)(batch)
        jax.tree.map(np.testing.assert_array_equal, result, batch)
