import re

import numpy as np
import pytest

from longrope_jax.data.corpus import Document
from longrope_jax.data.windows import fixed_windows

LENGTHS = (30, 3, 12, 5, 50, 4, 17)  # tokens; windows of 4 tokens: 7, 0, 2, 1, 12, 0, 4


def make_documents(lengths=LENGTHS):
    """Every token of every document is a different, consecutive number, so a window says where it was cut."""
    starts = np.cumsum([0, *lengths]) + 100 * np.arange(len(lengths) + 1)
    return [
        Document(f"document {i}", np.arange(start, start + length, dtype=np.uint16), length)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


@pytest.mark.parametrize(("length", "count"), [(4, 1), (4, 5), (4, 26), (11, 4), (49, 1), (1, 40)])
def test_contents_are_the_slices_at_the_starts(length, count):
    documents = {document.name: document for document in make_documents()}
    windows = fixed_windows(list(documents.values()), length, count, seed=0)
    assert windows.tokens.shape == (count, length + 1)
    assert windows.tokens.dtype == np.int32
    for tokens, name, start in zip(windows.tokens, windows.names, windows.starts, strict=True):
        np.testing.assert_array_equal(tokens, documents[name].tokens[start : start + length + 1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [3, 5])
def test_every_window_is_of_another_document_while_there_are_some(seed, count):
    windows = fixed_windows(make_documents(), 4, count, seed)
    assert len(set(windows.names)) == count


@pytest.mark.parametrize("seed", range(5))
def test_documents_take_turns_and_their_windows_are_disjoint(seed):
    documents = make_documents()
    fitting = {document.name: (len(document.tokens) - 1) // 4 for document in documents}
    windows = fixed_windows(documents, 4, 26, seed)
    turns = [windows.names[:i].count(name) for i, name in enumerate(windows.names)]
    assert turns == sorted(turns)  # nobody gives another window before everybody who can has given as many
    assert {name: windows.names.count(name) for name in fitting} == fitting
    for name in fitting:
        starts = sorted(start for start, of in zip(windows.starts, windows.names, strict=True) if of == name)
        assert all(following - start >= 4 for start, following in zip(starts, starts[1:], strict=False))


def test_a_smaller_count_is_a_prefix_of_a_larger_one():
    few, many = (fixed_windows(make_documents(), 4, count, seed=1) for count in (7, 20))
    np.testing.assert_array_equal(few.tokens, many.tokens[:7])
    assert (few.names, few.starts) == (many.names[:7], many.starts[:7])


def test_same_seed_same_windows_and_another_seed_others():
    first, again, other = (fixed_windows(make_documents(), 4, 5, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.names, first.starts) == (again.names, again.starts)
    assert (first.names, first.starts) != (other.names, other.starts)


def test_a_window_may_lie_anywhere_in_its_document():
    starts = {fixed_windows(make_documents((8,)), 4, 1, seed).starts[0] for seed in range(60)}
    assert starts == {0, 1, 2, 3}


def test_a_document_of_exactly_one_window_gives_it():
    windows = fixed_windows(make_documents((5,)), 4, 1, seed=0)
    assert windows.starts == [0]


def test_a_document_without_a_token_gives_none():
    assert fixed_windows(make_documents((0, 5, 0)), 4, 1, seed=0).names == ["document 1"]


def test_too_few_windows_are_a_warning(caplog):
    windows = fixed_windows(make_documents(), 4, 30, seed=0)
    assert len(windows.tokens) == len(windows.names) == len(windows.starts) == 26
    assert "only 26 disjoint windows of 4 tokens, 30 were asked for" in caplog.text


def test_enough_windows_are_no_warning(caplog):
    fixed_windows(make_documents(), 4, 26, seed=0)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((30, 64), "none of 2 documents has the 65 tokens of a window of 64; the longest has 64"),
        ((), "none of 0 documents has the 65 tokens of a window of 64; the longest has 0"),
    ],
)
def test_no_document_long_enough_is_an_error(lengths, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fixed_windows(make_documents(lengths), 64, 3, seed=0)
