"""Batches to train from scratch on: windows, and needles among them."""

import json
import re
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from numbered_documents import assert_equal, joined, make_documents, rows_of

from longrope_jax.data.batches import pretraining_batches
from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer


def all_windows(documents, length):
    """First tokens of the windows that begin at the multiples of the length."""
    first_tokens = []
    for document in documents:
        start = 0
        while start + length + 1 <= len(document.tokens):
            first_tokens.append(int(document.tokens[start]))
            start += length
    return first_tokens


def first_tokens(batches, count):
    return np.concatenate([batch.tokens[:, 0] for batch in islice(batches, count)])


@pytest.mark.parametrize(("length", "batch"), [(4, 5), (4, 26), (16, 3), (1, 7)])
def test_windows_are_contiguous_slices_of_documents(length, batch):
    documents = make_documents()
    text = {int(token): document.name for document in documents for token in document.tokens}
    for row in rows_of(pretraining_batches(documents, length, batch, seed=0), 10):
        np.testing.assert_array_equal(row.tokens, np.arange(row.tokens[0], row.tokens[0] + length))
        np.testing.assert_array_equal(row.targets, row.tokens + 1)
        np.testing.assert_array_equal(row.positions, np.arange(length))
        assert row.context == length
        assert len({text[int(token)] for token in [*row.tokens, row.targets[-1]]}) == 1


@pytest.mark.parametrize(("length", "batch"), [(4, 2), (4, 4), (3, 5), (16, 2)])
def test_every_epoch_has_every_window_once(length, batch):
    documents = make_documents()
    expected = sorted(all_windows(documents, length))
    epochs = 4 * batch  # a whole number of batches, even where epochs end within one
    seen = first_tokens(pretraining_batches(documents, length, batch, seed=3), epochs * len(expected) // batch)
    for epoch in seen.reshape(epochs, -1):
        assert sorted(epoch.tolist()) == expected


def test_every_epoch_is_shuffled_anew():
    documents = make_documents()
    windows = all_windows(documents, 4)
    seen = first_tokens(pretraining_batches(documents, 4, 2, seed=0), 5 * len(windows) // 2)
    orders = {tuple(epoch) for epoch in seen.reshape(5, -1).tolist()}
    assert len(orders | {tuple(windows), tuple(sorted(windows))}) == 6


def test_the_order_of_a_seed_stays_what_it_was():
    """A run that was begun by an earlier version goes on with the same data."""
    seen = first_tokens(pretraining_batches(make_documents(), 4, 6, seed=7), 5)
    assert seen.tolist() == [
        233,
        345,
        0,
        237,
        466,
        490,
        478,
        24,
        450,
        704,
        12,
        486,
        20,
        8,
        16,
        474,
        494,
        482,
        454,
        458,
        470,
        462,
        716,
        708,
        4,
        712,
        24,
        458,
        490,
        462,
    ]


def test_a_batch_may_be_exactly_as_large_as_the_epoch():
    documents = make_documents()
    batch = next(pretraining_batches(documents, 4, 26, seed=0))
    assert sorted(batch.tokens[:, 0].tolist()) == sorted(all_windows(documents, 4))


@pytest.mark.parametrize(
    ("length", "batch", "message"),
    [
        (4, 27, "the 7 training documents hold 26 windows of 4 tokens, fewer than a batch of 27"),
        (50, 1, "the 7 training documents hold 0 windows of 50 tokens, fewer than a batch of 1"),
    ],
)
def test_fewer_windows_than_a_batch_is_an_error(length, batch, message):
    with pytest.raises(ValueError, match=message):
        pretraining_batches(make_documents(), length, batch, seed=0)


def make_prose():
    """Text that a byte model reads."""
    tokenizer, texts = ByteTokenizer(), [f"{name} ran home. " * 60 for name in ("Ann", "Bob", "Cid")]
    return [Document(text[:3], tokenizer.encode(text), len(text)) for text in texts]


def with_needles(share=0.7, batch=4, length=96, documents=None, **more):
    return pretraining_batches(documents or make_prose(), length, batch, seed=3, needle_share=share, **more)


def is_needle(row):
    """Whether a row asks for a number and says it."""
    text = ByteTokenizer().decode(np.append(row.tokens, row.targets[-1]))
    return (
        re.search(r"\nThe magic number of \w+ is (\d{7})\.\n.*\nThe magic number of \w+ is \1$", text, re.S) is not None
    )


@pytest.mark.parametrize("share", [0.0, 0.05, 1 / 3, 0.7, 1.0])
def test_the_share_of_needles_is_met_all_along(share):
    found = [is_needle(row) for row in rows_of(with_needles(share), 50)]
    expected = [int(count * Fraction(str(share))) for count in range(1, 201)]
    assert np.cumsum(found).tolist() == expected


def test_without_needles_batches_are_what_they_were():
    plain = pretraining_batches(make_prose(), 96, 4, seed=3)
    assert_equal(joined(list(islice(with_needles(0.0), 20))), joined(list(islice(plain, 20))))


def test_windows_keep_their_epochs_among_needles():
    plain = rows_of(pretraining_batches(make_prose(), 96, 4, seed=3), 12)
    mixed = [row for row in rows_of(with_needles(0.5), 24) if not is_needle(row)]
    assert_equal(mixed, plain)


def test_no_two_needles_are_the_same():
    rows = rows_of(with_needles(1.0), 50)
    assert len({row.targets.tobytes() for row in rows}) == 200


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_batches_with_needles(count):
    processes = [with_needles(process=(index, count)) for index in range(count)]
    for whole, *parts in islice(zip(with_needles(), *processes, strict=True), 15):
        assert_equal(joined(parts), whole)


def test_batches_with_needles_go_on_from_a_state():
    batches = with_needles()
    for _ in range(7):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = joined(list(islice(batches, 6)))
    fresh = with_needles(process=(0, 1))
    fresh.set_state(state)
    assert_equal(joined(list(islice(fresh, 6))), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": -0.1}, "needle_share = -0.1 must lie in [0, 1]"),
        ({"share": float("nan")}, "needle_share = nan must lie in [0, 1]"),
        ({"length": 60}, "length = 60 tokens is too short for needles"),
        ({"length": 1000, "share": 1.0}, "none of 3 training documents has the 1000 tokens that needles are hidden in"),
        ({"length": 480, "batch": 16}, "hold 3 windows of 480 tokens, fewer than the 5 that a batch of 16 takes"),
    ],
)
def test_needles_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        with_needles(**changes)
