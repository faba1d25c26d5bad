"""Rescale factors by rotary pair and by length."""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from longrope_jax import rope
from longrope_jax.plots.arms import label, styles_of
from longrope_jax.plots.axes import new_figure, plain_numbers


def factors_by_pair(factors: Mapping[str, rope.RopeFactors], scale: float, base: float, original_length: int) -> Figure:
    """lam by rotary pair for several methods, and below it the wavelengths that they lead to, against the original
    length.
    """
    figure, (upper, lower) = new_figure(2, 2.9, columns=1)
    for name, style in styles_of(factors).items():
        lam = np.asarray(factors[name].lam)
        wavelengths = 2 * np.pi / rope.frequencies(2 * len(lam), base)
        style = {**style, "markersize": 4}
        upper.plot(lam, label=label(name) + _start_tokens(factors[name]), **style)
        lower.plot(wavelengths * lam, **style)
    upper.axhline(scale, color="black", linewidth=0.8, alpha=0.5)
    upper.annotate("s", (0, scale), xytext=(-2, 3), textcoords="offset points")
    upper.set_ylabel("rescale factor lambda")
    upper.set_title("Rescale factors by rotary pair, high frequencies first")
    upper.legend(frameon=False, fontsize=8)
    for length, name in ((original_length, "L"), (original_length * scale, "L'")):
        lower.axhline(length, color="black", linewidth=0.8, alpha=0.5)
        lower.annotate(name, (0, length), xytext=(-2, 3), textcoords="offset points")
    lower.set_yscale("log")
    lower.set_xlabel("rotary pair i")
    lower.set_ylabel("wavelength (tokens)")
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
    axes.set_xlabel("rotary pair i")
    axes.set_ylabel("rescale factor lambda")
    axes.set_title("LongRoPE's factors by sequence length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _start_tokens(factors: rope.RopeFactors) -> str:
    return f", {int(factors.n_hat)} start tokens unscaled" if int(factors.n_hat) else ""
