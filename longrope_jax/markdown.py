"""Pieces of Markdown that reports are made of."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, padded so that it can be read in a terminal as well."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, rule, *rows]]
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)


def picture(what: str, name: str) -> str:
    """A figure of the work directory."""
    return f"![{what}](figures/{name}.png)\n"
