"""What a report says of perplexity: every method at every length, their differences, and where in a window they lie."""

from collections.abc import Container
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from longrope_jax import rope
from longrope_jax.evaluation.evaluate import EvaluationSettings, recorded_nll
from longrope_jax.evaluation.perplexity import compare, perplexity
from longrope_jax.model import LlamaConfig
from longrope_jax.report import plots
from longrope_jax.report.tables import DIFFERENCES, difference_cell, length_heading, picture, table

Records = list[dict[str, Any]]
Summary = dict[str, Any]
"""What `summarize_evaluation` makes."""

SUBJECT = "longrope"
"""The method that the others are compared with, where there is one of that name."""


def summarize_evaluation(settings: EvaluationSettings, made: Records, original_length: int) -> Summary:
    """By length and method the perplexity with its 95 % interval; the differences that were asked for, and those of the
    method `longrope` to all others and, at longer lengths, to the controls at the original length (tokens).
    """
    nll = {(record["length"], record["method"]): recorded_nll(record) for record in made}
    lengths = sorted({length for length, _ in nll})
    methods = [method for method in settings.methods if (lengths[0], method) in nll]
    summary: Summary = {
        "perplexity": {str(n): {method: perplexity(nll[n, method])._asdict() for method in methods} for n in lengths},
        "documents": sorted(set(made[0]["documents"])),
        "start_tokens": {
            method: {str(r["length"]): r["factors"]["n_hat"] for r in made if r["method"] == method}
            for method in methods
        },
        "compared": [
            {
                "methods": pair,
                "by_length": {str(n): compare(nll[n, pair[0]], nll[n, pair[1]])._asdict() for n in lengths},
            }
            for pair in settings.compared
        ],
        "longrope_minus": {},
        "longrope_minus_disjoint_windows_of_original_length": {},
    }
    if SUBJECT in methods:
        others = [method for method in methods if method != SUBJECT]
        controls = [method for method in settings.controls if (original_length, method) in nll]
        for n in lengths:
            mine = nll[n, SUBJECT]
            summary["longrope_minus"][str(n)] = {method: compare(mine, nll[n, method])._asdict() for method in others}
            if n > original_length:
                summary["longrope_minus_disjoint_windows_of_original_length"][str(n)] = {
                    method: compare(mine, nll[original_length, method])._asdict() for method in controls
                }
    return summary


def perplexity_table(summary: Summary, original_length: int) -> str:
    """Perplexity by method and length, in Markdown."""
    lengths = list(summary["perplexity"])
    header = ["", *(length_heading(int(n), original_length) for n in lengths)]
    rows = [
        [plots.label(method), *(f"{summary['perplexity'][n][method]['ppl']:.2f}" for n in lengths)]
        for method in plots.ordered(summary["perplexity"][lengths[0]])
    ]
    return table(header, rows)


def _suffix(stage: str) -> str:
    """What tells the figures of several evaluate stages apart."""
    return stage.removeprefix("evaluate")


def evaluation_figures(
    stage: str, summary: Summary, settings: EvaluationSettings, made: Records, config: LlamaConfig
) -> dict[str, Figure]:
    """By name: perplexity by length, and what the records allow of perplexity by position, and of factors by pair and
    by length.
    """
    figures: dict[str, Figure] = {}
    suffix, original = _suffix(stage), config.original_length
    by_length = {int(n): {method: e["ppl"] for method, e in row.items()} for n, row in summary["perplexity"].items()}
    controls = [method for method in settings.controls if original in by_length and method in by_length[original]]
    figures[f"perplexity_by_length{suffix}"] = plots.perplexity_by_length(by_length, original, controls)
    longest = max(by_length)
    curves = {r["method"]: r["nll_by_position"] for r in made if r["length"] == longest}
    at_original = {r["method"]: r["nll_by_position"] for r in made if r["length"] == original}
    if controls:
        figures[f"perplexity_by_position{suffix}"] = plots.nll_by_position(
            curves, longest, original, at_original[controls[0]], plots.control_label(controls[0])
        )
    used = {(r["method"], r["length"]): _factors(r["factors"]) for r in made}
    at_longest = {method: factors for (method, n), factors in used.items() if n == longest and method in plots.STYLES}
    at_longest.pop("unscaled", None)
    if at_longest:
        figures[f"factors{suffix}"] = plots.factors_by_pair(at_longest, longest / original, config.rope_theta, original)
    chosen = {n: factors for (method, n), factors in sorted(used.items()) if method == SUBJECT}
    if len({factors.lam.tobytes() for factors in chosen.values()}) > 1:
        figures[f"factors_by_length{suffix}"] = plots.factors_by_length(chosen, original)
    return figures


