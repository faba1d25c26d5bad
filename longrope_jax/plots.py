"""The pictures of a report; each function draws one figure from plain numbers and returns it."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from longrope_jax import rope

STYLES: dict[str, dict] = {
    "longrope": dict(color="#d62728", linewidth=2.4, marker="o", zorder=5),
    "lambda_only": dict(color="#d62728", marker="o", linestyle="--", markerfacecolor="white"),
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
_SPENT = "forward equivalents spent (1: a candidate on all search documents)"
_HEADROOM = 1.03  # a convergence plot goes this far above the best seed and below the best candidate


def label(name: str) -> str:
    """What a reader is shown for the name of an arm."""
    return LABELS.get(name, name.replace("_", " "))


def control_label(name: str) -> str:
    """The same for an arm as a control."""
    return f"control: disjoint windows of L, {label(name)}"


def ordered(names: Iterable[str]) -> list[str]:
    """Known methods in the order of their styles, which is roughly best first, then the others."""
    return sorted(names, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))


def _styles(names: Iterable[str]) -> dict[str, dict]:
    """A style for every name; those without one of their own get the other colours in turn."""
    others = [name for name in names if name not in STYLES]
    return {
        name: STYLES.get(name)
        or dict(color=_OTHER_COLORS[others.index(name) % len(_OTHER_COLORS)], marker=".", linestyle="-.")
        for name in ordered(names)
    }


def perplexity_by_length(
    table: Mapping[int, Mapping[str, float]], original_length: int, controls: Sequence[str]
) -> Figure:
    """Perplexity against window length, a line an arm, both axes logarithmic (LongRoPE fig. 1).

    Args:
        table: length (tokens) -> arm -> perplexity.
        controls: arms whose value at the original length is drawn across.
    """
    figure, (axes,) = _panels(1, 4.0)
    lengths = sorted(table)
    for name, style in _styles(table[lengths[0]]).items():
        axes.plot(lengths, [table[length][name] for length in lengths], label=label(name), **style)
    for name, linestyle in zip(controls, itertools.cycle((":", "--", "-.")), strict=False):
        value = table[original_length][name]
        axes.axhline(value, color="black", linewidth=1, linestyle=linestyle, label=control_label(name))
    _mark_original_length(axes, original_length)
    _length_axis(axes, lengths)
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_ylabel("perplexity")
    axes.set_title("Perplexity by context length, the same tokens at every length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def nll_by_position(
    curves: Mapping[str, Sequence[float]],
    length: int,
    original_length: int,
    control: Sequence[float],
    control_name: str,
) -> Figure:
    """Where in windows of `length` tokens a method loses: perplexity, and the difference in NLL to the control.

    Args:
        curves: method -> NLL (nats per token) in equal buckets of positions.
        control: the same for disjoint windows of the original length. Buckets differ in how hard their text is, for
            all methods alike; the difference is free of that.
        control_name: its label.
    """
    figure, (upper, lower) = _panels(2, 2.9, columns=1)
    middles = (np.arange(len(control)) + 0.5) * length / len(control)
    for name, style in _styles(curves).items():
        style = {**style, "marker": None}
        upper.plot(middles, np.exp(curves[name]), label=label(name), **style)
        lower.plot(middles, np.subtract(curves[name], control), **style)
    upper.plot(middles, np.exp(control), color="black", linestyle=":", linewidth=1, label=control_name)
    lower.axhline(0, color="black", linestyle=":", linewidth=1)
    for axes in (upper, lower):
        _mark_original_length(axes, original_length)
    upper.set_yscale("log")
    _plain_numbers(upper.yaxis)
    upper.set_ylabel("perplexity")
    upper.set_title(f"Perplexity by position, windows of {length:,} tokens")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
    lower.set_xlim(0, length)
    lower.set_xlabel("position in the window (tokens)")
    lower.set_ylabel("NLL minus control (nats per token)")
    return figure


def factors_by_pair(factors: Mapping[str, rope.RopeFactors], scale: float, base: float, original_length: int) -> Figure:
    """lam by rotary pair for several methods, and below it the wavelengths that they lead to, against the original
    length.
    """
    figure, (upper, lower) = _panels(2, 2.9, columns=1)
    for name, style in _styles(factors).items():
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


def search_convergence(
    curve: Float[np.ndarray, "evaluations"],
    seeds: Mapping[str, float],
    population: int | None,
    costs: Sequence[float] | None = None,
) -> Figure:
    """Best score so far against what was spent, the seeds as lines.

    Args:
        curve: best NLL so far (nats per token).
        seeds: name -> NLL, None where it was not finite.
        population: how many candidates are population 0; None where there is no such thing.
        costs: forward equivalents spent after every candidate; without them candidates are counted.
    """
    figure, (axes,) = _panels(1, 3.2)
    seeds = {name: nll for name, nll in seeds.items() if nll is not None}
    ceiling = min(seeds.values(), default=curve[0])
    spent = np.arange(1, len(curve) + 1) if costs is None else costs
    axes.plot(spent, np.exp(curve), color=STYLES["longrope"]["color"], drawstyle="steps-post")
    for name, nll in seeds.items():
        if nll < ceiling + np.log(_HEADROOM):  # the others would squeeze the curve into a line
            axes.axhline(np.exp(nll), color=STYLES.get(name, {}).get("color"), linewidth=1, linestyle="--")
            axes.annotate(
                f"seed: {LABELS.get(name, name)}", (1, np.exp(nll)), xycoords=("axes fraction", "data"), ha="right",
                xytext=(0, 3), textcoords="offset points", fontsize=8,
            )  # fmt: skip
    if population is not None and population <= len(curve):
        end = spent[population - 1]
        axes.axvline(end, color="black", linewidth=0.8, alpha=0.5)
        axes.annotate("population 0", (end, 0), xycoords=("data", "axes fraction"), xytext=(4, 6),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_ylim(np.exp(curve[-1]) / _HEADROOM, np.exp(ceiling) * _HEADROOM)
    axes.set_xlabel("candidates evaluated" if costs is None else _SPENT)
    axes.set_ylabel("best perplexity on the search documents")
    axes.set_title("Search convergence")
    return figure


def search_overfitting(held_out: Float[np.ndarray, "changes 3"], spent: float) -> Figure:
    """The best so far on the documents of the search and on others, and below it how far apart they are.

    Args:
        held_out: forward equivalents, search score and held-out NLL (nats per token) whenever the best changed.
        spent: forward equivalents of the whole search.
    """
    figure, (upper, lower) = _panels(2, 2.2, columns=1)
    costs, scores, judged = np.concatenate([held_out, [[spent, *held_out[-1, 1:]]]]).T
    style = dict(drawstyle="steps-post", markevery=range(len(held_out)), marker=".")
    upper.plot(costs, np.exp(scores), label="search documents", color=STYLES["longrope"]["color"], **style)
    upper.plot(costs, np.exp(judged), label="held-out documents", color="#1f77b4", **style)
    lower.plot(costs, judged - scores, color="black", **style)
    upper.set_ylabel("perplexity of the best")
    upper.set_title("Overfitting to the search documents")
    upper.legend(frameon=False, fontsize=8)
    lower.set_ylabel("held out minus search\n(nats per token)")
    lower.set_xlabel(_SPENT)
    return figure


def _mark_original_length(axes, length: int) -> None:
    axes.axvline(length, color="black", linewidth=0.8, alpha=0.5)
    axes.annotate("L", (length, 0), xycoords=("data", "axes fraction"), xytext=(4, 4), textcoords="offset points")


def factors_by_length(factors: Mapping[int, rope.RopeFactors], original_length: int) -> Figure:
    """lam by rotary pair for every length (tokens) of a factor table, a logarithmic axis."""
    figure, (axes,) = _panels(1, 3.6)
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
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("rotary pair i")
    axes.set_ylabel("rescale factor lambda")
    axes.set_title("LongRoPE's factors by sequence length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def training_curves(stages: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss against step, a panel a stage: of the training batches and, where there is one, of held-out documents."""
    figure, panels = _panels(len(stages), 2.2)
    for axes, (stage, records) in zip(panels, stages.items(), strict=True):
        for key, name, color in (("loss", "training", "#1f77b4"), ("held_out_loss", "held out", "#d62728")):
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, color=color, linewidth=1.2)
        axes.set_title(stage, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=7)
    figure.supylabel("loss (nats per token)", fontsize=9)
    return figure


