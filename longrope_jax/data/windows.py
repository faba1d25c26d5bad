"""Documents -> windows of tokens: shuffled batches to train on, and fixed windows to search on and to evaluate.

A window of length T is T + 1 tokens: T inputs and, one further, their T targets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import logging
from jaxtyping import Int

from longrope_jax.data.corpus import Document


class Windows(NamedTuple):
    """Windows of one length, and where they were cut: `tokens[i]` begins at token `starts[i]` of `names[i]`."""

    tokens: Int[np.ndarray, "N T+1"]
    names: list[str]
    starts: list[int]


def training_batches(documents: Sequence[Document], length: int, batch: int, seed: int) -> grain.DatasetIterator:
    """Endless batches i32[batch, length + 1] of disjoint windows, all documents' windows reshuffled in every epoch.

    The iterator's `get_state()` is a small dict of numbers, and `set_state()` goes on from exactly there.

    Raises:
        ValueError: no document has length + 1 tokens, or fewer windows than a batch.
    """
    windows = _DisjointWindows(documents, length)
    if len(windows) < batch:
        raise ValueError(
            f"the {len(documents)} training documents hold {len(windows)} windows of {length} tokens, "
            f"fewer than a batch of {batch}"
        )
    epochs = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    # Endless, so nothing remains to be dropped; but keeping a remainder would overflow the endless length.
    return iter(epochs.batch(batch, drop_remainder=True).to_iter_dataset())


class _DisjointWindows:
    """Random access to every window that begins at a multiple of its length in its document (a grain data source)."""

    def __init__(self, documents: Sequence[Document], length: int):
        self._documents, self._length = documents, length
        counts = [(len(document.tokens) - 1) // length for document in documents]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Int[np.ndarray, "T+1"]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - (self._ends[which - 1] if which else 0)) * self._length
        return self._documents[which].tokens[start : start + self._length + 1].astype(np.int32)


def fixed_windows(documents: Sequence[Document], length: int, count: int, seed: int) -> Windows:
    """`count` windows of `length` tokens at random places of as many different documents.

    Where there are too few long documents, some give a second window and so on, always disjoint from the first, so that
    windows stay (nearly) independent samples; where even those run out there are fewer, with a warning.

    Raises:
        ValueError: no document is long enough.
    """
    rng = np.random.default_rng(seed)
    queues = []
    for document in documents:
        if fitting := (len(document.tokens) - 1) // length:
            offset = rng.integers(len(document.tokens) - fitting * length)
            queues.append([(document, int(offset + k * length)) for k in rng.permutation(fitting)])
    if not queues:
        longest = max((len(document.tokens) for document in documents), default=0)
        raise ValueError(
            f"none of {len(documents)} documents has the {length + 1} tokens of a window of {length}; "
            f"the longest has {longest}"
        )
    queues = [queues[i] for i in rng.permutation(len(queues))]
    rounds = [[queue[turn] for queue in queues if turn < len(queue)] for turn in range(max(map(len, queues)))]
    chosen = [window for turn in rounds for window in turn][:count]
    if len(chosen) < count:
        logging.warning("only %d disjoint windows of %d tokens, %d were asked for", len(chosen), length, count)
    tokens = np.stack([document.tokens[start : start + length + 1] for document, start in chosen]).astype(np.int32)
    return Windows(tokens, [document.name for document, _ in chosen], [start for _, start in chosen])