def _factors(numbers: dict[str, Any]) -> rope.RopeFactors:
    return rope.RopeFactors(**{name: np.array(value) for name, value in numbers.items()})


def evaluation_section(
    stage: str, summary: Summary, settings: EvaluationSettings, original_length: int, figures: Container[str]
) -> list[str]:
    """The section of a report.

    Args:
        original_length: tokens.
        figures: the names of those that could be drawn.
    """
    longest = list(summary["perplexity"])[-1]
    suffix = _suffix(stage)
    tokens = "every length scores the same tokens."
    if str(original_length) in summary["perplexity"]:
        tokens += (
            " The column of L is therefore the control for all longer ones: what a model does with disjoint windows of "
            "its original length."
        )
    parts = [
        f"## Perplexity by window length: {stage}\n",
        f"{len(summary['documents'])} evaluation documents, which neither training nor search has seen, cut into "
        f"windows of every length up to {longest} tokens: {tokens}\n",
        perplexity_table(summary, original_length),
        picture("perplexity by length", f"perplexity_by_length{suffix}"),
        _methods(summary, settings),
    ]
    if summary["compared"]:
        parts += _pairs(summary, original_length)
    if f"perplexity_by_position{suffix}" in figures:
        parts.append(picture("perplexity by position", f"perplexity_by_position{suffix}"))
    if summary["longrope_minus"]:
        parts += _comparisons(summary, longest, original_length)
    for name, what in ((f"factors{suffix}", "rescale factors"), (f"factors_by_length{suffix}", "factors by length")):
        if name in figures:
            parts.append(picture(what, name))
    return parts


def _methods(summary: Summary, settings: EvaluationSettings) -> str:
    """What each method is; with its start tokens by length where there are any."""
    header = ["", "factors", "model"]
    rows = [
        [plots.label(name), method.factors, method.model or "the latest before"]
        for name, method in settings.methods.items()
    ]
    tokens = summary["start_tokens"]
    if any(any(by_length.values()) for by_length in tokens.values()):
        lengths = ", ".join(summary["perplexity"])
        header.append(f"start tokens at {lengths}")
        rows = [
            [*row, ", ".join(str(tokens[name][n]) for n in summary["perplexity"])]
            for row, name in zip(rows, settings.methods, strict=True)
        ]
    return table(header, rows)


def _pairs(summary: Summary, original_length: int) -> list[str]:
    """The differences that were asked for, at every length."""
    lengths = list(summary["perplexity"])
    rows = [
        [
            " minus ".join(map(plots.label, pair["methods"])),
            *(difference_cell(pair["by_length"][n]) for n in lengths),
        ]
        for pair in summary["compared"]
    ]
    return [
        DIFFERENCES,
        table(["", *(length_heading(int(n), original_length) for n in lengths)], rows),
    ]


def _comparisons(summary: Summary, longest: str, original_length: int) -> list[str]:
    def row(label, entry):
        low, high = entry["ci95"]
        return [
            label,
            f"{entry['difference']:+.4f}",
            f"[{low:+.4f}, {high:+.4f}]",
            f"{100 * entry['improvement']:.1f} %",
            f"{100 * entry['documents_better']:.0f} %",
        ]

    parts = []
    for length in dict.fromkeys([longest, str(original_length)]):
        if length not in summary["longrope_minus"]:
            continue
        rows = [row(plots.label(method), entry) for method, entry in summary["longrope_minus"][length].items()]
        controls = summary["longrope_minus_disjoint_windows_of_original_length"].get(length, {})
        rows += [row(plots.control_label(method), entry) for method, entry in controls.items()]
        header = ["LongRoPE minus", "nats per token", "95 % interval", "perplexity lower by", "documents better"]
        parts += [f"### LongRoPE against the others at {length} tokens\n", table(header, rows)]
    return [
        *parts,
        "Differences are paired by document; the interval is a bootstrap over documents. Where the difference to a "
        "control is positive, the model does not make use of the longer context.\n",
    ]
