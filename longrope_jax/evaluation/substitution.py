"""What it costs to use other factors than those that were found: the price of a format that can't hold them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from longrope_jax.data.corpus import Document
from longrope_jax.data.windows import Windows, fixed_windows
from longrope_jax.evaluation.perplexity import Comparison, Perplexity, compare, nll_by_file, perplexity
from longrope_jax.model import Llama
from longrope_jax.rope import FactorTable
from longrope_jax.runtime.mesh import Layout


class Cost(NamedTuple):
    """At one length: perplexities with the factors that were found and with others, on the same documents.

    Attributes:
        length: tokens.
        found: with the factors that were found.
        others: with the others.
        difference: of the others minus those that were found; positive is what the others cost.
        windows: how many of that length.
        documents: from how many they are.
    """

    length: int
    found: Perplexity
    others: Perplexity
    difference: Comparison
    windows: int
    documents: int

    def to_record(self) -> dict[str, Any]:
        """As JSON can hold it, but for numbers that are infinite or nan."""
        parts = {name: getattr(self, name)._asdict() for name in ("found", "others", "difference")}
        return self._asdict() | parts

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Cost":
        """The inverse of `to_record`; null stands for a number that is none."""
        kinds = {"found": Perplexity, "others": Perplexity, "difference": Comparison}
        return cls(**record | {name: kind(**_numbers(record[name])) for name, kind in kinds.items()})

    def __str__(self) -> str:
        return f"perplexity {self.found.ppl:.4f} becomes {self.others.ppl:.4f} at {self.length:,} tokens"


def changed_lengths(found: FactorTable, others: FactorTable) -> tuple[int, ...]:
    """The boundaries of `found` up to which sequences get other factors from `others`."""
    lengths = [int(boundary) for boundary in found.boundaries]
    return tuple(length for length in lengths if not _same(found, others, length))


def cost_windows(
    found: FactorTable,
    others: FactorTable,
    documents: Sequence[Document],
    lengths: Sequence[int],
    count: int,
    seed: int = 0,
) -> dict[int, Windows]:
    """What to measure on, by length: `count` windows at every one of `lengths`, or of `changed_lengths` if it is empty;
    nothing where no length changes.

    Raises:
        ValueError: a length at which nothing changes or beyond the tables, or too little text: intervals are over
            documents, so two have to be long enough.
    """
    changed = changed_lengths(found, others)
    if not changed:
        return {}
    longest = int(found.boundaries[-1])
    for length in lengths:
        if not 1 <= length <= longest:
            raise ValueError(
                f"cost_lengths: {length} must be a number of tokens from 1 to {longest}, where factors end"
            )
        if _same(found, others, length):
            told = ", ".join(map(str, changed))
            raise ValueError(f"cost_lengths: nothing changes at {length} tokens; it does up to {told}")
    windows = {}
    for length in dict.fromkeys(lengths or changed):
        try:
            windows[length] = fixed_windows(documents, length, count, seed)
        except ValueError as error:
            raise ValueError(f"what is dropped has to be measured, but {error}; give shorter cost_lengths") from None
        if len(set(windows[length].names)) < 2:
            raise ValueError(
                f"what is dropped has to be measured, but only {windows[length].names[0]!r} has the {length + 1} "
                "tokens of a window, and intervals need two documents; give more text or shorter cost_lengths"
            )
    return windows


def substitution_cost(
    model: Llama,
    layout: Layout,
    params: dict,
    found: FactorTable,
    others: FactorTable,
    windows: dict[int, Windows],
) -> list[Cost]:
    """Perplexity with both tables on the same windows, by length. Costs two evaluations of every window."""
    costs = []
    for length, chosen in windows.items():
        with_found, with_others = (
            nll_by_file(model, layout, params, table.select(length), chosen, length) for table in (found, others)
        )
        difference, names = compare(with_others, with_found), chosen.names
        costs.append(
            Cost(length, perplexity(with_found), perplexity(with_others), difference, len(names), len(set(names)))
        )
    return costs


def _same(found: FactorTable, others: FactorTable, length: int) -> bool:
    """Whether two tables turn the tokens of a sequence alike."""
    mine, theirs = found.select(length), others.select(length)
    if not (np.array_equal(mine.lam, theirs.lam) and mine.mscale == theirs.mscale):
        return False
    is_rescaled = np.any(np.asarray(mine.lam) != 1)
    return not is_rescaled or max(int(mine.n_hat), 1) == max(int(theirs.n_hat), 1)


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Null becomes nan, in pairs too."""
    known = {name: math.nan if value is None else value for name, value in record.items()}
    return known | {"ci95": tuple(math.nan if value is None else value for value in record["ci95"])}
