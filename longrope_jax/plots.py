"""The pictures of a report; each function draws one figure from plain numbers and returns it."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from longrope_jax import rope

STYLES: dict[str, dict] = {
    "longrope": dict(color="#d62728", linewidth=2.4, marker="o", zorder=5),
    "yarn": dict(color="#1f77b4", marker="s"),
    "yarn_without_temperature": dict(color="#1f77b4", marker="s", linestyle="--", markerfacecolor="white"),
    "dynamic_ntk": dict(color="#2ca02c", marker="^", linestyle="--", markerfacecolor="white"),
    "ntk": dict(color="#2ca02c", marker="^"),
    "linear": dict(color="#9467bd", marker="D"),
    "unscaled": dict(color="#7f7f7f", marker="v"),
}
LABELS = {
    "longrope": "LongRoPE (searched)",
    "yarn": "YaRN",
    "yarn_without_temperature": "YaRN, no temperature",
    "dynamic_ntk": "Dynamic NTK",
    "ntk": "NTK",
    "linear": "PI (linear)",
    "unscaled": "unscaled",
}


_HEADROOM = 1.03  # a convergence plot goes this far above the best seed and below the best candidate
CONTROL = "control: disjoint windows of L, unscaled"


def perplexity_by_length(table: Mapping[int, Mapping[str, float]], original_length: int) -> Figure:
    """Perplexity against window length, a line a method, both axes logarithmic.

    Args:
        table: length (tokens) -> method -> perplexity.
    """
    figure, axes = _figure(7.2, 4.6)
    lengths = sorted(table)
    for method in _ordered(table[lengths[0]]):
        values = [table[length][method] for length in lengths]
        axes.plot(lengths, values, label=LABELS.get(method, method), **STYLES.get(method, {}))
    if original_length in table and "unscaled" in table[original_length]:
        control = table[original_length]["unscaled"]
        axes.axhline(control, color="black", linewidth=1, linestyle=":", label=CONTROL)
    _mark_original_length(axes, original_length)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("window length (tokens)")
    axes.set_ylabel("perplexity")
    axes.set_title("Perplexity by context length, the same tokens at every length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def nll_by_position(
    curves: Mapping[str, Sequence[float]], length: int, original_length: int, control: Sequence[float]
) -> Figure:
    """Where in windows of `length` tokens a method loses: perplexity, and the difference in NLL to the control.

    Args:
        curves: method -> NLL (nats per token) in equal buckets of positions.
        control: the same for the unscaled model in disjoint windows of the original length. Buckets differ in how hard
            their text is, for all methods alike; the difference is free of that.
    """
    figure = Figure(figsize=(7.2, 6.4), dpi=140, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    middles = (np.arange(len(control)) + 0.5) * length / len(control)
    for method in _ordered(curves):
        style = {**STYLES.get(method, {}), "marker": None}
        upper.plot(middles, np.exp(curves[method]), label=LABELS.get(method, method), **style)
        lower.plot(middles, np.subtract(curves[method], control), **style)
    upper.plot(middles, np.exp(control), color="black", linestyle=":", linewidth=1, label=CONTROL)
    lower.axhline(0, color="black", linestyle=":", linewidth=1)
    for axes in (upper, lower):
        _mark_original_length(axes, original_length)
        axes.spines[["top", "right"]].set_visible(False)
    upper.set_yscale("log")
    _plain_numbers(upper.yaxis)
    upper.set_ylabel("perplexity")
    upper.set_title(f"Perplexity by position, windows of {length:,} tokens")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=4)
    lower.set_xlim(0, length)
    lower.set_xlabel("position in the window (tokens)")
    lower.set_ylabel("NLL minus control (nats per token)")
    return figure


def factors_by_pair(factors: Mapping[str, rope.RopeFactors], scale: float, base: float, original_length: int) -> Figure:
    """lam by rotary pair for several methods, and below it the wavelengths that they lead to, against the original
    length.
    """
    figure = Figure(figsize=(7.2, 6.4), dpi=140, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for method in _ordered(factors):
        lam = np.asarray(factors[method].lam)
        wavelengths = 2 * np.pi / rope.frequencies(2 * len(lam), base)
        style = {**STYLES.get(method, {}), "markersize": 4}
        label = LABELS.get(method, method)
        if int(factors[method].n_hat):
            label += f", {int(factors[method].n_hat)} start tokens unscaled"
        upper.plot(lam, label=label, **style)
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
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def search_convergence(curve: Float[np.ndarray, "evaluations"], seeds: Mapping[str, float], population: int) -> Figure:
    """Best score so far against the number of candidates scored, the seeds as lines.

    Args:
        curve: best NLL so far (nats per token).
        seeds: name -> NLL, None where it was not finite.
        population: where population 0 ends.
    """
    figure, axes = _figure(7.2, 3.8)
    seeds = {name: nll for name, nll in seeds.items() if nll is not None}
    ceiling = min(seeds.values(), default=curve[0])
    axes.plot(np.arange(1, len(curve) + 1), np.exp(curve), color=STYLES["longrope"]["color"], drawstyle="steps-post")
    for name, nll in seeds.items():
        if nll < ceiling + np.log(_HEADROOM):  # the others would squeeze the curve into a line
            axes.axhline(np.exp(nll), color=STYLES.get(name, {}).get("color"), linewidth=1, linestyle="--")
            axes.annotate(
                f"seed: {LABELS.get(name, name)}", (1, np.exp(nll)), xycoords=("axes fraction", "data"), ha="right",
                xytext=(0, 3), textcoords="offset points", fontsize=8,
            )  # fmt: skip
    axes.axvline(population, color="black", linewidth=0.8, alpha=0.5)
    axes.annotate("population 0", (population, 0), xycoords=("data", "axes fraction"), xytext=(4, 6),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_ylim(np.exp(curve[-1]) / _HEADROOM, np.exp(ceiling) * _HEADROOM)
    axes.set_xlabel("candidates evaluated")
    axes.set_ylabel("best perplexity on the search documents")
    axes.set_title("Search convergence")
    return figure


def _mark_original_length(axes, length: int) -> None:
    axes.axvline(length, color="black", linewidth=0.8, alpha=0.5)
    axes.annotate("L", (length, 1), xycoords=("data", "axes fraction"), xytext=(4, -12), textcoords="offset points")


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _ordered(methods):
    """Known methods in the order of their styles, which is roughly best first, then the others."""
    return sorted(methods, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))


def _plain_numbers(axis):
    """1, 2, 5, 10, 20 instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
