"""Training sequences: batches, and grain data sources that make any row on demand: windows, needles, packed pieces."""

import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from longrope_jax.data.corpus import Document, too_short
from longrope_jax.data.needles import cloze_example, cloze_size
from longrope_jax.data.tokenizer import Tokenizer

IGNORED = -1
"""The target of padding: nothing is predicted there."""


class Batch(NamedTuple):
    """Training sequences, a pytree; a row is the same without the axis B. Padding is at the end.

    Attributes:
        tokens: the inputs; 0 in padding.
        targets: the token after each input; `IGNORED` in padding.
        positions: count from 0 in every piece of text; 0 in padding.
        segment_ids: the number of each token's piece, from 1; 0 in padding; None if every sequence is one piece.
        context: tokens of the context window that each sequence is trained for; it selects the factors.
    """

    tokens: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"] | None
    context: Int[np.ndarray | np.integer, "B"]


class DisjointWindows:
    """Adjacent windows of the documents, one per row (a grain data source)."""

    def __init__(self, documents: Sequence[Document], length: int):
        self._documents, self._length = documents, length
        counts = [max(len(document.tokens) - 1, 0) // length for document in documents]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Batch:
        which = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - (self._ends[which - 1] if which else 0)) * self._length
        return _single_segment(self._documents[which].tokens[start : start + self._length + 1])


class NeedleRows:
    """Examples of `cloze_example`, one per row (a grain data source): the answer's last token is the last target.

    Row k depends only on the arguments and k; the number of rows is unlimited.

    Raises:
        ValueError: the length is too short for a prompt, or no document is as long.
    """

    def __init__(self, documents: Sequence[Document], length: int, tokenizer: Tokenizer, seed: int):
        self._length, self._tokenizer, self._seed = length, tokenizer, seed
        # Selected once, because every row draws one of them.
        self._documents = [document for document in documents if len(document.tokens) >= length]
        if not self._documents:
            raise too_short(documents, f"training documents has the {length} tokens that needles are hidden in")
        shortest = cloze_size(tokenizer) - 1  # a row has one token more than its length
        if length < shortest:
            raise ValueError(
                f"length = {length} tokens is too short for needles, which take {shortest} with question and answer"
            )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng([self._seed, index])
        document = self._documents[rng.integers(len(self._documents))]
        return _single_segment(cloze_example(self._length + 1, self._tokenizer, rng, [document]))


def _single_segment(tokens: Int[np.ndarray, "T+1"]) -> Batch:
    """A row that is one segment, trained for a context of its own length."""
    length, tokens = len(tokens) - 1, tokens.astype(np.int32)
    return Batch(tokens[:-1], tokens[1:], np.arange(length, dtype=np.int32), None, np.int32(length))


class Pieces(NamedTuple):
    """Parts of documents: piece i is the tokens `starts[i]:stops[i]` of document `documents[i]`, without BOS and EOS.

    Attributes:
        documents: the index of each piece's document.
        starts: index of the first token.
        stops: index after the last token.
    """

    documents: Int[np.ndarray, "N"]
    starts: Int[np.ndarray, "N"]
    stops: Int[np.ndarray, "N"]

    @property
    def sizes(self) -> Int[np.ndarray, "N"]:
        """Inputs that each piece takes in a sequence: BOS and the text. EOS is only a target."""
        return 1 + self.stops - self.starts


def cut(documents: Sequence[Document], length: int) -> Pieces:
    """All text, in order, in pieces of `length` inputs; a document's last piece may be shorter."""
    ends = [len(document.tokens) - 1 for document in documents]  # without the document's BOS and EOS
    starts = [np.arange(1, end, length - 1) for end in ends]
    stops = [np.minimum(start + length - 1, end) for start, end in zip(starts, ends, strict=True)]
    which = np.repeat(np.arange(len(documents)), [len(start) for start in starts])
    none = np.zeros(0, int)
    return Pieces(which, np.concatenate([none, *starts]), np.concatenate([none, *stops]))


def segments(documents: Sequence[Document], length: int) -> Pieces:
    """The pieces of `cut` that have all `length` inputs; the rest of each document is dropped."""
    pieces = cut(documents, length)
    return Pieces(*(field[pieces.sizes == length] for field in pieces))


def pack(sizes: Int[np.ndarray, "N"], room: int, seed: int) -> list[list[int]]:
    """Packs pieces into bins of `room` tokens; returns the indices of the pieces in each bin.

    Best fit (Johnson et al., SIAM J. Comput. 3(4), 1974): each piece goes into the bin where it leaves the least room.
    The order of the pieces is drawn from `seed` and not sorted by size, so that bins mix pieces at random.

    O(N log N) comparisons: 0.2 s for 1e5 pieces, 3 s for 1e6.

    Raises:
        ValueError: a piece is larger than the room.
    """
    if len(sizes) and sizes.max() > room:
        raise ValueError(f"the largest piece has {sizes.max()} tokens, more than the room for it, {room}")
    size_of = sizes.tolist()
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (tokens left, bin) of the bins that are not full, ascending
    for piece in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        size = size_of[piece]
        tightest = bisect_left(open_bins, (size,))
        if tightest < len(open_bins):
            left, which = open_bins.pop(tightest)
        else:
            left, which = room, len(bins)
            bins.append([])
        bins[which].append(piece)
        if left > size:
            insort(open_bins, (left - size, which))
    return bins


@dataclass(frozen=True, eq=False, repr=False)
class PackedPieces:
    """Packed pieces, one bin per row (a grain data source).

    Attributes:
        documents: the documents of the pieces.
        pieces: parts of the documents.
        bins: indices of the pieces in every row; their sizes add up to at most `length`.
        length: inputs per row.
        context: of every row, see `Batch`.
        bos, eos: tokens that begin and end a piece.
    """

    documents: Sequence[Document]
    pieces: Pieces
    bins: Sequence[Sequence[int]]
    length: int
    context: int
    bos: int
    eos: int

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Batch:
        texts = []
        for piece in self.bins[index]:
            document, start, stop = (field[piece] for field in self.pieces)
            texts.append(self.documents[document].tokens[start:stop])
        return pack_texts(texts, self.length, self.context, self.bos, self.eos)


def pack_texts(texts: Sequence[Int[np.ndarray, "_"]], length: int, context: int, bos: int, eos: int) -> Batch:
    """One row that concatenates texts, each between BOS and EOS (LongRoPE, arXiv 2402.13753, section 4.1).

    A text of n tokens takes n + 1 inputs: BOS, c_1 .. c_n have the targets c_1 .. c_n, EOS. EOS is not an input,
    because nothing follows it.
    """
    tokens, positions, segment_ids = np.zeros((3, length), np.int32)
    targets = np.full(length, IGNORED, np.int32)
    start = 0
    for number, text in enumerate(texts, 1):
        stop = start + 1 + len(text)
        tokens[start], tokens[start + 1 : stop] = bos, text
        targets[start : stop - 1], targets[stop - 1] = text, eos
        positions[start:stop] = np.arange(stop - start)
        segment_ids[start:stop] = number
        start = stop
    return Batch(tokens, targets, positions, segment_ids, np.int32(context))
