import json
import re
from fractions import Fraction
from functools import partial
from itertools import islice

import jax
import numpy as np
import pytest

from longrope_jax.data.batches import Needles, finetuning_batches, pretraining_batches
from longrope_jax.data.corpus import Document
from longrope_jax.data.sequences import IGNORED
from longrope_jax.data.tokenizer import ByteTokenizer

LENGTHS = (30, 3, 12, 5, 50, 4, 17)  # tokens; windows of 4 tokens: 7, 0, 2, 1, 12, 0, 4
BOS, EOS = 60000, 60001


def make_documents(lengths=LENGTHS):
    """Every token of every document is a different, consecutive number, so a window says where it was cut."""
    starts = np.cumsum([0, *lengths]) + 100 * np.arange(len(lengths) + 1)
    return [
        Document(f"document {i}", np.arange(start, start + length, dtype=np.uint16), length)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


def make_texts(seed=0, count=30):
    """Documents between BOS and EOS whose text is 0, 1, 2, .. all through: most short, some of hundreds of tokens."""
    sizes = np.exp(np.random.default_rng(seed).normal(3, 1.2, count)).astype(int) + 1
    ends = np.cumsum(sizes)
    return [
        Document(f"document {i}", np.array([BOS, *range(end - size, end), EOS], np.uint16), size)
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


finetuning = partial(finetuning_batches, length=32, original_length=8, bos=BOS, eos=EOS)

KINDS = {
    "pretraining": partial(pretraining_batches, length=8),
    "segments": partial(finetuning, packed=False, long_share=1.0),
    "packed": partial(finetuning, packed=True, long_share=1.0),
    "short": partial(finetuning, packed=False, long_share=0.0),
    "mixed": partial(finetuning, packed=False, long_share=0.3),
}


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def joined(batches):
    """Batches one after the other as one."""
    return jax.tree.map(lambda *fields: np.concatenate(fields), *batches)


def rows_of(batches, count):
    """The first rows of an iterator, each a batch without its axis."""
    batch = joined(list(islice(batches, count)))
    return [jax.tree.map(lambda field, row=row: field[row], batch) for row in range(len(batch.tokens))]


def texts_of(row):
    """The texts of a row. On the way, all that must hold within one."""
    segment_ids = np.ones_like(row.tokens) if row.segment_ids is None else row.segment_ids
    count = segment_ids.max()
    filled = (segment_ids > 0).sum()
    assert segment_ids.tolist() == sorted(segment_ids[:filled]) + [0] * (len(segment_ids) - filled)
    texts = []
    for piece in range(1, count + 1):
        mine = segment_ids == piece
        tokens, targets = row.tokens[mine].tolist(), row.targets[mine].tolist()
        assert tokens == [BOS, *targets[:-1]]
        assert targets[-1] == EOS
        assert row.positions[mine].tolist() == list(range(len(tokens)))
        assert 2 <= len(tokens) <= row.context
        texts.append(tokens[1:])
    padding = segment_ids == 0
    assert (row.targets[padding] == IGNORED).all()
    assert not row.tokens[padding].any()
    assert not row.positions[padding].any()
    return texts


def tokens_of(rows):
    return [token for row in rows for text in texts_of(row) for token in text]


# --- what all of them do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_its_shape_and_type(kind):
    for batch in islice(KINDS[kind](make_texts(), batch=3, seed=0), 4):
        length = 8 if kind == "pretraining" else 32
        shapes = [(field.shape, field.dtype.name) for field in jax.tree.leaves(batch)]
        assert shapes[:-1] == [((3, length), "int32")] * (len(shapes) - 1)
        assert shapes[-1] == ((3,), "int32")
        assert (batch.segment_ids is None) == (kind in ("pretraining", "segments"))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_batches_and_another_seed_others(kind):
    first, again, other = (joined(list(islice(KINDS[kind](make_texts(), batch=3, seed=s), 20))) for s in (1, 1, 2))
    assert_equal(first, again)
    assert (first.tokens != other.tokens).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [0, 1, 7, 30])  # within the first epoch and after several
def test_set_state_goes_on_exactly_there(kind, done):
    make = partial(KINDS[kind], make_texts(), batch=4, seed=5)
    batches = make()
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))  # it is kept in a JSON record
    expected = joined(list(islice(batches, 6)))

    batches.set_state(state)
    assert_equal(joined(list(islice(batches, 6))), expected)

    fresh = make()
    fresh.set_state(state)
    assert_equal(joined(list(islice(fresh, 6))), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_the_rows_of_all_processes_are_the_batch_of_one(kind, count):
    make = partial(KINDS[kind], make_texts(), batch=4, seed=1)
    processes = [make(process=(index, count)) for index in range(count)]
    for whole, *parts in islice(zip(make(), *processes, strict=True), 15):
        assert len(parts[0].tokens) == 4 // count
        assert_equal(joined(parts), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_state_holds_for_another_number_of_processes(kind, before, after):
    make = partial(KINDS[kind], make_texts(), batch=4, seed=1)
    whole = make()
    states = []
    for index in range(before):
        batches = make(process=(index, before))
        for _ in range(13):
            next(batches)
        states.append(batches.get_state())
    for _ in range(13):
        next(whole)
    assert states == [whole.get_state()] * before

    parts = []
    for index in range(after):
        batches = make(process=(index, after))
        batches.set_state(states[0])
        parts.append(next(batches))
    assert_equal(joined(parts), next(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_processes_cannot_share_evenly_is_an_error(kind):
    with pytest.raises(ValueError, match="batch = 3 must be divisible by the number of processes, 2"):
        KINDS[kind](make_texts(), batch=3, seed=0, process=(0, 2))


# --- pretraining ---------------------------------------------------------------------------------------------------


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
    needles = Needles(share, ByteTokenizer())
    return pretraining_batches(documents or make_prose(), length, batch, seed=3, needles=needles, **more)


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


# --- fine-tuning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "context"), [("packed", 32), ("short", 8)])
def test_every_epoch_has_all_text_once_in_another_order(kind, context, seed):
    documents = make_texts(seed)
    size = sum(document.size for document in documents)
    batches = KINDS[kind](documents, batch=1, seed=seed)
    epochs = []
    for _ in range(3):
        seen = []
        while len(seen) < size:
            (row,) = rows_of(batches, 1)
            assert row.context == context
            seen += tokens_of([row])
        assert sorted(seen) == list(range(size))
        epochs.append(tuple(seen))
    assert len(set(epochs)) == 3


@pytest.mark.parametrize("seed", range(4))
def test_every_epoch_has_every_segment_that_a_document_fills(seed):
    documents = make_texts(seed)
    expected = [
        document.tokens[start : start + 31].tolist()
        for document in documents
        for start in range(1, len(document.tokens) - 31, 31)
    ]
    batches = KINDS["segments"](documents, batch=1, seed=seed)
    for _ in range(3):
        rows = rows_of(batches, len(expected))
        assert sorted(text for row in rows for text in texts_of(row)) == expected
        assert {(int(row.context), row.segment_ids) for row in rows} == {(32, None)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1 / 3, 0.5, 0.9, 1.0])
def test_the_share_of_long_sequences_is_met_all_along(share, packed):
    batches = finetuning(make_texts(), batch=2, seed=0, packed=packed, long_share=share)
    is_long = np.concatenate([batch.context == 32 for batch in islice(batches, 100)])
    expected = [int(count * Fraction(str(share))) for count in range(1, 201)]
    assert is_long.cumsum().tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_has_all_short_text_once_an_epoch_and_whole_segments(seed):
    documents = make_texts(seed)
    size = sum(document.size for document in documents)
    batches = finetuning(documents, batch=2, seed=seed, packed=False, long_share=0.5)
    short, long = [], []
    while len(short) < size:
        for row in rows_of(batches, 1):
            if row.context == 8:
                short += tokens_of([row])
            else:
                long.append(texts_of(row))
                assert row.segment_ids.tolist() == [1] * 32
    assert sorted(short) == list(range(size))
    assert {(len(texts), len(texts[0])) for texts in long} == {(1, 31)}


def test_how_full_packed_sequences_are_is_logged(caplog):
    caplog.set_level("INFO")
    KINDS["short"](make_texts(), batch=1, seed=0)
    pieces, sequences, full = re.search(
        r"(\d+) pieces of at most 8 tokens packed in (\d+) sequences of 32, which are (.*)% full", caplog.text
    ).groups()
    inputs = sum(document.size for document in make_texts()) + int(pieces)
    assert float(full) == pytest.approx(100 * inputs / (32 * int(sequences)), abs=0.05)
    assert float(full) > 90


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"long_share": -0.1}, "long_share = -0.1 must lie in [0, 1]"),
        ({"long_share": 1.5}, "long_share = 1.5 must lie in [0, 1]"),
        ({"long_share": float("nan")}, "long_share = nan must lie in [0, 1]"),
        ({"original_length": 33}, "original_length = 33 must lie in [2, length = 32]"),
        ({"original_length": 1}, "original_length = 1 must lie in [2, length = 32]"),
        (
            {"length": 50, "packed": False},
            "none of 7 training documents has the 51 tokens of a segment of 50; the longest has 50",
        ),
        (
            {"length": 49, "packed": False, "batch": 2},
            "the 7 training documents hold 1 long sequences of 49 tokens, fewer than a batch of 2",
        ),
        (
            {"length": 49, "packed": False, "batch": 2, "long_share": 0.9},
            "the 7 training documents hold 1 long sequences of 49 tokens, fewer than the 2 that a batch of 2 takes",
        ),
        (
            {"long_share": 0.1, "batch": 8},
            "the 7 training documents hold 4 short sequences of 32 tokens, fewer than the 8 that a batch of 8 takes",
        ),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_what_could(settings, message):
    arguments = {"packed": True, "long_share": 1.0, "batch": 1, **settings}
    with pytest.raises(ValueError, match=re.escape(message)):
        finetuning(make_documents(), seed=0, **arguments)


def test_without_documents_there_is_an_error():
    with pytest.raises(ValueError, match="none of 0 training documents has .* the longest has 0"):
        finetuning([], batch=1, seed=0, packed=False, long_share=1.0)
    with pytest.raises(ValueError, match="the 0 training documents hold 0 long sequences"):
        finetuning([], batch=1, seed=0, packed=True, long_share=1.0)


def test_one_sequence_is_enough_for_a_batch_of_one():
    documents = [Document("name", np.array([BOS, *range(31), EOS], np.uint16), 31)]
    for batch in islice(KINDS["segments"](documents, batch=1, seed=0), 3):
        assert batch.tokens[0].tolist() == [BOS, *range(31)]
        assert batch.targets[0].tolist() == [*range(31), EOS]
