"""Fixed windows of tokens for search and evaluation.

A window of length T has T + 1 tokens: T inputs, and the same shifted by one as T targets.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int

from longrope_jax.data.corpus import Document, too_short


class Windows(NamedTuple):
    """Windows of one length: `tokens[i]` begins at token `starts[i]` of document `names[i]`.

    Attributes:
        tokens: inputs, and one more for the targets.
        names: of the documents.
        starts: index of the first token.
    """

    tokens: Int[np.ndarray, "N T+1"]
    names: list[str]
    starts: list[int]


def fixed_windows(documents: Sequence[Document], length: int, count: int, seed: int) -> Windows:
    """`count` windows of `length` tokens at random places, from as many different documents as possible.

    If there are too few long documents, some give more than one window. Windows never overlap, so they are (nearly)
    independent samples. If there are still too few, a warning says so and fewer are returned.

    Raises:
        ValueError: no document is long enough.
    """
    rng = np.random.default_rng(seed)
    queues = []
    for document in documents:
        if fitting := max(len(document.tokens) - 1, 0) // length:
            offset = rng.integers(len(document.tokens) - fitting * length)
            queues.append([(document, int(offset + k * length)) for k in rng.permutation(fitting)])
    if not queues:
        raise too_short(documents, f"documents has the {length + 1} tokens of a window of {length}")
    queues = [queues[i] for i in rng.permutation(len(queues))]
    # One window of every document, then a second one of those that have it, and so on.
    chosen = [window for turn in itertools.zip_longest(*queues) for window in turn if window][:count]
    if len(chosen) < count:
        logging.warning("only %d disjoint windows of %d tokens, %d were asked for", len(chosen), length, count)
    tokens = np.stack([document.tokens[start : start + length + 1] for document, start in chosen]).astype(np.int32)
    return Windows(tokens, [document.name for document, _ in chosen], [start for _, start in chosen])
