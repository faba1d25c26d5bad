"""How many hidden numbers are found."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from longrope_jax.plots.arms import label, ordered, styles_of
from longrope_jax.plots.axes import length_axis, mark_original_length, new_figure


def retrieval_by_length(
    accuracy: Mapping[str, Mapping[int, tuple[float, float, float]]], original_length: int
) -> Figure:
    """Share of numbers found (LongRoPE fig. 4): arm -> length (tokens) -> the share and the ends of its interval."""
    figure, (axes,) = new_figure(1, 3.2)
    for turn, (name, style) in enumerate(styles_of(accuracy).items()):
        lengths = np.array(sorted(accuracy[name]))
        share, low, high = np.transpose([accuracy[name][length] for length in lengths])
        lengths = lengths * 1.03 ** (turn - (len(accuracy) - 1) / 2)  # side by side, or intervals would hide each other
        axes.plot(lengths, share, label=label(name), **style)
        axes.vlines(lengths, low, high, color=style["color"], linewidth=1, alpha=0.6)
    mark_original_length(axes, original_length)
    length_axis(axes, sorted(set().union(*accuracy.values())))
    axes.set_ylabel("share found, 95 % interval")
    axes.set_title("Retrieval by length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def retrieval_heatmap(
    accuracy: Mapping[str, Float[np.ndarray, "depths lengths"]], lengths: Sequence[int], depths: Sequence[float]
) -> Figure:
    """Share of hidden numbers found by their depth (0 is the beginning) and by length (tokens), a panel an arm."""
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
