"""The search part of a report: what the search found, its cost, and how far it overfits its documents."""

from typing import Any

import numpy as np
from jaxtyping import Float

from longrope_jax.report import plots
from longrope_jax.report.page import Parts, Picture

Summary = dict[str, Any]
"""The summary of a search stage with the factors it found."""


def search_section(search: Summary) -> Parts:
    """The section of a report: with pictures of convergence and, for a search with held-out documents, overfitting."""
    stage, found, yarn, costs = search["stage"], search["factors"], search["yarn"], search["costs"]
    seeds = ", ".join(
        f"{plots.label(name)} " + ("not finite" if nll is None else f"{np.exp(nll):.2f}")
        for name, nll in search["seeds"].items()
    )
    population = search["population"] if search["method"] == "evolution" else None
    convergence = plots.search_convergence(np.array(search["curve"], float), search["seeds"], population, costs)
    parts: Parts = [
        f"## Search for {search['target_length']} tokens (stage `{stage}`, model of stage `{search['model']}`)\n",
        f"By {search['method'].replace('_', ' ')}: {_cost(search)} Perplexity on the {len(search['documents'])} search "
        f"documents: {np.exp(search['best_nll']):.2f}; seeds: {seeds}.\n",
        *([f"YaRN with beta_fast = {yarn[0]:g}, beta_slow = {yarn[1]:g}, s = {yarn[2]:g}.\n"] if yarn else []),
        f"n_hat = {found['n_hat']}, lambda = {', '.join(f'{value:.2f}' for value in found['lam'])}\n",
        Picture("search convergence", f"convergence_{stage}", convergence),
    ]
    if search["held_out"]:
        held_out = np.array(search["held_out"], float)
        figure = plots.search_overfitting(held_out, costs[-1])
        parts += [_overfitting(held_out), Picture("overfitting", f"overfitting_{stage}", figure)]
    return parts


def _cost(search: Summary) -> str:
    costs, count = search["costs"], search["evaluations"]
    screening = search["screening"]
    # A cost above 1 includes gradient steps.
    read = float(np.minimum(np.diff(costs, prepend=0) - screening, 1).sum())
    steps = costs[-1] - read - screening * count
    text = f"{count} candidates for {costs[-1]:.1f} forward equivalents (1 is a candidate on all search documents)"
    if screening:
        text += f", {screening * count:.1f} of them on skipped positions"
    if steps > 0.05:
        text += f", {steps:.1f} of them gradient steps"
    scoring = search["objective_seconds"] / search["seconds"]
    text += f", in {search['seconds']:.1f} s, {100 * scoring:.1f} % of it scoring candidates."
    if search["dropped"]:
        text += (
            f" {search['dropped']} candidates were not read in full: all candidates together read "
            f"{100 * read / count:.0f} % of their documents."
        )
    return text


def _overfitting(history: Float[np.ndarray, "changes 3"]) -> str:
    """The text on overfitting.

    Args:
        history: forward equivalents, search score and held-out NLL (nats per token) whenever the best changed.
    """
    costs, scores, held_out = history.T
    search_gain, held_out_gain = scores[0] - scores[-1], held_out[0] - held_out[-1]
    text = (
        f"Overfitting: on held-out documents, which the search has not seen, the best candidate has {held_out[-1]:.3f} "
        f"nats per token, {held_out[-1] - scores[-1]:+.3f} relative to its search score. The best candidate at "
        f"{costs[0]:.0f} forward equivalents had {held_out[0] - scores[0]:+.3f}. "
    )
    if search_gain > 0:
        text += (
            f"From there the search gained {search_gain:.3f} nats on its own documents and {held_out_gain:.3f} on the "
            f"held-out ones ({100 * held_out_gain / search_gain:.0f} %). "
        )
    if held_out.min() < held_out[-1]:
        return text + (
            f"The best candidate on the held-out documents came at {costs[held_out.argmin()]:.0f} forward equivalents, "
            f"{held_out[-1] - held_out.min():.3f} nats below the last.\n"
        )
    return text + "No earlier candidate was better on them.\n"
