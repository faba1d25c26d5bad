"""What trainings and searches do step by step."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from longrope_jax.report.plots.style import STYLES, label, mark_x, new_figure

_SPENT = "forward equivalents spent (1: a candidate on all search documents)"
_HEADROOM = 1.03  # a convergence plot goes this far above the best seed and below the best candidate


def training_curves(stages: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss against step, a panel a stage: of the training batches and, where there is one, of held-out documents."""
    figure, panels = new_figure(len(stages), 2.2)
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


def search_convergence(
    curve: Float[np.ndarray, "evaluations"],
    seeds: Mapping[str, float],
    population: int | None,
    costs: Sequence[float],
) -> Figure:
    """Best score so far against the cost of the search, the seeds as lines.

    Args:
        curve: best NLL so far (nats per token).
        seeds: name -> NLL, None where it was not finite.
        population: how many candidates are population 0; None where there is no such thing.
        costs: forward equivalents spent after every candidate.
    """
    figure, (axes,) = new_figure(1, 3.2)
    seeds = {name: nll for name, nll in seeds.items() if nll is not None}
    ceiling = min(seeds.values(), default=curve[0])
    axes.plot(costs, np.exp(curve), color=STYLES["longrope"]["color"], drawstyle="steps-post")
    for name, nll in seeds.items():
        if nll < ceiling + np.log(_HEADROOM):  # the others would squeeze the curve into a line
            axes.axhline(np.exp(nll), color=STYLES.get(name, {}).get("color"), linewidth=1, linestyle="--")
            axes.annotate(
                f"seed: {label(name)}", (1, np.exp(nll)), xycoords=("axes fraction", "data"), ha="right",
                xytext=(0, 3), textcoords="offset points", fontsize=8,
            )  # fmt: skip
    if population is not None and population <= len(curve):
        mark_x(axes, costs[population - 1], "population 0")
    axes.set_ylim(np.exp(curve[-1]) / _HEADROOM, np.exp(ceiling) * _HEADROOM)
    axes.set(xlabel=_SPENT, ylabel="best perplexity on the search documents", title="Search convergence")
    return figure


def search_overfitting(held_out: Float[np.ndarray, "changes 3"], spent: float) -> Figure:
    """The best so far on the documents of the search and on others, and below it how far apart they are.

    Args:
        held_out: forward equivalents, search score and held-out NLL (nats per token) whenever the best changed.
        spent: forward equivalents of the whole search.
    """
    figure, (upper, lower) = new_figure(2, 2.2, columns=1, sharex=True)
    costs, scores, held_out_nll = np.concatenate([held_out, [[spent, *held_out[-1, 1:]]]]).T
    style = dict(drawstyle="steps-post", markevery=range(len(held_out)), marker=".")
    upper.plot(costs, np.exp(scores), label="search documents", color=STYLES["longrope"]["color"], **style)
    upper.plot(costs, np.exp(held_out_nll), label="held-out documents", color="#1f77b4", **style)
    lower.plot(costs, held_out_nll - scores, color="black", **style)
    upper.set(ylabel="perplexity of the best", title="Overfitting to the search documents")
    upper.legend(frameon=False, fontsize=8)
    lower.set(xlabel=_SPENT, ylabel="held out minus search\n(nats per token)")
    return figure
