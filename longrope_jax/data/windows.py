"""Documents -> fixed windows of tokens, to search on and to evaluate.

A window of length T is T + 1 tokens: T inputs and, one further, their T targets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int

from longrope_jax.data.corpus import Document


class Windows(NamedTuple):
    """Windows of one length, and where they were cut: `tokens[i]` begins at token `starts[i]` of `names[i]`.

    Attributes:
        tokens: inputs and, one further, their targets.
        names: of the documents.
        starts: tokens.
    """

    tokens: Int[np.ndarray, "N T+1"]
    names: list[str]
    starts: list[int]


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
        if fitting := max(len(document.tokens) - 1, 0) // length:
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
