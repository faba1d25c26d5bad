"""A comparison of several finished work directories -> compare.md, compare.html and figures.

The first run is the baseline. The report has a paired difference only where both runs scored the same tokens.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from longrope_jax.evaluation.perplexity import compare
from longrope_jax.report import plots
from longrope_jax.report.page import write_pages
from longrope_jax.report.perplexity import evaluation_title
from longrope_jax.report.plots import comparison as comparison_plots
from longrope_jax.report.runs import Run, other_tokens, read_runs
from longrope_jax.report.tables import DIFFERENCES, difference_cell, length_heading, markdown_table, picture, share_cell
from longrope_jax.runtime.records import flat

_ABSENT = "–"


def write_comparison(workdirs: Sequence[epath.PathLike], folder: epath.PathLike) -> epath.Path:
    """Writes compare.md, with figures/compare_*.png, and the same as one page, compare.html, into `folder`; returns the
    path of compare.md.

    Raises:
        ValueError: fewer than two work directories, one twice, or one that has no finished run; one line.
        OSError: the records of one are damaged, or `folder` can't be written to.
    """
    runs, folder = read_runs(workdirs), epath.Path(folder)
    parts = ["# Comparison\n", _overview(runs)]
    figures: dict[str, Figure] = {}
    for section, drawn in (_perplexities(runs), _searches(runs), _retrievals(runs), (_configs(runs), {})):
        parts += section
        figures |= drawn
    return write_pages(folder, "compare", "\n".join([*parts, *_seconds(runs)]), figures)


def _stages(runs: Sequence[Run], key: str) -> list[str]:
    """The stages of a kind, of all runs, in order."""
    return list(dict.fromkeys(stage for run in runs for stage in run.report[key]))


def _length(n: int, runs: Sequence[Run]) -> str:
    """A length as a column is headed, in L where the runs have one L."""
    originals = {run.report["original_length"] for run in runs}
    return length_heading(n, originals.pop()) if len(originals) == 1 else str(n)


def _overview(runs: Sequence[Run]) -> str:
    rows = [
        [run.name, f"{run.workdir}", f"{run.report['original_length']}", ", ".join(run.config["stages"])]
        for run in runs
    ]
    return markdown_table(["run", "work directory", "L", "stages"], rows)


def _perplexities(runs: Sequence[Run]) -> tuple[list[str], dict]:
    parts, figures = [], {}
    for stage in _stages(runs, "evaluations"):
        having = [run for run in runs if stage in run.report["evaluations"]]
        found = {run.name: run.report["evaluations"][stage]["perplexity"] for run in having}
        lengths = sorted({int(n) for by_length in found.values() for n in by_length})
        methods = plots.ordered(
            dict.fromkeys(method for by_n in found.values() for row in by_n.values() for method in row)
        )
        rows = [
            [plots.label(method), run, *(_perplexity_cell(by_length.get(str(n), {}).get(method)) for n in lengths)]
            for method in methods
            for run, by_length in found.items()
            if any(method in row for row in by_length.values())
        ]
        header = ["", "run", *(_length(n, having) for n in lengths)]
        parts += [
            f"## {evaluation_title(stage)}\n",
            markdown_table(header, rows),
            *_differences(stage, having, methods),
        ]
        names = [run.name for run in having]
        curves = {
            method: {run: _by_length(by_length, method) for run, by_length in found.items()} for method in methods
        }
        longest = {
            method: {run: entries[lengths[-1]] for run, entries in by_run.items() if lengths[-1] in entries}
            for method, by_run in curves.items()
        }
        figures[f"compare_{stage}_longest"] = comparison_plots.intervals_by_run(longest, names, lengths[-1])
        parts.append(picture("perplexity at the longest length", f"compare_{stage}_longest"))
        if len(lengths) > 1:
            originals = {run.report["original_length"] for run in having}
            figures[f"compare_{stage}"] = comparison_plots.perplexity_by_run(curves, names, originals)
            parts.append(picture("perplexity by length", f"compare_{stage}"))
    return parts, figures


def _by_length(by_length: dict[str, dict], method: str) -> dict[int, comparison_plots.Interval]:
    """Length (tokens) -> finite perplexity of a method, with its interval."""
    entries = {int(n): row[method] for n, row in by_length.items() if method in row and row[method]["ppl"] is not None}
    return {
        n: (entry["ppl"], *(np.nan if end is None else end for end in entry["ci95"])) for n, entry in entries.items()
    }


def _perplexity_cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return _ABSENT
    return "not finite" if entry["ppl"] is None else f"{entry['ppl']:.3f}"


def _differences(stage: str, runs: Sequence[Run], methods: Sequence[str]) -> list[str]:
    """Paired differences of every other run to the first, by method."""
    first, *others = runs
    parts, rows = [], []
    shared: set[int] = set()
    for other in others:
        reason = other_tokens(first, other, stage)
        if reason:
            parts.append(f"No differences between {other.name} and {first.name}: {reason}.\n")
            continue
        both = first.nll[stage].keys() & other.nll[stage].keys()
        shared |= {n for n, _ in both}
        rows += [(method, other, both) for method in methods if any(method == there for _, there in both)]
    if rows:
        lengths = sorted(shared)
        cells = [
            [
                plots.label(method),
                f"{other.name} minus {first.name}",
                *(
                    difference_cell(compare(other.nll[stage][n, method], first.nll[stage][n, method])._asdict())
                    if (n, method) in both
                    else _ABSENT
                    for n in lengths
                ),
            ]
            for method, other, both in rows
        ]
        parts += [
            DIFFERENCES,
            markdown_table(["", "", *(_length(n, runs) for n in lengths)], cells),
        ]
    return parts


def _searches(runs: Sequence[Run]) -> tuple[list[str], dict]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for search in run.report["search"]:
            found.setdefault(search["stage"], {})[run.name] = search
    if not found:
        return [], {}
    rows = [
        [
            stage,
            run,
            f"{search['target_length']}",
            search["method"].replace("_", " "),
            f"{search['evaluations']}",
            f"{search['costs'][-1]:.0f}",
            f"{search['seconds']:.0f}",
            f"{np.exp(search['best_nll']):.3f}",
            f"{np.exp(search['held_out'][-1][2]):.3f}" if search["held_out"] else _ABSENT,
        ]
        for stage, by_run in found.items()
        for run, search in by_run.items()
    ]
    header = ["search", "run", "target length", "method", "candidates", "forward equivalents", "seconds"]
    curves = {
        stage: {run: (s["costs"], np.array(s["curve"], float)) for run, s in by_run.items()}
        for stage, by_run in found.items()
    }
    parts = [
        "## Searches\n",
        "Best perplexity on the documents of each search, and of the same candidate on documents held out from it. A "
        "forward equivalent is a candidate read on all search documents.\n",
        markdown_table([*header, "best", "held out"], rows),
        picture("search convergence", "compare_searches"),
    ]
    return parts, {"compare_searches": comparison_plots.searches_by_run(curves, [run.name for run in runs])}


def _retrievals(runs: Sequence[Run]) -> tuple[list[str], dict]:
    parts = []
    for stage in _stages(runs, "retrieval"):
        found = {run.name: run.report["retrieval"][stage] for run in runs if stage in run.report["retrieval"]}
        tasks = ", ".join(dict.fromkeys(f"{summary['task']}, seed {summary['seed']}" for summary in found.values()))
        accuracy = {run: summary["accuracy"] for run, summary in found.items()}
        methods = plots.ordered(dict.fromkeys(method for by_method in accuracy.values() for method in by_method))
        lengths = sorted({int(n) for by_method in accuracy.values() for by_n in by_method.values() for n in by_n})
        rows = [
            [
                plots.label(method),
                run,
                *(share_cell(by_method[method][n]) if n in by_method[method] else _ABSENT for n in map(str, lengths)),
            ]
            for method in methods
            for run, by_method in accuracy.items()
            if method in by_method
        ]
        parts += [
            f"## Retrieval (stage `{stage}`)\n",
            f"How often the hidden number was found, with 95 % Wilson intervals ({tasks}).\n",
            markdown_table(["", "run", *map(str, lengths)], rows),
        ]
    return parts, {}


def _configs(runs: Sequence[Run]) -> list[str]:
    """The fields that are not the same in all configs; a section that only some have is one line."""
    values = [flat(_sections(run.config, runs)) for run in runs]
    fields = list(dict.fromkeys(field for found in values for field in found))
    rows = [
        [f"`{field}`", *(_code(found[field]) if field in found else _ABSENT for found in values)]
        for field in fields
        if any(found.get(field, _ABSENT) != values[0].get(field, _ABSENT) for found in values)
    ]
    if not rows:
        return ["## Configs\n", "They are the same.\n"]
    return ["## Where the configs differ\n", markdown_table(["field", *(run.name for run in runs)], rows)]


def _sections(config: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """A config, with only a mark in place of the sections that not all of the runs have."""
    return {
        name: "present" if not all(name in run.config for run in runs) else section for name, section in config.items()
    }


def _code(value: Any) -> str:
    return "`" + json.dumps(value).replace("|", "\\|").replace("`", "'") + "`"


def _seconds(runs: Sequence[Run]) -> list[str]:
    times = [{stage: f"{value:.1f}" for stage, value in run.report["seconds"].items()} for run in runs]
    rows = [[stage, *(by_stage.get(stage, _ABSENT) for by_stage in times)] for stage in _stages(runs, "seconds")]
    return ["## Seconds by stage\n", markdown_table(["stage", *(run.name for run in runs)], rows)]