def retrieval_by_length(
    accuracy: Mapping[str, Mapping[int, tuple[float, float, float]]], original_length: int
) -> Figure:
    """Share of numbers found (LongRoPE fig. 4): arm -> length (tokens) -> the share and the ends of its interval."""
    figure, (axes,) = _panels(1, 3.2)
    for turn, (name, style) in enumerate(_styles(accuracy).items()):
        lengths = np.array(sorted(accuracy[name]))
        share, low, high = np.transpose([accuracy[name][length] for length in lengths])
        lengths = lengths * 1.03 ** (turn - (len(accuracy) - 1) / 2)  # side by side, or intervals would hide each other
        axes.plot(lengths, share, label=label(name), **style)
        axes.vlines(lengths, low, high, color=style["color"], linewidth=1, alpha=0.6)
    _mark_original_length(axes, original_length)
    _length_axis(axes, sorted(set().union(*accuracy.values())))
    axes.set_ylabel("share found, 95 % interval")
    axes.set_title("Retrieval by length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def retrieval_heatmap(
    accuracy: Mapping[str, Float[np.ndarray, "depths lengths"]], lengths: Sequence[int], depths: Sequence[float]
) -> Figure:
    """Share of hidden numbers found by their depth (0 is the beginning) and by length (tokens), a panel an arm."""
    figure, panels = _panels(len(accuracy), 0.7 + 0.26 * len(depths))
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


def _panels(count: int, height: float, columns: int = 3):
    """A figure and `count` panels, up to so many in a row, each so high (inches); of one column, with one x axis."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(7.2, 0.6 + height * rows), dpi=140, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=columns == 1 < count).ravel()
    for number, axes in enumerate(panels):
        axes.set_visible(number < count)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[:count]


def _length_axis(axes, lengths: Sequence[int]) -> None:
    """Logarithmic, a tick a length."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("length (tokens)")


def _start_tokens(factors: rope.RopeFactors) -> str:
    return f", {int(factors.n_hat)} start tokens unscaled" if int(factors.n_hat) else ""


def _plain_numbers(axis):
    """1, 2, 5, 10, 20 instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
