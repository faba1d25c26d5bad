"""Batches to fine-tune on: long segments, packed texts and mixtures."""

import re
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from numbered_documents import BOS, EOS, KINDS, finetuning, make_documents, make_texts, rows_of, texts_of, tokens_of

from longrope_jax.data.corpus import Document


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
    caplog.set_level("INFO", logger="absl")  # a command that ran before in this process wants warnings only
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
