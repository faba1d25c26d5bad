"""A comparison of several finished work directories -> compare.md, compare.html and figures.

The first run is the baseline. The report has a paired difference only where both runs scored the same tokens.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from longrope_jax.evaluation.perplexity import compare
from longrope_jax.report import plots
from longrope_jax.report.page import Parts, Picture, write_pages
from longrope_jax.report.perplexity import evaluation_title
from longrope_jax.report.plots import comparison as comparison_plots
from longrope_jax.report.runs import Run, other_tokens, read_runs
from longrope_jax.report.tables import DIFFERENCES, difference_cell, length_heading, markdown_table, share_cell

_ABSENT = "–"

Entries = dict[tuple[str, str, int], Any]
"""What runs have, by method, run and length (tokens)."""


def write_comparison(workdirs: Sequence[epath.PathLike], folder: epath.PathLike) -> epath.Path:
    """Writes compare.md, with figures/compare_*.png, and the same as one page, compare.html, into `folder`; returns the
    path of compare.md.

    Raises:
        ValueError: fewer than two work directories, one twice, or one that has no finished run; one line.
        OSError: the records of one are damaged, or `folder` can't be written to.
    """
    runs = read_runs(workdirs)
    parts: Parts = ["# Comparison\n", _overview(runs)]
    for stage in _stages(runs, "evaluations"):
        parts += _perplexity(stage, [run for run in runs if stage in run.report["evaluations"]])
    parts += _searches(runs)
    for stage in _stages(runs, "retrieval"):
        parts += _retrieval(stage, [run for run in runs if stage in run.report["retrieval"]])
    return write_pages(epath.Path(folder), "compare", [*parts, *_configs(runs), *_seconds(runs)])


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


def _table(entries: Entries, cell: Callable[[Any], str], what: str, heading: Callable[[int], str]) -> str:
    """A row for every method and run, a column for every length.

    Args:
        cell: what is shown of an entry.
        what: the heading of the runs.
        heading: of a length.
    """
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for (method, run, n), entry in entries.items():
        cells.setdefault((method, run), {})[n] = cell(entry)
    methods, lengths = plots.ordered(method for method, _ in cells), sorted({n for _, _, n in entries})
    rows = [
        [plots.label(method), run, *(cells[method, run].get(n, _ABSENT) for n in lengths)]
        for method, run in sorted(cells, key=lambda row: methods.index(row[0]))
    ]
    return markdown_table(["", what, *map(heading, lengths)], rows)


def _perplexity(stage: str, runs: Sequence[Run]) -> Parts:
    entries = {
        (method, run.name, int(n)): entry
        for run in runs
        for n, row in run.report["evaluations"][stage]["perplexity"].items()
        for method, entry in row.items()
    }
    intervals = {key: np.array([entry["ppl"], *entry["ci95"]], float) for key, entry in entries.items()}
    names, lengths = [run.name for run in runs], {n for _, _, n in entries}
    figure = comparison_plots.intervals_by_run(intervals, names, max(lengths))
    parts: Parts = [
        f"## {evaluation_title(stage)}\n",
        _table(entries, _perplexity_cell, "run", lambda n: _length(n, runs)),
        *_differences(stage, runs, entries),
        Picture("perplexity at the longest length", f"compare_{stage}_longest", figure),
    ]
    if len(lengths) > 1:
        originals = {run.report["original_length"] for run in runs}
        figure = comparison_plots.perplexity_by_run(intervals, names, originals)
        parts.append(Picture("perplexity by length", f"compare_{stage}", figure))
    return parts


def _perplexity_cell(entry: dict[str, Any]) -> str:
    return "not finite" if entry["ppl"] is None else f"{entry['ppl']:.3f}"


def _differences(stage: str, runs: Sequence[Run], perplexities: Entries) -> list[str]:
    """Paired differences of every other run to the first, by method."""
    first, *others = runs
    parts, entries = [], {}
    for other in others:
        reason = other_tokens(first, other, stage)
        if reason:
            parts.append(f"No differences between {other.name} and {first.name}: {reason}.\n")
            continue
        mine, theirs = first.nll[stage], other.nll[stage]
        for method, run, n in perplexities:
            if run == other.name and (n, method) in mine.keys() & theirs.keys():
                compared = compare(theirs[n, method], mine[n, method])
                entries[method, f"{other.name} minus {first.name}", n] = compared._asdict()
    if entries:
        parts += [DIFFERENCES, _table(entries, difference_cell, "", lambda n: _length(n, runs))]
    return parts


def _searches(runs: Sequence[Run]) -> Parts:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for search in run.report["search"]:
            found.setdefault(search["stage"], {})[run.name] = search
    if not found:
        return []
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
    figure = comparison_plots.searches_by_run(curves, [run.name for run in runs])
    return [
        "## Searches\n",
        "Best perplexity on the documents of each search, and of the same candidate on documents held out from it. A "
        "forward equivalent is a candidate read on all search documents.\n",
        markdown_table([*header, "best", "held out"], rows),
        Picture("search convergence", "compare_searches", figure),
    ]


def _retrieval(stage: str, runs: Sequence[Run]) -> list[str]:
    summaries = {run.name: run.report["retrieval"][stage] for run in runs}
    entries = {
        (method, run, int(n)): entry
        for run, summary in summaries.items()
        for method, by_length in summary["accuracy"].items()
        for n, entry in by_length.items()
    }
    tasks = dict.fromkeys(f"{summary['task']}, seed {summary['seed']}" for summary in summaries.values())
    return [
        f"## Retrieval (stage `{stage}`)\n",
        f"How often the hidden number was found, with 95 % Wilson intervals ({', '.join(tasks)}).\n",
        _table(entries, share_cell, "run", str),
    ]


def _configs(runs: Sequence[Run]) -> list[str]:
    """The fields that are not the same in all configs; a section that only some have is one line."""
    shared = set.intersection(*(set(run.config) for run in runs))
    values = [
        flatten_dict({name: section if name in shared else "present" for name, section in run.config.items()}, sep=".")
        for run in runs
    ]
    fields = list(dict.fromkeys(field for found in values for field in found))
    rows = [
        [f"`{field}`", *(_code(found[field]) if field in found else _ABSENT for found in values)]
        for field in fields
        if any(found.get(field, _ABSENT) != values[0].get(field, _ABSENT) for found in values)
    ]
    if not rows:
        return ["## Configs\n", "They are the same.\n"]
    return ["## Where the configs differ\n", markdown_table(["field", *(run.name for run in runs)], rows)]


def _code(value: Any) -> str:
    return "`" + json.dumps(value).replace("|", "\\|").replace("`", "'") + "`"


def _seconds(runs: Sequence[Run]) -> list[str]:
    times = [run.report["seconds"] for run in runs]
    rows = [
        [stage, *(f"{by_stage[stage]:.1f}" if stage in by_stage else _ABSENT for by_stage in times)]
        for stage in _stages(runs, "seconds")
    ]
    return ["## Seconds by stage\n", markdown_table(["stage", *(run.name for run in runs)], rows)]
