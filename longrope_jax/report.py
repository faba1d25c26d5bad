"""A run's records -> report.json, report.md with figures, and report.html: all that the paper's readers ask for."""

import io
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from longrope_jax import plots, rope, whole_files
from longrope_jax.evaluation.perplexity import compare, perplexity
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.evaluation.run import EvaluationSettings, recorded_nll
from longrope_jax.evaluation.substitution import Cost
from longrope_jax.interop.model_card import cost_table
from longrope_jax.markdown import picture, table
from longrope_jax.model import LlamaConfig
from longrope_jax.page import to_page
from longrope_jax.report_retrieval import retrieval_figure, retrieval_section, summarize_retrieval
from longrope_jax.report_search import search_figures, search_section
from longrope_jax.runtime import records
from longrope_jax.runtime.records import to_json, write_whole

Records = list[dict[str, Any]]
Evaluations = dict[str, tuple[EvaluationSettings, Records]]
"""Of every evaluate stage its settings and what `evaluation.run` made."""

Retrievals = dict[str, tuple[RetrievalSettings, Records]]
"""The same of every retrieval stage."""

SUBJECT = "longrope"
"""The arm that the others are compared with, where there is one of that name."""


def summarize(
    config: LlamaConfig,
    evaluations: Evaluations,
    retrievals: Retrievals,
    searches: Records,
    exports: dict[str, dict[str, Any]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        searches: the summary of every search stage, see `report_search`.
        exports: the summary of every export stage.
        seconds: wall time by stage.
    """
    made = {stage: _evaluation(config, *evaluation) for stage, evaluation in evaluations.items()}
    return {
        "original_length": config.original_length,
        "perplexity": list(made.values())[-1]["perplexity"] if made else {},  # the last stage's is the final word
        "evaluations": made,
        "retrieval": {stage: summarize_retrieval(*retrieval) for stage, retrieval in retrievals.items()},
        "search": searches,
        "exports": exports,
        "seconds": seconds,
    }


def _evaluation(config: LlamaConfig, settings: EvaluationSettings, evaluation: Records) -> dict[str, Any]:
    nll = {(r["length"], r["method"]): recorded_nll(r) for r in evaluation}
    lengths = sorted({length for length, _ in nll})
    arms = [arm for arm in settings.arms if (lengths[0], arm) in nll]
    original = config.original_length
    result: dict[str, Any] = {
        "perplexity": {str(n): {arm: perplexity(nll[n, arm])._asdict() for arm in arms} for n in lengths},
        "documents": sorted(set(evaluation[0]["documents"])),
        "start_tokens": {
            arm: {str(r["length"]): r["factors"]["n_hat"] for r in evaluation if r["method"] == arm} for arm in arms
        },
        "compared": [
            {"arms": pair, "by_length": {str(n): compare(nll[n, pair[0]], nll[n, pair[1]])._asdict() for n in lengths}}
            for pair in settings.compared
        ],
        "longrope_minus": {},
        "longrope_minus_disjoint_windows_of_original_length": {},
    }
    if SUBJECT in arms:
        others = [arm for arm in arms if arm != SUBJECT]
        controls = [arm for arm in settings.controls if (original, arm) in nll]
        for n in lengths:
            mine = nll[n, SUBJECT]
            result["longrope_minus"][str(n)] = {arm: compare(mine, nll[n, arm])._asdict() for arm in others}
            if n > original:
                result["longrope_minus_disjoint_windows_of_original_length"][str(n)] = {
                    arm: compare(mine, nll[original, arm])._asdict() for arm in controls
                }
    return result


def write_report(
    workdir: epath.Path, config: LlamaConfig, report: dict[str, Any], evaluations: Evaluations
) -> epath.Path:
    """Writes what `summarize` made as report.json, report.md with its figures, and the same as one page, report.html,
    which holds its pictures; returns the path of report.md.
    """
    write_whole(workdir / "report.json", to_json(report, indent=1) + "\n")
    figures: dict[str, Figure] = {}
    for stage, (settings, evaluation) in evaluations.items():
        figures |= _evaluation_figures(config, report["evaluations"][stage], settings, evaluation, _suffix(stage))
    for stage, retrieval in report["retrieval"].items():
        figures[stage] = retrieval_figure(retrieval, config.original_length)
    for search in report["search"]:
        figures |= search_figures(search)
    training = _training_curves(workdir)
    if training:
        figures["training"] = plots.training_curves(training)
    (workdir / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        drawn = io.BytesIO()
        figure.savefig(drawn)
        whole_files.write_whole(workdir / "figures" / f"{name}.png", drawn.getvalue())
    text = _markdown(config, report, evaluations, set(figures))
    path = workdir / "report.md"
    write_whole(path, text)
    write_whole(workdir / "report.html", to_page(text, workdir))
    return path


def summary_tables(report: dict[str, Any]) -> str:
    """Perplexity by arm and length as Markdown tables, one an evaluation, readable in a terminal as well."""
    return "".join(
        f"Perplexity by window length: {stage}\n{_perplexity_table(evaluation, report['original_length'])}\n"
        for stage, evaluation in report["evaluations"].items()
    )


def _perplexity_table(evaluation: dict[str, Any], original: int) -> str:
    lengths = list(evaluation["perplexity"])
    header = ["", *(f"{n} ({int(n) / original:g}L)" for n in lengths)]
    rows = [
        [plots.label(arm), *(f"{evaluation['perplexity'][n][arm]['ppl']:.2f}" for n in lengths)]
        for arm in plots.ordered(evaluation["perplexity"][lengths[0]])
    ]
    return table(header, rows)


def _suffix(stage: str) -> str:
    """What tells the figures of several evaluate stages apart."""
    return stage.removeprefix("evaluate")


def _training_curves(workdir: epath.Path) -> dict[str, Records]:
    """By stage that trained: its lines of metrics.jsonl."""
    stages: dict[str, Records] = {}
    for record in records.read(workdir / "metrics.jsonl", {"step": int}):
        stages.setdefault(record["stage"], []).append(record)
    return stages


def _evaluation_figures(config, result, settings, evaluation, suffix):
    figures = {}
    original = config.original_length
    by_length = {int(n): {arm: e["ppl"] for arm, e in row.items()} for n, row in result["perplexity"].items()}
    controls = [arm for arm in settings.controls if original in by_length and arm in by_length[original]]
    figures[f"perplexity_by_length{suffix}"] = plots.perplexity_by_length(by_length, original, controls)
    longest = max(by_length)
    curves = {r["method"]: r["nll_by_position"] for r in evaluation if r["length"] == longest}
    at_original = {r["method"]: r["nll_by_position"] for r in evaluation if r["length"] == original}
    if controls:
        figures[f"perplexity_by_position{suffix}"] = plots.nll_by_position(
            curves, longest, original, at_original[controls[0]], plots.control_label(controls[0])
        )
    used = {(r["method"], r["length"]): _factors(r["factors"]) for r in evaluation}
    at_longest = {arm: factors for (arm, n), factors in used.items() if n == longest and arm in plots.STYLES}
    at_longest.pop("unscaled", None)
    if at_longest:
        figures[f"factors{suffix}"] = plots.factors_by_pair(at_longest, longest / original, config.rope_theta, original)
    chosen = {n: factors for (arm, n), factors in sorted(used.items()) if arm == SUBJECT}
    if len({factors.lam.tobytes() for factors in chosen.values()}) > 1:
        figures[f"factors_by_length{suffix}"] = plots.factors_by_length(chosen, original)
    return figures


def _factors(numbers: dict[str, Any]) -> rope.RopeFactors:
    return rope.RopeFactors(**{name: np.array(value) for name, value in numbers.items()})


def _markdown(config: LlamaConfig, report: dict[str, Any], evaluations: Evaluations, figures: set[str]) -> str:
    parts = ["# Report\n"]
    parts.append(
        f"Model: {config.num_layers} layers, head dimension {config.head_dim}, original length L = "
        f"{config.original_length} tokens.\n"
    )
    for stage, result in report["evaluations"].items():
        parts += _evaluation_section(stage, result, evaluations[stage][0], report["original_length"], figures)
    for stage, retrieval in report["retrieval"].items():
        parts += retrieval_section(stage, retrieval, stage)
    if "training" in figures:
        parts += ["## Training\n", picture("loss by step", "training")]
    for search in report["search"]:
        parts += search_section(search)
    for stage, export in report["exports"].items():
        parts += _export(stage, export)
    seconds = [[stage, f"{value:.1f}"] for stage, value in report["seconds"].items()]
    return "\n".join([*parts, "## Seconds by stage\n", table(["stage", "seconds"], seconds)])


def _evaluation_section(stage, result, settings, original, figures):
    longest = list(result["perplexity"])[-1]
    suffix = _suffix(stage)
    tokens = "every length scores the same tokens."
    if str(original) in result["perplexity"]:
        tokens += (
            " The column of L is therefore the control for all longer ones: what a model does with disjoint windows of "
            "its original length."
        )
    parts = [
        f"## Perplexity by window length: {stage}\n",
        f"{len(result['documents'])} evaluation documents, which neither training nor search has seen, cut into "
        f"windows of every length up to {longest} tokens: {tokens}\n",
        _perplexity_table(result, original),
        picture("perplexity by length", f"perplexity_by_length{suffix}"),
        _arms(result, settings),
    ]
    if result["compared"]:
        parts += _pairs(result, original)
    if f"perplexity_by_position{suffix}" in figures:
        parts.append(picture("perplexity by position", f"perplexity_by_position{suffix}"))
    if result["longrope_minus"]:
        parts += _comparisons(result, longest, original)
    for name, what in ((f"factors{suffix}", "rescale factors"), (f"factors_by_length{suffix}", "factors by length")):
        if name in figures:
            parts.append(picture(what, name))
    return parts


def _arms(result, settings) -> str:
    """What each arm is; with its start tokens by length where there are any."""
    header = ["", "factors", "model"]
    rows = [[plots.label(name), arm.factors, arm.model or "the latest before"] for name, arm in settings.arms.items()]
    tokens = result["start_tokens"]
    if any(any(by_length.values()) for by_length in tokens.values()):
        lengths = ", ".join(result["perplexity"])
        header.append(f"start tokens at {lengths}")
        rows = [
            [*row, ", ".join(str(tokens[name][n]) for n in result["perplexity"])]
            for row, name in zip(rows, settings.arms, strict=True)
        ]
    return table(header, rows)


def _pairs(result, original) -> list[str]:
    """The differences that were asked for, at every length."""
    lengths = list(result["perplexity"])
    rows = [
        [
            " minus ".join(map(plots.label, pair["arms"])),
            *("{difference:+.4f} [{ci95[0]:+.4f}, {ci95[1]:+.4f}]".format(**pair["by_length"][n]) for n in lengths),
        ]
        for pair in result["compared"]
    ]
    return [
        "Differences in nats per token, negative where the first is better, paired by document, with 95 % intervals, a "
        "bootstrap over documents:\n",
        table(["", *(f"{n} ({int(n) / original:g}L)" for n in lengths)], rows),
    ]


def _comparisons(result, longest, original):
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
    for length in dict.fromkeys([longest, str(original)]):
        if length not in result["longrope_minus"]:
            continue
        rows = [row(plots.label(arm), entry) for arm, entry in result["longrope_minus"][length].items()]
        controls = result["longrope_minus_disjoint_windows_of_original_length"].get(length, {})
        rows += [row(plots.control_label(arm), entry) for arm, entry in controls.items()]
        header = ["LongRoPE minus", "nats per token", "95 % interval", "perplexity lower by", "documents better"]
        parts += [f"### LongRoPE against the others at {length} tokens\n", table(header, rows)]
    return [
        *parts,
        "Differences are paired by document; the interval is a bootstrap over documents. Where the difference to a "
        "control is positive, the model does not make use of the longer context.\n",
    ]


def _export(stage, export):
    until = " and ".join(f"{length:,}" for length in export["lengths"])
    parts = [
        f"## Export: {stage}\n",
        f"[{export['folder']}/]({export['folder']}/README.md): {export['architecture']}, {export['dtype']}, factors "
        f"for up to {until} tokens.\n",
    ]
    if export["dropped"]:
        parts.append(f"Dropped, as the format can't carry it: {'; '.join(export['dropped'].values())}.\n")
    if export["costs"]:
        parts.append(cost_table([Cost.from_record(record) for record in export["costs"]]))
    return parts
