"""How the tables of reports show a length, a difference and a share; and what they say of differences."""

from collections.abc import Mapping, Sequence
from typing import Any

DIFFERENCES = (
    "Differences in nats per token, negative where the first named is better, paired by document, with 95 % t "
    "intervals over documents:\n"
)


def length_heading(length: int, original_length: int) -> str:
    """A length (tokens) and how many original lengths it is."""
    return f"{length} ({length / original_length:g}L)"


def difference_cell(compared: Mapping[str, Any]) -> str:
    """A difference and its interval, of the fields of an `evaluation.perplexity.Comparison`."""
    return "{difference:+.4f} [{ci95[0]:+.4f}, {ci95[1]:+.4f}]".format(**compared)


def share_cell(found: Mapping[str, Any]) -> str:
    """How many of the tries were hits, and the interval of their share."""
    low, high = found["ci95"]
    return f"{found['hits']} of {found['tries']} [{100 * low:.0f}, {100 * high:.0f}] %"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, padded so that it can be read in a terminal as well."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, rule, *rows]]
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)
