import json
import re
from itertools import islice

import numpy as np
import pytest

from longrope_jax.data.corpus import Document
from longrope_jax.data.windows import fixed_windows, training_batches

LENGTHS = (30, 3, 12, 5, 50, 4, 17)  # tokens; windows of 4 tokens: 7, 0, 2, 1, 12, 0, 4


def make_documents(lengths=LENGTHS):
    """Every token of every document is a different, consecutive number, so a window says where it was cut."""
    starts = np.cumsum([0, *lengths]) + 100 * np.arange(len(lengths) + 1)
    return [
        Document(f"document {i}", np.arange(start, start + length, dtype=np.uint16), length)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


def all_windows(documents, length):
    """First tokens of the windows that begin at the multiples of the length."""
    first_tokens = []
    for document in documents:
        start = 0
        while start + length + 1 <= len(document.tokens):
            first_tokens.append(int(document.tokens[start]))
            start += length
    return first_tokens


def rows(batches, count):
    return np.concatenate(list(islice(batches, count)))


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "batch"), [(4, 5), (4, 26), (16, 3), (1, 7)])
def test_batches_are_contiguous_slices_of_documents(length, batch):
    documents = make_documents()
    batches = list(islice(training_batches(documents, length, batch, seed=0), 10))
    assert {(block.shape, block.dtype.name) for block in batches} == {((batch, length + 1), "int32")}
    text = {int(token): document.name for document in documents for token in document.tokens}
    for row in np.concatenate(batches):
        np.testing.assert_array_equal(row, np.arange(row[0], row[0] + length + 1))
        assert len({text[int(token)] for token in row}) == 1


@pytest.mark.parametrize(("length", "batch"), [(4, 2), (4, 4), (3, 5), (16, 2)])
def test_every_epoch_has_every_window_once(length, batch):
    documents = make_documents()
    expected = sorted(all_windows(documents, length))
    epochs = 4 * batch  # a whole number of batches, even where epochs end within one
    seen = rows(training_batches(documents, length, batch, seed=3), epochs * len(expected) // batch)[:, 0]
    for epoch in seen.reshape(epochs, -1):
        assert sorted(epoch.tolist()) == expected


def test_every_epoch_is_shuffled_anew():
    documents = make_documents()
    windows = all_windows(documents, 4)
    seen = rows(training_batches(documents, 4, 2, seed=0), 5 * len(windows) // 2)[:, 0]
    orders = {tuple(epoch) for epoch in seen.reshape(5, -1).tolist()}
    assert len(orders | {tuple(windows), tuple(sorted(windows))}) == 6


def test_same_seed_same_batches_and_another_seed_others():
    documents = make_documents()
    first, again, other = (rows(training_batches(documents, 4, 3, seed), 20) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("done", [0, 6, 7, 20])  # 26 windows, so epochs of 6.5 batches
def test_set_state_goes_on_exactly_there(done):
    documents = make_documents()
    batches = training_batches(documents, 4, 4, seed=5)
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))  # it is kept in a JSON record
    expected = rows(batches, 15)

    batches.set_state(state)
    np.testing.assert_array_equal(rows(batches, 15), expected)

    fresh = training_batches(documents, 4, 4, seed=5)
    fresh.set_state(state)
    np.testing.assert_array_equal(rows(fresh, 15), expected)


def test_a_batch_may_be_exactly_as_large_as_the_epoch():
    documents = make_documents()
    block = next(training_batches(documents, 4, 26, seed=0))
    assert sorted(block[:, 0].tolist()) == sorted(all_windows(documents, 4))


@pytest.mark.parametrize(
    ("length", "batch", "message"),
    [
        (4, 27, "the 7 training documents hold 26 windows of 4 tokens, fewer than a batch of 27"),
        (50, 1, "the 7 training documents hold 0 windows of 50 tokens, fewer than a batch of 1"),
    ],
)
def test_fewer_windows_than_a_batch_is_an_error(length, batch, message):
    with pytest.raises(ValueError, match=message):
        training_batches(make_documents(), length, batch, seed=0)


# --- fixed windows -------------------------------------------------------------------------------------------------


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
