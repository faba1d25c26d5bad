"""Documents -> pieces of text, each short enough for a context window."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from longrope_jax.data.corpus import Document


class Pieces(NamedTuple):
    """Stretches of text: piece i is the tokens `starts[i]:stops[i]` of document `documents[i]`, without BOS and EOS.

    Attributes:
        documents: the number of each piece's document.
        starts: its first token there.
        stops: the one after its last.
    """

    documents: Int[np.ndarray, "N"]
    starts: Int[np.ndarray, "N"]
    stops: Int[np.ndarray, "N"]

    @property
    def sizes(self) -> Int[np.ndarray, "N"]:
        """Inputs that each piece takes in a sequence: BOS and its text. EOS is a target only."""
        return 1 + self.stops - self.starts


def cut(documents: Sequence[Document], length: int) -> Pieces:
    """All text, in order, as pieces that take `length` inputs each; a document's last one may take fewer."""
    ends = [len(document.tokens) - 1 for document in documents]  # a document's own BOS and EOS are no text
    starts = [np.arange(1, end, length - 1) for end in ends]
    stops = [np.minimum(start + length - 1, end) for start, end in zip(starts, ends, strict=True)]
    which = np.repeat(np.arange(len(documents)), [len(start) for start in starts])
    none = np.zeros(0, int)
    return Pieces(which, np.concatenate([none, *starts]), np.concatenate([none, *stops]))


def segments(documents: Sequence[Document], length: int) -> Pieces:
    """Those of `cut` that take all `length` inputs; the rest of each document is left out."""
    pieces = cut(documents, length)
    return Pieces(*(field[pieces.sizes == length] for field in pieces))
