"""What a report says of a search: what it found, what it cost, and what of it was learnt of its documents only."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from longrope_jax.report import plots
from longrope_jax.report.tables import picture

Summary = dict[str, Any]
"""The summary of a search stage with the factors it found."""


def search_figures(search: Summary) -> dict[str, Figure]:
    """By name: how the search converged and, where it was judged on held-out documents, how they differ."""
    stage, costs = search["stage"], search["costs"]
    curve = np.array(search["curve"], float)
    # Of other methods nobody has to know which candidates were the first ones.
    population = search["population"] if search["method"] == "evolution" else None
    figures = {f"convergence_{stage}": plots.search_convergence(curve, search["seeds"], population, costs)}
    if search["held_out"]:
        spent = search["costs"][-1]
        figures[f"overfitting_{stage}"] = plots.search_overfitting(np.array(search["held_out"], float), spent)
    return figures


def search_section(search: Summary) -> list[str]:
    """The section of a report."""
    stage, found = search["stage"], search["factors"]
    seeds = ", ".join(
        f"{plots.label(name)} " + ("not finite" if nll is None else f"{np.exp(nll):.2f}")
        for name, nll in search["seeds"].items()
    )
    method = f"By {search['method'].replace('_', ' ')}: " if "method" in search else ""
    parts = [
        f"## Search: {stage}, {search['target_length']} tokens, on the model of {search['model']}\n",
        f"{method}{_cost(search)} Perplexity on the {len(search['documents'])} search documents: "
        f"{np.exp(search['best_nll']):.2f}; seeds: {seeds}.\n",
        f"n_hat = {found['n_hat']}, lambda = {', '.join(f'{value:.2f}' for value in found['lam'])}\n",
        picture("search convergence", f"convergence_{stage}"),
    ]
    if search["held_out"]:
        parts += [_overfitting(search["held_out"]), picture("overfitting", f"overfitting_{stage}")]
    return parts


def _cost(search: Summary) -> str:
    scoring = search["objective_seconds"] / search["seconds"]
    time = f"in {search['seconds']:.1f} s, {100 * scoring:.1f} % of it scoring candidates"
    count = search["evaluations"]
    read = float(np.minimum(np.diff(search["costs"], prepend=0), 1).sum())  # what is above 1 are steps of a descent
    steps = search["costs"][-1] - read
    told = f"{count} candidates for {read + steps:.1f} forward equivalents (1 is a candidate on all search documents)"
    if steps > 0.05:
        told += f", {steps:.1f} of them gradient steps"
    told += f", {time}."
    if search["dropped"]:
        told += (
            f" {search['dropped']} were read in part, until it was plain where they stand: "
            f"{100 * read / count:.0f} % of the documents that all candidates have together."
        )
    return told


def _overfitting(held_out: list[list[float]]) -> str:
    costs, scores, judged = np.array(held_out, float).T
    gained, carried = scores[0] - scores[-1], judged[0] - judged[-1]
    told = (
        f"Overfitting: on documents that the search has not seen the best candidate is at {judged[-1]:.3f} nats per "
        f"token, {judged[-1] - scores[-1]:+.3f} to its search score; for the best at {costs[0]:.0f} forward "
        f"equivalents it was {judged[0] - scores[0]:+.3f}. "
    )
    if gained > 0:
        told += (
            f"From there on the search gained {gained:.3f} nats on its own documents and {carried:.3f} on the others "
            f"({100 * carried / gained:.0f} %). "
        )
    if judged.min() < judged[-1]:
        told += (
            f"The best on the others came at {costs[judged.argmin()]:.0f} forward equivalents already, "
            f"{judged[-1] - judged.min():.3f} nats below the last.\n"
        )
    else:
        told += "No earlier one was better on them.\n"
    return told
