"""A run's records -> report.json, report.md and figures: every number a reader of the paper would ask for."""

from typing import Any

import numpy as np
from etils import epath

from longrope_jax import plots, rope
from longrope_jax.evaluation.perplexity import DocumentNll, compare, perplexity
from longrope_jax.evaluation.run import SEARCHED
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime.records import to_json

Records = list[dict[str, Any]]


def summarize(config: LlamaConfig, evaluation: Records, searches: Records, seconds: dict[str, float]) -> dict[str, Any]:
    """The content of report.json.

    Args:
        evaluation: records of `evaluation.run`, one for every (length, method).
        searches: one dict a search stage: target_length, evaluations, seconds, best_nll, curve and more.
        seconds: wall time by stage.
    """
    nll = {(r["length"], r["method"]): _by_file(r) for r in evaluation}
    lengths = sorted({length for length, _ in nll})
    methods = list(dict.fromkeys(method for _, method in nll))
    original = config.original_length
    report = {
        "original_length": original,
        "perplexity": {str(n): {m: perplexity(nll[n, m])._asdict() for m in methods} for n in lengths},
        "search": searches,
        "seconds": seconds,
        "documents": sorted(set(evaluation[0]["documents"])) if evaluation else [],
    }
    if SEARCHED in methods:
        report["longrope_minus_method"] = {
            str(n): {m: compare(nll[n, SEARCHED], nll[n, m])._asdict() for m in methods if m != SEARCHED}
            for n in lengths
        }
        if _has_control(report):
            report["longrope_minus_disjoint_windows_of_original_length"] = {
                str(n): compare(nll[n, SEARCHED], nll[original, "unscaled"])._asdict() for n in lengths if n > original
            }
    return report


def _by_file(record: dict[str, Any]) -> DocumentNll:
    """Windows of one file are not independent samples of anything: they count as one document."""
    files, which = np.unique(record["documents"], return_inverse=True)
    sums = np.array([np.inf if value is None else value for value in record["nll_sums"]])
    return DocumentNll(
        np.bincount(which, weights=sums, minlength=len(files)),
        np.bincount(which, weights=record["counts"], minlength=len(files)).astype(int),
    )


def _has_control(report: dict[str, Any]) -> bool:
    return "unscaled" in report["perplexity"].get(str(report["original_length"]), {})


def write_report(workdir: epath.Path, config: LlamaConfig, report: dict[str, Any], evaluation: Records) -> epath.Path:
    """Writes what `summarize` made as report.json and report.md, with figures/*.png; returns the path of report.md."""
    (workdir / "report.json").write_text(to_json(report, indent=1) + "\n")
    figures = workdir / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name, figure in _figures(config, report, evaluation).items():
        with (figures / f"{name}.png").open("wb") as file:
            figure.savefig(file)
    path = workdir / "report.md"
    path.write_text(_markdown(config, report))
    return path


def summary_table(report: dict[str, Any]) -> str:
    """Perplexity by method and length as a Markdown table, readable in a terminal as well."""
    lengths = list(report["perplexity"])
    original = report["original_length"]
    header = ["method", *(f"{n} ({int(n) / original:g}L)" for n in lengths)]
    rows = []
    for method in plots.STYLES:
        if lengths and method in report["perplexity"][lengths[0]]:
            cells = (report["perplexity"][n][method]["ppl"] for n in lengths)
            rows.append([plots.LABELS[method], *(f"{ppl:.2f}" for ppl in cells)])
    return _table(header, rows)


