"""What it costs to use other factors than those that were found: the price of a format that can't hold them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from longrope_jax.data.corpus import Document
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import (
    Comparison,
    Perplexity,
    by_document,
    by_file,
    compare,
    perplexity,
    token_nll,
)
from longrope_jax.model import Llama
from longrope_jax.rope import FactorTable
from longrope_jax.runtime.mesh import Layout


class Cost(NamedTuple):
    """At one length (tokens): perplexities with the factors that were found and with others, on the same documents.

    Attributes:
        difference: of the others minus those that were found; positive is what the others cost.
        windows: how many of that length, from so many documents.
    """

    length: int
    found: Perplexity
    others: Perplexity
    difference: Comparison
    windows: int
    documents: int

    def to_record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        parts = {name: getattr(self, name)._asdict() for name in ("found", "others", "difference")}
        return self._asdict() | parts

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Cost":
        """The inverse of `to_record`."""
        kinds = {"found": Perplexity, "others": Perplexity, "difference": Comparison}
        return cls(**record | {name: kind(**record[name]) for name, kind in kinds.items()})


def changed_lengths(found: FactorTable, others: FactorTable) -> tuple[int, ...]:
    """The boundaries of `found` up to which sequences get other factors from `others`."""
    lengths = [int(boundary) for boundary in found.boundaries]
    return tuple(length for length in lengths if not _same(found, others, length))


def substitution_cost(
    model: Llama,
    layout: Layout,
    params: dict,
    found: FactorTable,
    others: FactorTable,
    documents: Sequence[Document],
    lengths: Sequence[int],
    count: int,
    seed: int = 0,
) -> list[Cost]:
    """Perplexity with both tables, at every length, on `count` windows of it.

    Raises:
        ValueError: no document is as long as one of the lengths.
    """
    costs = []
    for length in lengths:
        windows = fixed_windows(documents, length, count, seed)
        with_found, with_others = (
            by_file(
                by_document(token_nll(model, layout, params, table.select(length), windows.tokens, length)),
                windows.names,
            )
            for table in (found, others)
        )
        difference = compare(with_others, with_found, seed)
        costs.append(
            Cost(
                length,
                perplexity(with_found),
                perplexity(with_others),
                difference,
                len(windows.names),
                len(with_found.sums),
            )
        )
    return costs


def _same(found: FactorTable, others: FactorTable, length: int) -> bool:
    """Whether two tables turn the tokens of a sequence alike."""
    mine, theirs = found.select(length), others.select(length)
    if not (np.array_equal(mine.lam, theirs.lam) and mine.mscale == theirs.mscale):
        return False
    is_rescaled = np.any(np.asarray(mine.lam) != 1)
    return not is_rescaled or max(int(mine.n_hat), 1) == max(int(theirs.n_hat), 1)
