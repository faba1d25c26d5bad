"""How the loss of a model answers to its factors."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from longrope_jax.plots.axes import new_figure

_LINEAR = 0.01  # nats: slow pairs have slopes of some hundredths, fast ones of several


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
    axes.xaxis.set_major_locator(FixedLocator(multiples))
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("lambda multiplied by")
    axes.set_ylabel("NLL, change (nats per token)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def sensitivity_by_pair(gradients: Mapping[str, Float[np.ndarray, "half"]]) -> Figure:
    """d NLL / d log lambda by rotary pair, one group of bars for every name; logarithmic beyond a hundredth of a nat.

    Args:
        gradients: name -> nats per token, for a factor that becomes e times as large.
    """
    figure, (axes,) = new_figure(1, 3.0)
    width = 0.8 / len(gradients)
    colors = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd")
    for turn, (name, gradient) in enumerate(gradients.items()):
        places = np.arange(len(gradient)) + (turn - (len(gradients) - 1) / 2) * width
        axes.bar(places, gradient, width, label=name, color=colors[turn % len(colors)])
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.xaxis.set_major_locator(FixedLocator(range(len(gradient))))
    axes.set_xlabel("rotary pair i")
    axes.set_ylabel("d NLL / d log lambda\n(nats per token)")
    axes.set_title("How the loss depends on every factor")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
    return figure
