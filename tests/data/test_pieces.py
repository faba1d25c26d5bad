import numpy as np
import pytest

from longrope_jax.data.corpus import Document
from longrope_jax.data.sequences import cut, segments

BOS, EOS = 60000, 60001


def document_of(text):
    return Document("name", np.array([BOS, *text, EOS], np.uint16), len(text))


def texts_of(pieces, documents):
    return [documents[i].tokens[start:stop].tolist() for i, start, stop in zip(*pieces, strict=True)]


def test_documents_are_cut_into_pieces_that_are_full_and_a_rest():
    documents = [document_of(range(7)), document_of(range(10, 12)), document_of(range(20, 26))]
    pieces = cut(documents, 4)  # BOS and three more
    assert texts_of(pieces, documents) == [[0, 1, 2], [3, 4, 5], [6], [10, 11], [20, 21, 22], [23, 24, 25]]
    assert pieces.documents.tolist() == [0, 0, 0, 1, 2, 2]
    assert pieces.sizes.tolist() == [4, 4, 2, 3, 4, 4]


def test_segments_are_the_full_pieces():
    documents = [document_of(range(7)), document_of(range(10, 12)), document_of(range(20, 26))]
    assert texts_of(segments(documents, 4), documents) == [[0, 1, 2], [3, 4, 5], [20, 21, 22], [23, 24, 25]]


@pytest.mark.parametrize("length", [2, 3, 10, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_no_text_is_lost_and_no_piece_is_too_long(length, seed):
    sizes = np.random.default_rng(seed).integers(1, 100, 20)
    ends = np.cumsum(sizes)
    documents = [document_of(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    pieces = cut(documents, length)
    assert sum(texts_of(pieces, documents), []) == list(range(ends[-1]))
    assert 2 <= pieces.sizes.min() <= pieces.sizes.max() <= length


@pytest.mark.parametrize("documents", [[], [document_of([])]])
def test_without_text_there_are_no_pieces(documents):
    assert [field.tolist() for field in cut(documents, 4)] == [[], [], []]
    assert len(segments(documents, 4).sizes) == 0
