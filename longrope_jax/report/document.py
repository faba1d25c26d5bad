"""The report of a run: the headline first, then tables and figures of every stage."""

from typing import Any

import numpy as np
from etils import epath

from longrope_jax.evaluation.evaluate import EvaluationSettings
from longrope_jax.evaluation.factor_switching import Cost
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.model import LlamaConfig
from longrope_jax.report import perplexity, plots, retrieval
from longrope_jax.report.model_card import cost_table
from longrope_jax.report.page import Parts, Picture, write_pages
from longrope_jax.report.search import search_section
from longrope_jax.report.tables import markdown_table
from longrope_jax.runtime import json_lines
from longrope_jax.runtime.processes import write_json

Records = list[dict[str, Any]]
Evaluations = dict[str, tuple[EvaluationSettings, Records]]
"""Stage -> the settings of an evaluation, and its records."""


def summarize(
    config: LlamaConfig,
    evaluations: Evaluations,
    retrievals: dict[str, tuple[RetrievalSettings, Records]],
    searches: Records,
    exports: dict[str, dict[str, Any]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        retrievals: like `evaluations`.
        searches: the summary of every search stage, see `report.search`.
        exports: the summary of every export stage.
        seconds: wall time by stage.
    """
    evaluated = {
        stage: perplexity.summarize_evaluation(*evaluation, config.original_length)
        for stage, evaluation in evaluations.items()
    }
    return {
        "original_length": config.original_length,
        "perplexity": list(evaluated.values())[-1]["perplexity"] if evaluated else {},  # the last is the final word
        "evaluations": evaluated,
        "retrieval": {stage: retrieval.summarize_retrieval(*found) for stage, found in retrievals.items()},
        "search": searches,
        "exports": exports,
        "seconds": seconds,
    }


def write_report(
    workdir: epath.Path, config: LlamaConfig, report: dict[str, Any], evaluations: Evaluations
) -> epath.Path:
    """Writes report.json (the result of `summarize`), report.md with its figures, and the same as one page, report.html
    with its pictures inside; returns the path of report.md.
    """
    write_json(workdir / "report.json", report)
    parts: Parts = ["# Report\n", _headline(report)]
    for stage, evaluation in report["evaluations"].items():
        parts += perplexity.evaluation_section(stage, evaluation, *evaluations[stage], config)
    for stage, found in report["retrieval"].items():
        parts += retrieval.retrieval_section(stage, found, config.original_length)
    parts += _training_section(workdir)
    for search in report["search"]:
        parts += search_section(search)
    for stage, export in report["exports"].items():
        parts += _export_section(stage, export)
    seconds = [[stage, f"{value:.1f}"] for stage, value in report["seconds"].items()]
    parts += [
        "## Model\n",
        f"{config.num_layers} layers, head dimension {config.head_dim}, original length L = {config.original_length} "
        "tokens.\n",
        "## Seconds by stage\n",
        markdown_table(["stage", "seconds"], seconds),
    ]
    return write_pages(workdir, "report", parts)


def summary_tables(report: dict[str, Any]) -> str:
    """The headline, and perplexity by method and length in one Markdown table per evaluation, for a terminal."""
    tables = [
        f"{perplexity.evaluation_title(stage)}\n{perplexity.perplexity_table(evaluation, report['original_length'])}"
        for stage, evaluation in report["evaluations"].items()
    ]
    return "\n".join([_headline(report), *tables, ""])


def _headline(report: dict[str, Any]) -> str:
    """The result in one sentence per evaluation; without an evaluation, that of the searches."""
    evaluations = report["evaluations"]
    if len(evaluations) > 1:
        return "".join(f"* Stage `{stage}`: {evaluation['headline']}\n" for stage, evaluation in evaluations.items())
    if evaluations:
        return f"{next(iter(evaluations.values()))['headline']}\n"
    found = [
        f"The search for {search['target_length']:,} tokens found perplexity {np.exp(search['best_nll']):.2f} on "
        "its own documents.\n"
        for search in report["search"]
    ]
    return "".join([*found, "This run has no perplexity on evaluation documents.\n"])


def _training_section(workdir: epath.Path) -> Parts:
    stages: dict[str, Records] = {}
    for record in json_lines.read(workdir / "metrics.jsonl", {"step": int}):
        stages.setdefault(record["stage"], []).append(record)
    return ["## Training\n", Picture("loss by step", "training", plots.training_curves(stages))] if stages else []


def _export_section(stage: str, export: dict[str, Any]) -> list[str]:
    lengths = " and ".join(f"{length:,}" for length in export["lengths"])
    parts = [
        f"## Export: {stage}\n",
        f"[{export['folder']}/]({export['folder']}/README.md): {export['architecture']}, {export['dtype']}, factors "
        f"for up to {lengths} tokens.\n",
    ]
    if export["dropped"]:
        parts.append(
            f"Not in the export, because the format has no place for it: {'; '.join(export['dropped'].values())}.\n"
        )
    if export["costs"]:
        parts.append(cost_table([Cost.from_record(record) for record in export["costs"]]))
    return parts
