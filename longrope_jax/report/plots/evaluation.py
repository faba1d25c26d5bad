"""Perplexity by length and by position."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from longrope_jax.evaluation.perplexity import by_position
from longrope_jax.report.plots.style import (
    control_label,
    label,
    legend_outside,
    length_axis,
    mark_x,
    new_figure,
    ordered,
    plain_numbers,
    styles_of,
)


def perplexity_by_length(
    table: Mapping[int, Mapping[str, float]], original_length: int, controls: Sequence[str]
) -> Figure:
    """Perplexity against window length, a line a method, both axes logarithmic (LongRoPE fig. 1).

    Args:
        table: length (tokens) -> method -> perplexity.
        controls: methods whose value at the original length is drawn across.
    """
    figure, (axes,) = new_figure(1, 4.0)
    lengths = sorted(table)
    for name, style in styles_of(table[lengths[0]]).items():
        axes.plot(lengths, [table[length][name] for length in lengths], **style)
    for name, linestyle in zip(controls, itertools.cycle((":", "--", "-.")), strict=False):
        value = table[original_length][name]
        axes.axhline(value, color="black", linewidth=1, linestyle=linestyle, label=control_label(name))
    mark_x(axes, original_length, "L")
    length_axis(axes, lengths)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set(ylabel="perplexity", title="Perplexity by context length, the same tokens at every length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def nll_by_position(
    curves: Mapping[str, Float[np.ndarray, "buckets"]],
    length: int,
    original_length: int,
    control: str,
    control_curve: Float[np.ndarray, "buckets"],
) -> Figure:
    """Where in windows of `length` tokens a method loses: perplexity, and the difference in NLL to the control.

    Args:
        curves: method -> NLL (nats per token) in equal buckets of positions.
        control: the method whose disjoint windows of the original length are the control.
        control_curve: its NLL there, in the same buckets. Buckets differ in how hard their text is, for all methods
            alike; the difference is free of that.
    """
    figure, (upper, lower) = new_figure(2, 2.9, columns=1, sharex=True)
    middles = (np.arange(len(control_curve)) + 0.5) * length / len(control_curve)
    for name, style in styles_of(curves).items():
        style = {**style, "marker": None}
        upper.plot(middles, np.exp(curves[name]), **style)
        lower.plot(middles, np.subtract(curves[name], control_curve), **style)
    upper.plot(middles, np.exp(control_curve), color="black", linestyle=":", linewidth=1, label=control_label(control))
    lower.axhline(0, color="black", linestyle=":", linewidth=1)
    for axes in (upper, lower):
        mark_x(axes, original_length, "L")
    upper.set_yscale("log")
    plain_numbers(upper.yaxis)
    upper.set(ylabel="perplexity", title=f"Perplexity by position, windows of {length:,} tokens")
    legend_outside(figure, upper, "outside lower center", 2)
    lower.set_xlim(0, length)
    lower.set(xlabel="position in the window (tokens)", ylabel="NLL minus control (nats per token)")
    return figure


def nll_after_switch(nll: Mapping[str, Float[np.ndarray, "N T"]], boundary: int, bucket: int = 8) -> Figure:
    """The loss just beyond the length at which factors change, a line a way to deal with it.

    Args:
        nll: name -> NLL (nats) of the N texts' tokens from the boundary on, see `evaluation.factor_switching`.
        boundary: tokens; the length at which factors change.
        bucket: tokens; every point is the mean of so many, over all texts.
    """
    figure, (axes,) = new_figure(1, 2.8)
    for (name, losses), color in zip(nll.items(), ("#d62728", "#1f77b4", "#7f7f7f", "#2ca02c"), strict=False):
        curve = by_position(losses, losses.shape[1] // bucket)
        middles = boundary + (np.arange(len(curve)) + 0.5) * losses.shape[1] / len(curve)
        axes.plot(middles, curve, label=name, color=color)
    axes.set(xlabel="position (tokens)", ylabel="NLL (nats per token)")
    axes.set_title(f"Beyond {boundary:,} tokens, where the factors change")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure


def retrieval_by_length(
    accuracy: Mapping[str, Mapping[int, tuple[float, float, float]]], original_length: int
) -> Figure:
    """Share of numbers found (LongRoPE fig. 4): method -> length (tokens) -> the share and the ends of its interval."""
    figure, (axes,) = new_figure(1, 3.2)
    for turn, (name, style) in enumerate(styles_of(accuracy).items()):
        lengths = np.array(sorted(accuracy[name]))
        share, low, high = np.transpose([accuracy[name][length] for length in lengths])
        lengths = lengths * 1.03 ** (turn - (len(accuracy) - 1) / 2)  # intervals must not hide each other
        axes.plot(lengths, share, **style)
        axes.vlines(lengths, low, high, color=style["color"], linewidth=1, alpha=0.6)
    mark_x(axes, original_length, "L")
    length_axis(axes, sorted(set().union(*accuracy.values())))
    axes.set(ylabel="share found, 95 % interval", title="Retrieval by length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def retrieval_heatmap(
    accuracy: Mapping[str, Float[np.ndarray, "depths lengths"]], lengths: Sequence[int], depths: Sequence[float]
) -> Figure:
    """Share of hidden numbers found by their depth (0 is the beginning) and by length (tokens), a panel a method."""
    figure, panels = new_figure(len(accuracy), 0.7 + 0.26 * len(depths))
    for axes, name in zip(panels, ordered(accuracy), strict=True):
        percent = 100 * np.asarray(accuracy[name])
        image = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(percent):
            color = "black" if value > 50 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
        axes.set_title(label(name), fontsize=9)
    figure.supxlabel("length (tokens)", fontsize=9)
    figure.supylabel("depth of the number", fontsize=9)
    figure.colorbar(image, ax=panels, label="found (%)")
    return figure
