"""Labels, colours and axes that all figures share."""

import itertools
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

_HOLLOW = dict(linestyle="--", markerfacecolor="white")
STYLES: dict[str, dict] = {
    "longrope": dict(label="LongRoPE (searched)", color="#d62728", linewidth=2.4, marker="o", zorder=5),
    "lambda_only": dict(label="LongRoPE, lambda only", color="#d62728", marker="o", **_HOLLOW),
    "yarn_tuned": dict(label="YaRN, tuned", color="#08306b", linewidth=2.0, marker="D"),
    "yarn": dict(label="YaRN", color="#1f77b4", marker="s"),
    "yarn_without_temperature": dict(label="YaRN, no temperature", color="#1f77b4", marker="s", **_HOLLOW),
    "yarn_mistral": dict(label="YaRN, Mistral's ramp", color="#1f77b4", marker="+", linestyle=":"),
    "dynamic_ntk": dict(label="Dynamic NTK", color="#2ca02c", marker="^", **_HOLLOW),
    "ntk_with_start_tokens": dict(label="NTK, best start tokens", color="#2ca02c", marker="^", linestyle=":"),
    "ntk": dict(label="NTK", color="#2ca02c", marker="^"),
    "linear_with_start_tokens": dict(label="PI, best start tokens", color="#9467bd", marker="D", linestyle=":"),
    "linear": dict(label="PI (linear)", color="#9467bd", marker="D"),
    "unscaled": dict(label="unscaled", color="#7f7f7f", marker="v"),
}
_OTHER_LABELS = {
    "longrope_without_second_search": "LongRoPE, second search's best seed",
    "original": "original model",
    "tuned_at_original": "fine-tuned at L",
}
_OTHER_COLORS = ("#8c564b", "#e377c2", "#bcbd22", "#17becf", "#ff7f0e", "#1a1a1a")


def label(name: str) -> str:
    """What a reader is shown for the name of a method."""
    return STYLES[name]["label"] if name in STYLES else _OTHER_LABELS.get(name, name.replace("_", " "))


def control_label(name: str) -> str:
    """The same for a method as a control."""
    return f"control: disjoint windows of L, {label(name)}"


def ordered(names: Iterable[str]) -> list[str]:
    """Known methods in the order of their styles, which is roughly best first, then the others."""
    return sorted(names, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))


def styles_of(names: Iterable[str]) -> dict[str, dict]:
    """A style with a label for every name; those without one of their own get the other colours in turn."""
    others = itertools.cycle(_OTHER_COLORS)
    return {
        name: STYLES.get(name) or dict(label=label(name), color=next(others), marker=".", linestyle="-.")
        for name in ordered(names)
    }


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
