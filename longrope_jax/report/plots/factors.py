"""Rescale factors by rotary pair and by length."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure

from longrope_jax import rope
from longrope_jax.report.plots.style import (
    label,
    legend_outside,
    length_axis,
    mark_x,
    new_figure,
    ordered,
    plain_numbers,
    styles_of,
)


def factors_by_pair(factors: Mapping[str, rope.RopeFactors], scale: float, base: float, original_length: int) -> Figure:
    """lam by rotary pair for several methods, and below it the wavelengths that they lead to, against the original
    length.
    """
    figure, (upper, lower) = new_figure(2, 2.9, columns=1, sharex=True)
    for name, style in styles_of(factors).items():
        lam = np.asarray(factors[name].lam)
        wavelengths = 2 * np.pi / rope.frequencies(2 * len(lam), base)
        style = {**style, "markersize": 4, "label": label(name) + _start_tokens(factors[name])}
        upper.plot(lam, **style)
        lower.plot(wavelengths * lam, **style)
    upper.axhline(scale, color="black", linewidth=0.8, alpha=0.5)
    upper.annotate("s", (0, scale), xytext=(-2, 3), textcoords="offset points")
    upper.set(ylabel="rescale factor lambda", title="Rescale factors by rotary pair, high frequencies first")
    upper.legend(frameon=False, fontsize=8)
    for length, name in ((original_length, "L"), (original_length * scale, "L'")):
        lower.axhline(length, color="black", linewidth=0.8, alpha=0.5)
        lower.annotate(name, (0, length), xytext=(-2, 3), textcoords="offset points")
    lower.set(yscale="log", xlabel="rotary pair i", ylabel="wavelength (tokens)")
    return figure


def factors_by_length(factors: Mapping[int, rope.RopeFactors], original_length: int) -> Figure:
    """lam by rotary pair for every length (tokens) of a factor table, a logarithmic axis."""
    figure, (axes,) = new_figure(1, 3.6)
    lengths = sorted(factors)
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(lengths)))
    shown = None
    for length, color in zip(lengths, colors, strict=True):
        lam = np.asarray(factors[length].lam)
        if shown is not None and np.array_equal(lam, shown):
            continue  # an entry serves all lengths up to its boundary
        shown = lam
        name = f"at {length:,} tokens ({length / original_length:g}L)" + _start_tokens(factors[length])
        axes.plot(lam, color=color, marker="o", markersize=4, label=name)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set(xlabel="rotary pair i", ylabel="rescale factor lambda", title="LongRoPE's factors by sequence length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _start_tokens(factors: rope.RopeFactors) -> str:
    return f", {int(factors.n_hat)} start tokens unscaled" if int(factors.n_hat) else ""


_POINTS = 600
_BINS = 6  # an octave
_WAVES = 3  # of a pair without factors, as much as can be told apart
_SEEN, _KEPT, _UNSEEN = "#d9d9d9", "#1f77b4", "#f4b6b0"


def rotation_by_position(
    factors: Mapping[str, rope.RopeFactors], pairs: Sequence[int], length: int, original_length: int, base: float
) -> Figure:
    """cos of the angle of some rotary pairs by position, a panel a pair, a line a method.

    Args:
        factors: name -> unbatched factors; the temperature is left out.
        pairs: which; a panel shows three of its wavelengths, or all `length` tokens where those are fewer.
        length, original_length: tokens; the latter is marked.
        base: rope_theta.
    """
    figure, panels = new_figure(len(pairs), 1.7, columns=1)
    for axes, pair in zip(panels, pairs, strict=True):
        theta = rope.frequencies(2 * len(next(iter(factors.values())).lam), base)[pair]
        end = min(length, round(_WAVES * 2 * np.pi / theta))
        positions = np.unique(np.linspace(0, end, _POINTS).round())
        styles = styles_of(factors)
        # The first drawn is the widest, so that of methods that do the same all can be seen.
        for width, name in zip(np.linspace(5, 1.4, len(styles)), reversed(styles), strict=True):
            lam = np.where(positions < int(factors[name].n_hat), 1.0, float(factors[name].lam[pair]))
            style = dict(color=styles[name]["color"], linewidth=width, label=label(name))
            axes.plot(positions, np.cos(positions * theta / lam), **style)
        if end > original_length:
            mark_x(axes, original_length, "L")
        axes.set_title(f"pair {pair}: one turn in {2 * np.pi / theta:,.1f} tokens", fontsize=9)
        axes.set_xlim(0, end)
    panels[-1].set_xlabel("position (tokens)")
    figure.supylabel("cos of the angle", fontsize=9)
    legend_outside(figure, panels[0], "outside lower center", 4)
    return figure


def trained_range(factors: Mapping[str, rope.RopeFactors], length: int, original_length: int, base: float) -> Figure:
    """Up to which position every pair keeps to angles that pretraining has shown it, a panel a method.

    Args:
        factors: name -> unbatched factors.
        length, original_length: tokens; bars end at the former.
        base: rope_theta.
    """
    figure, panels = new_figure(len(factors), 2.4, columns=2 if len(factors) < 5 else 3)
    for axes, name in zip(panels, ordered(factors), strict=True):
        until = rope.trained_until(factors[name], original_length, base)
        pairs = np.arange(len(until))
        is_whole = np.isinf(until)
        kept = np.where(is_whole, 0, np.minimum(until, length))
        axes.barh(pairs[is_whole], length, height=0.9, color=_SEEN, label="has turned once within L: all angles seen")
        axes.barh(pairs, kept, height=0.9, color=_KEPT, label="angles that training has shown")
        unseen = np.where(is_whole, 0, length - kept)
        axes.barh(pairs, unseen, left=kept, height=0.9, color=_UNSEEN, label="angles never seen")
        axes.axvline(original_length, color="black", linewidth=0.8, alpha=0.5)
        axes.annotate("L", (original_length, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        axes.set(xlim=(0, length), ylim=(len(until) - 0.5, -0.5))
        axes.tick_params(labelsize=8)
        axes.set_title(label(name), fontsize=9)
    figure.supxlabel("position (tokens)", fontsize=9)
    figure.supylabel("rotary pair i", fontsize=9)
    legend_outside(figure, panels[0], "outside upper center", 3)
    return figure


def score_by_distance(
    factors: Mapping[str, rope.RopeFactors], length: int, original_length: int, base: float
) -> Figure:
    """How well a key matches a query of the same content, by their distance; see `rope.score_by_distance`. Means of
    a sixth of an octave.

    Args:
        factors: name -> unbatched factors.
        length, original_length: tokens; distances are below the former.
        base: rope_theta.
    """
    figure, (axes,) = new_figure(1, 3.0)
    distances = np.arange(1, length)
    bins = np.floor(np.log2(distances) * _BINS).astype(int)  # fast pairs oscillate: at long distances means are shown
    middles = np.exp([np.log(distances[bins == number]).mean() for number in np.unique(bins)])
    for name, style in styles_of(factors).items():
        scores = rope.score_by_distance(factors[name], distances, base)
        means = [scores[bins == number].mean() for number in np.unique(bins)]
        axes.plot(middles, means, **{**style, "marker": None})
    axes.axhline(0, color="black", linewidth=0.5)
    length_axis(axes, [2**n for n in range(int(np.log2(length)) + 1)])
    mark_x(axes, original_length, "L")
    ylabel = "score of equal content\n(1: same place, no temperature)"
    axes.set(xlabel="distance of key and query (tokens)", ylabel=ylabel)
    axes.legend(frameon=False, fontsize=8)
    return figure


def nll_by_changed_factor(changes: Mapping[int, Float[np.ndarray, "N"]], multiples: Sequence[float]) -> Figure:
    """The loss when one factor is multiplied by something and all others stay, a line a pair.

    Args:
        changes: rotary pair -> NLL (nats per token) at every multiple, less that without a change.
        multiples: by which the pair's factor was multiplied, rising.
    """
    figure, (axes,) = new_figure(1, 3.2)
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(changes)))
    for pair, color in zip(sorted(changes), colors, strict=True):
        axes.plot(multiples, changes[pair], color=color, marker="o", markersize=4, label=f"pair {pair}")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xscale("log")
    axes.set_xticks(multiples, [f"{multiple:.3g}" for multiple in multiples])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="lambda multiplied by", ylabel="NLL, change (nats per token)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def sensitivity_by_pair(gradients: Mapping[str, Float[np.ndarray, "half"]]) -> Figure:
    """d NLL / d log lambda by rotary pair, one group of bars for every name; logarithmic beyond a hundredth of a nat.

    Args:
        gradients: name -> nats per token, for a factor that becomes e times as large.
    """
    figure, (axes,) = new_figure(1, 3.0)
    width = 0.8 / len(gradients)
    for turn, (name, gradient) in enumerate(gradients.items()):
        places = np.arange(len(gradient)) + (turn - (len(gradients) - 1) / 2) * width
        axes.bar(places, gradient, width, label=name)
    axes.axhline(0, color="black", linewidth=0.5)
    # Slow pairs have slopes of some hundredths of a nat, fast ones of several.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_xticks(range(len(gradient)))
    axes.set(xlabel="rotary pair i", ylabel="d NLL / d log lambda\n(nats per token)")
    axes.set_title("How the loss depends on every factor")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
    return figure
