"""The pictures of a comparison of runs: a panel a method or a search, in each a line a run."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from longrope_jax.report.plots import label, ordered
from longrope_jax.report.plots.style import legend_outside, length_axis, mark_x, new_figure, plain_numbers

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#1a1a1a")
_MARKERS = "osD^v<>P"
_ABOVE_END = 1.3  # how much of a search is shown above where it ended: from the first candidates it falls too far

Intervals = Mapping[tuple[str, str, int], Float[np.ndarray, "3"]]
"""Perplexity and the ends of its interval, by method, run and length (tokens); nan where one is not finite."""


def _run_styles(runs: Sequence[str]) -> dict[str, dict]:
    styles = [dict(color=color, marker=marker, markersize=4) for color, marker in zip(_COLORS, _MARKERS, strict=True)]
    return dict(zip(runs, itertools.cycle(styles), strict=False))


def _methods(perplexities: Intervals) -> list[str]:
    return ordered(dict.fromkeys(method for method, _, _ in perplexities))


def perplexity_by_run(perplexities: Intervals, runs: Sequence[str], original_lengths: set[int]) -> Figure:
    """Perplexity against length, both axes logarithmic, a panel a method.

    Args:
        perplexities: their intervals are not drawn.
        runs: all of them, in the order of their colours.
        original_lengths: marked (tokens).
    """
    methods = _methods(perplexities)
    figure, panels = new_figure(len(methods), 2.4)
    for axes, method in zip(panels, methods, strict=True):
        for run, style in _run_styles(runs).items():
            lengths = sorted(n for name, other, n in perplexities if (name, other) == (method, run))
            axes.plot(lengths, [perplexities[method, run, n][0] for n in lengths], label=run, **style)
        for original in original_lengths:
            mark_x(axes, original, "L")
        length_axis(axes, sorted({n for name, _, n in perplexities if name == method}))
        axes.set(xlabel="", yscale="log")
        plain_numbers(axes.yaxis)
        axes.tick_params(labelsize=7)
        axes.tick_params(axis="x", rotation=45)
        axes.set_title(label(method), fontsize=9)
    figure.supxlabel("length (tokens)", fontsize=9)
    figure.supylabel("perplexity", fontsize=9)
    legend_outside(figure, panels[0], "outside upper center", min(len(runs), 4))
    return figure


def intervals_by_run(perplexities: Intervals, runs: Sequence[str], length: int) -> Figure:
    """Perplexity with its 95 % interval at one length (tokens), a row a method."""
    methods = _methods(perplexities)
    figure, (axes,) = new_figure(1, 0.4 + 0.16 * len(methods) * (len(runs) + 1))
    for turn, (run, style) in enumerate(_run_styles(runs).items()):
        heights = np.arange(len(methods)) + (turn - (len(runs) - 1) / 2) * 0.7 / len(runs)
        found = [perplexities.get((method, run, length), np.full(3, np.nan)) for method in methods]
        middle, low, high = np.transpose(found)
        axes.plot(middle, heights, linestyle="", label=run, **style)
        axes.hlines(heights, low, high, color=style["color"], linewidth=1.2)
    axes.set_yticks(range(len(methods)), [label(method) for method in methods])
    axes.invert_yaxis()
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.grid(axis="y", linewidth=0.3)
    axes.set(xlabel="perplexity, 95 % interval", title=f"Perplexity at {length:,} tokens")
    legend_outside(figure, axes, "outside upper center", min(len(runs), 4))
    return figure


def searches_by_run(
    searches: Mapping[str, Mapping[str, tuple[Sequence[float], Float[np.ndarray, "evaluations"]]]], runs: Sequence[str]
) -> Figure:
    """Best search perplexity so far against forward equivalents, a panel a stage.

    Args:
        searches: stage -> run -> what was spent after every candidate, and the best NLL by then (nats per token).
        runs: all of them, in the order of their colours.
    """
    figure, panels = new_figure(len(searches), 2.4)
    for axes, (stage, by_run) in zip(panels, searches.items(), strict=True):
        for run, style in _run_styles(runs).items():
            spent, nll = by_run.get(run, ((), np.empty(0)))
            axes.plot(spent, np.exp(nll), label=run, drawstyle="steps-post", **{**style, "marker": None})
        ends = [np.exp(nll[-1]) for _, nll in by_run.values()]
        axes.set_ylim(min(ends) / _ABOVE_END**0.1, max(ends) * _ABOVE_END)
        axes.tick_params(labelsize=7)
        axes.set_title(stage.replace("_", " "), fontsize=9)
    figure.supxlabel("forward equivalents spent (1: a candidate on all search documents)", fontsize=9)
    figure.supylabel("best perplexity", fontsize=9)
    legend_outside(figure, panels[0], "outside upper center", min(len(runs), 4))
    return figure