def _figures(config, report, evaluation):
    figures = {}
    original = config.original_length
    if evaluation:
        table = {int(n): {m: e["ppl"] for m, e in row.items()} for n, row in report["perplexity"].items()}
        figures["perplexity_by_length"] = plots.perplexity_by_length(table, original)
        longest = max(table)
        curves = {r["method"]: r["nll_by_position"] for r in evaluation if r["length"] == longest}
        controls = [r for r in evaluation if r["length"] == original and r["method"] == "unscaled"]
        if controls:
            control = controls[0]["nll_by_position"]
            figures["perplexity_by_position"] = plots.nll_by_position(curves, longest, original, control)
        factors = {
            r["method"]: rope.RopeFactors(**{k: np.array(v) for k, v in r["factors"].items()})
            for r in evaluation
            if r["length"] == longest and r["method"] in (SEARCHED, "linear", "ntk", "yarn")
        }
        if factors:
            figures["factors"] = plots.factors_by_pair(factors, longest / original, config.rope_theta, original)
    for search in report["search"]:
        curve = np.array(search["curve"], float)
        name = f"convergence_{search['stage']}"
        figures[name] = plots.search_convergence(curve, search["seeds"], search["population"])
    return figures


def _markdown(config: LlamaConfig, report: dict[str, Any]) -> str:
    lengths = list(report["perplexity"])
    parts = ["# Report\n"]
    if lengths:
        parts += [
            f"Model: {config.num_layers} layers, head dimension {config.head_dim}, original length L = "
            f"{config.original_length} tokens, longest window {lengths[-1]} tokens. {len(report['documents'])} "
            "evaluation documents, which neither training nor search has seen.\n",
            "## Perplexity by window length\n",
            "Every length scores the same tokens: the documents are cut into windows of that length. The column of L "
            "is therefore the control for all longer ones: what the model does with disjoint windows of its original "
            "length.\n",
            summary_table(report),
            "![perplexity by length](figures/perplexity_by_length.png)\n",
        ]
        if _has_control(report):
            parts.append("![perplexity by position](figures/perplexity_by_position.png)\n")
        if "longrope_minus_method" in report:
            parts += _comparisons(report, lengths[-1])
    for search in report["search"]:
        parts += _search(search)
    seconds = [[stage, f"{value:.1f}"] for stage, value in report["seconds"].items()]
    return "\n".join([*parts, "## Seconds by stage\n", _table(["stage", "seconds"], seconds)])


def _comparisons(report, longest):
    def row(label, entry):
        low, high = entry["ci95"]
        return [
            label,
            f"{entry['difference']:+.4f}",
            f"[{low:+.4f}, {high:+.4f}]",
            f"{100 * entry['improvement']:.1f} %",
            f"{100 * entry['documents_better']:.0f} %",
        ]

    rows = [row(plots.LABELS[m], entry) for m, entry in report["longrope_minus_method"][longest].items()]
    control = report.get("longrope_minus_disjoint_windows_of_original_length", {}).get(longest)
    if control:
        rows.append(row(plots.CONTROL, control))
    header = ["LongRoPE minus", "nats per token", "95 % interval", "perplexity lower by", "documents better"]
    return [
        f"## LongRoPE against the others at {longest} tokens\n",
        "Differences are paired by document; the interval is a bootstrap over documents. Where the difference to the "
        "control is positive, the model does not yet make use of the longer context.\n",
        _table(header, rows),
        "![rescale factors](figures/factors.png)\n",
    ]


def _search(search):
    outside = 1 - search["objective_seconds"] / search["seconds"]
    seeds = ", ".join(
        f"{plots.LABELS.get(name, name)} " + ("not finite" if nll is None else f"{np.exp(nll):.2f}")
        for name, nll in search["seeds"].items()
    )
    factors = ", ".join(f"{value:.2f}" for value in search["factors"]["lam"])
    return [
        f"## Search: {search['stage']}, {search['target_length']} tokens\n",
        f"{search['evaluations']} candidates in {search['seconds']:.1f} s, {100 * outside:.1f} % of it outside the "
        f"objective. Perplexity on the {len(search['documents'])} search documents: {np.exp(search['best_nll']):.2f}; "
        f"seeds: {seeds}.\n",
        f"n_hat = {search['factors']['n_hat']}, lambda = {factors}\n",
        f"![search convergence](figures/convergence_{search['stage']}.png)\n",
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, rule, *rows]]
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)
