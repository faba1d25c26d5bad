"""Endless training batches. The batch of step k depends only on the arguments and k.

So the state of an iterator is the number of the next step: it is exact, and the same for any number of processes.
"""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import grain
from absl import logging

from longrope_jax.data.corpus import Document, too_short
from longrope_jax.data.sequences import Batch, DisjointWindows, NeedleRows, PackedPieces, Pieces, cut, pack, segments
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer

# Reading a batch from local files is faster than a step, so a buffer of two is enough; long batches are large.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def pretraining_batches(
    documents: Sequence[Document],
    length: int,
    batch: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
    needle_share: float = 0.0,
    tokenizer: Tokenizer | None = None,
) -> grain.DatasetIterator[Batch]:
    """Batches of disjoint windows, reshuffled in every epoch, and optionally of needles.

    Args:
        documents: the training documents.
        length: tokens of a sequence, and its context window.
        batch: sequences per step, of all processes together.
        seed: of the order.
        process: (index, count). Each process loads its own rows; concatenated, they are the whole batch.
        needle_share: share of needle prompts with their answers (see `NeedleRows`), exact and even as `long_share` of
            `finetuning_batches`. Every needle is new, so only windows have epochs.
        tokenizer: of the documents, for needles; without it bytes.

    Returns:
        An iterator whose `get_state()` is a small dict of numbers; `set_state()` resumes exactly there.

    Raises:
        ValueError: fewer windows than a batch needs, a batch that the processes cannot share evenly, a share outside
            [0, 1], or needles that do not fit this length or these documents.
    """
    share = _share("needle_share", needle_share)
    kinds = []
    if share < 1:
        windows = DisjointWindows(documents, length)
        kinds.append(_epochs(windows, f"windows of {length} tokens", documents, batch, 1 - share, seed))
    if share > 0:
        kinds.append(grain.MapDataset.source(NeedleRows(documents, length, tokenizer or ByteTokenizer(), seed)))
    return _batches(_mixed(kinds, share), batch, process)


def finetuning_batches(
    documents: Sequence[Document],
    length: int,
    original_length: int,
    batch: int,
    seed: int,
    *,
    bos: int,
    eos: int,
    packed: bool,
    long_share: float,
    process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator[Batch]:
    """Batches to finetune for a longer context: long sequences, mixed with some for the original context window.

    A long sequence is a segment of one document, between BOS and EOS (LongRoPE, arXiv 2402.13753, section 4.1); if
    `packed`, it has as many pieces of documents as fit, and no text is dropped. A short sequence has the same `length`,
    packed with pieces that fit the original window (mixed context window training, LongRoPE2, arXiv 2502.20082, section
    3.3). Pieces in one sequence have segment ids, and positions from 0: none may attend to another.

    Args:
        documents: the training documents; each begins with BOS and ends with EOS.
        length: tokens of a sequence, and the context window of the long ones.
        original_length: the context window of the short ones.
        batch: sequences per step, of all processes together.
        seed: of the order and of the packing.
        bos, eos: tokens that begin and end a piece.
        packed: whether long sequences are packed too.
        long_share: share of long sequences, exact and even: the first n steps hold n * batch * long_share of them,
            rounded down. Long and short sequences have separate epochs.
        process: (index, count). Each process loads its own rows; concatenated, they are the whole batch.

    Returns:
        An iterator whose `get_state()` is a small dict of numbers; `set_state()` resumes exactly there. Segment ids are
        None if every sequence is one segment: not `packed`, and a share of 1.

    Raises:
        ValueError: a share outside [0, 1], an original window above `length`, no document that fills a segment, fewer
            sequences than a batch needs, or a batch that the processes cannot share evenly.
    """
    share = _share("long_share", long_share)
    if not 2 <= original_length <= length:
        raise ValueError(f"original_length = {original_length} must lie in [2, length = {length}]")
    kinds = []
    for kind, window, part in (("short", original_length, 1 - share), ("long", length, share)):
        if part > 0:
            is_packed = packed or kind == "short"
            plan = _packed(documents, window, length, seed) if is_packed else _one_each(documents, length)
            rows = PackedPieces(documents, *plan, length, window, bos, eos)
            kinds.append(_epochs(rows, f"{kind} sequences of {length} tokens", documents, batch, part, seed))
    sequences = _mixed(kinds, share)
    if share == 1 and not packed:
        sequences = sequences.map(lambda row: row._replace(segment_ids=None))  # one segment needs no mask
    return _batches(sequences, batch, process)


def _packed(
    documents: Sequence[Document], window: int, length: int, seed: int
) -> tuple[Pieces, Sequence[Sequence[int]]]:
    """All text in pieces for the window, and the pieces of every sequence."""
    pieces = cut(documents, window)
    bins = pack(pieces.sizes, length, seed)
    filled = pieces.sizes.sum() / max(1, len(bins) * length)
    logging.info(
        "%d pieces of at most %d tokens packed in %d sequences of %d, which are %.1f%% full",
        *(len(pieces.sizes), window, len(bins), length, 100 * filled),
    )
    return pieces, bins


def _one_each(documents: Sequence[Document], length: int) -> tuple[Pieces, Sequence[Sequence[int]]]:
    """All segments that documents fill, one per sequence."""
    pieces = segments(documents, length)
    count = len(pieces.sizes)
    if not count:
        raise too_short(documents, f"training documents has the {length + 1} tokens of a segment of {length}")
    return pieces, [[piece] for piece in range(count)]


def _share(name: str, share: float) -> Fraction:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} = {share} must lie in [0, 1]")
    return Fraction(str(share))  # exactly 3/10 for 0.3, not the nearest binary number


def _mixed(kinds: Sequence[grain.MapDataset[Batch]], share: Fraction) -> grain.MapDataset[Batch]:
    """Mixes two kinds of sequences, `share` of the second; with one kind there is nothing to mix."""
    return kinds[0] if len(kinds) == 1 else grain.MapDataset.select_from_datasets(kinds, _Mixture(share))


class _Mixture(grain.transforms.DatasetSelectionMap):
    """Sequence k -> (1, index in the second kind) or (0, index in the first).

    The count of the second kind is k * share, rounded down for every k: it is spread evenly and errors do not add up.
    """

    def __init__(self, share: Fraction):
        self._share = share

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        before = math.floor(index * self._share)
        is_second = math.floor((index + 1) * self._share) > before
        return (1, before) if is_second else (0, index - before)


def _epochs(
    source: grain.sources.RandomAccessDataSource,
    what: str,
    documents: Sequence[Document],
    batch: int,
    share: Fraction,
    seed: int,
) -> grain.MapDataset[Batch]:
    """The rows of a source, endlessly, reshuffled in every epoch; `share` of every batch are such rows.

    Raises ValueError, which says what the rows are, if a batch would hold one of them twice.
    """
    needed = math.ceil(share * batch)
    if len(source) < needed:
        wanted = f"a batch of {batch}" if share == 1 else f"the {needed} that a batch of {batch} takes"
        raise ValueError(f"the {len(documents)} training documents hold {len(source)} {what}, fewer than {wanted}")
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def _batches(sequences: grain.MapDataset[Batch], batch: int, process: tuple[int, int]) -> grain.DatasetIterator[Batch]:
    """The iterator of one process over its rows of every batch."""
    index, count = process
    if batch % count:
        raise ValueError(f"batch = {batch} must be divisible by the number of processes, {count}")
    # The source is endless, so nothing is dropped; keeping a remainder would overflow its length.
    parts = sequences.batch(batch // count, drop_remainder=True)
    return iter(parts[index::count].to_iter_dataset(_READ_AHEAD))
