"""Labels, colours and axes that all figures share."""

import itertools
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

STYLES: dict[str, dict] = {
    "longrope": dict(color="#d62728", linewidth=2.4, marker="o", zorder=5),
    "lambda_only": dict(color="#d62728", marker="o", linestyle="--", markerfacecolor="white"),
    "yarn_tuned": dict(color="#08306b", linewidth=2.0, marker="D"),
    "yarn": dict(color="#1f77b4", marker="s"),
    "yarn_without_temperature": dict(color="#1f77b4", marker="s", linestyle="--", markerfacecolor="white"),
    "yarn_mistral": dict(color="#1f77b4", marker="+", linestyle=":"),
    "dynamic_ntk": dict(color="#2ca02c", marker="^", linestyle="--", markerfacecolor="white"),
    "ntk_with_start_tokens": dict(color="#2ca02c", marker="^", linestyle=":"),
    "ntk": dict(color="#2ca02c", marker="^"),
    "linear_with_start_tokens": dict(color="#9467bd", marker="D", linestyle=":"),
    "linear": dict(color="#9467bd", marker="D"),
    "unscaled": dict(color="#7f7f7f", marker="v"),
}
LABELS = {
    "longrope": "LongRoPE (searched)",
    "longrope_without_second_search": "LongRoPE, second search's best seed",
    "lambda_only": "LongRoPE, lambda only",
    "original": "original model",
    "tuned_at_original": "fine-tuned at L",
    "yarn_tuned": "YaRN, tuned",
    "yarn": "YaRN",
    "yarn_without_temperature": "YaRN, no temperature",
    "yarn_mistral": "YaRN, Mistral's ramp",
    "dynamic_ntk": "Dynamic NTK",
    "ntk_with_start_tokens": "NTK, best start tokens",
    "ntk": "NTK",
    "linear_with_start_tokens": "PI, best start tokens",
    "linear": "PI (linear)",
    "unscaled": "unscaled",
}
_OTHER_COLORS = ("#8c564b", "#e377c2", "#bcbd22", "#17becf", "#ff7f0e", "#1a1a1a")


def label(name: str) -> str:
    """What a reader is shown for the name of a method."""
    return LABELS.get(name, name.replace("_", " "))


def control_label(name: str) -> str:
    """The same for a method as a control."""
    return f"control: disjoint windows of L, {label(name)}"


def ordered(names: Iterable[str]) -> list[str]:
    """Known methods in the order of their styles, which is roughly best first, then the others."""
    return sorted(names, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))


def styles_of(names: Iterable[str]) -> dict[str, dict]:
    """A style for every name; those without one of their own get the other colours in turn."""
    others = itertools.cycle(_OTHER_COLORS)
    return {name: STYLES.get(name) or dict(color=next(others), marker=".", linestyle="-.") for name in ordered(names)}


def new_figure(count: int, height: float, columns: int = 3, sharex: bool = False):
    """A figure and `count` panels, up to so many in a row, each so high (inches); with `sharex`, of one x axis."""
    columns = min(count, columns)
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
    axes.set_xticks(lengths, map(str, lengths))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("length (tokens)")


def mark_x(axes, x: float, name: str) -> None:
    """A line across at a place of the x axis."""
    axes.axvline(x, color="black", linewidth=0.8, alpha=0.5)
    axes.annotate(name, (x, 0), xycoords=("data", "axes fraction"), xytext=(4, 4), textcoords="offset points")


def legend_outside(figure, axes, loc: str, ncols: int) -> None:
    """The legend of one panel, which holds for all of them, beside the panels."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc=loc, frameon=False, fontsize=8, ncols=ncols)


def plain_numbers(axis) -> None:
    """1, 2, 3, 5, 7, 10, 20 instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
