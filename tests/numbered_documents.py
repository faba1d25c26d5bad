"""Documents whose tokens say where they stand, batches of them, and how to read texts out of batches."""

from functools import partial
from itertools import islice

import jax
import numpy as np

from longrope_jax.data.batches import finetuning_batches, pretraining_batches
from longrope_jax.data.corpus import Document
from longrope_jax.data.sequences import IGNORED

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
