"""What a report says of retrieval: the share of hidden numbers that were found, by length and depth."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from longrope_jax.evaluation.retrieval import RetrievalSettings, accuracy
from longrope_jax.report import plots
from longrope_jax.report.page import Parts, Picture
from longrope_jax.report.tables import markdown_table, share_cell

Records = list[dict[str, Any]]


def summarize_retrieval(settings: RetrievalSettings, records: Records) -> dict[str, Any]:
    """By method and length: hits, tries, their share with its 95 % interval over all depths; and the share by depth
    where depths were given.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for method in settings.methods:
        for length in sorted(settings.lengths):
            cells = [record for record in records if (record["method"], record["length"]) == (method, length)]
            hits, tries = (sum(cell[key] for cell in cells) for key in ("hits", "tries"))
            share, ci95 = accuracy(hits, tries)
            entry = {"hits": hits, "tries": tries, "accuracy": share, "ci95": ci95}
            if settings.depths:
                entry["by_depth"] = {f"{cell['depth']:g}": cell["hits"] / cell["tries"] for cell in cells}
            found.setdefault(method, {})[str(length)] = entry
    return {"task": settings.task, "seed": settings.seed, "accuracy": found}


def retrieval_figure(summary: dict[str, Any], original_length: int) -> Figure:
    """A heat map of depth and length, or accuracy by length where depths were drawn."""
    found = summary["accuracy"]
    lengths = [int(length) for length in next(iter(found.values()))]
    depths = next(iter(next(iter(found.values())).values())).get("by_depth")
    if depths is None:
        curves = {
            method: {int(n): (entry["accuracy"], *entry["ci95"]) for n, entry in by_length.items()}
            for method, by_length in found.items()
        }
        return plots.retrieval_by_length(curves, original_length)
    grids = {
        method: np.array([[entry["by_depth"][depth] for entry in by_length.values()] for depth in depths])
        for method, by_length in found.items()
    }
    return plots.retrieval_heatmap(grids, lengths, [float(depth) for depth in depths])


def retrieval_section(stage: str, summary: dict[str, Any], original_length: int) -> Parts:
    """The section of a report; its figure is named like the stage."""
    found = summary["accuracy"]
    lengths = list(next(iter(found.values())))
    rows = [
        [plots.label(method), *(share_cell(found[method][length]) for length in lengths)]
        for method in plots.ordered(found)
    ]
    return [
        f"## Retrieval: {stage}, {summary['task']}\n",
        "How often the first number in a greedy continuation was the hidden one; lengths are tokens of prompt and "
        f"answer together; 95 % Wilson intervals; seed {summary['seed']}.\n",
        markdown_table(["", *lengths], rows),
        Picture("numbers found", stage, retrieval_figure(summary, original_length)),
    ]
