"""What figures have in common: panels, and axes for lengths and for plain numbers."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter


def new_figure(count: int, height: float, columns: int = 3, sharex: bool | None = None):
    """A figure and `count` panels, up to so many in a row, each so high (inches); of one column, with one x
    axis unless told otherwise.
    """
    columns = min(count, columns)
    sharex = columns == 1 < count if sharex is None else sharex
    rows = -(-count // columns)
    figure = Figure(figsize=(7.2, 0.6 + height * rows), dpi=140, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=sharex).ravel()
    for number, axes in enumerate(panels):
        axes.set_visible(number < count)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[:count]


def length_axis(axes, lengths: Sequence[int]) -> None:
    """Logarithmic, a tick a length."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("length (tokens)")


def mark_original_length(axes, length: int) -> None:
    """A line at L on the x axis."""
    axes.axvline(length, color="black", linewidth=0.8, alpha=0.5)
    axes.annotate("L", (length, 0), xycoords=("data", "axes fraction"), xytext=(4, 4), textcoords="offset points")


def plain_numbers(axis) -> None:
    """1, 2, 3, 5, 7, 10, 20 instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
