"""Makes one table and one figure of several runs of an experiment that differ in their seeds.

    python experiments/over_seeds.py PICTURE.png runs/p0 runs/p1 runs/p2

Prints perplexity by window length, as mean and range over the runs. For the longest window and for L it also prints the
difference between LongRoPE and every other method per run, with the run's interval over documents, and where LongRoPE
gains along the window against YaRN. Mean and range of a few runs are not an interval; for three or more runs the tables
have a t interval of the mean difference over runs, which are models of their own if their seeds of pretraining differ.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.stats

from longrope_jax.report import plots


def main(picture: str, *workdirs: str) -> None:
    """Reads the runs' reports, which must have the same methods and lengths."""
    reports = [json.loads((Path(workdir) / "report.json").read_text()) for workdir in workdirs]
    results = [report["evaluations"]["evaluate"] for report in reports]
    original, first = reports[0]["original_length"], results[0]["perplexity"]
    lengths, methods = list(first), plots.ordered(list(first[str(original)]))
    values = {
        (n, method): np.array([result["perplexity"][n][method]["ppl"] for result in results])
        for n in lengths
        for method in methods
    }

    print(f"| | {' | '.join(f'{n} ({int(n) / original:g}L)' for n in lengths)} |")
    print("| --- |" + " --- |" * len(lengths))
    for method in methods:
        cells = (
            f"{values[n, method].mean():.2f} [{values[n, method].min():.2f}, {values[n, method].max():.2f}]"
            for n in lengths
        )
        print(f"| {plots.label(method)} | {' | '.join(cells)} |")

    for n in dict.fromkeys([lengths[-1], str(8 * original), str(original)]):
        print(f"\n| LongRoPE minus, at {n} tokens | {' | '.join(workdirs)} | mean [95 % t interval over runs] |")
        print("| --- |" + " --- |" * (len(workdirs) + 1))
        compared = [result["longrope_minus"][n] for result in results]
        controls = [result["longrope_minus_disjoint_windows_of_original_length"].get(n, {}) for result in results]
        rows = [(plots.label(method), [c[method] for c in compared]) for method in methods if method != "longrope"]
        rows += [(plots.control_label(method), [c[method] for c in controls]) for method in controls[0]]
        for name, entries in rows:
            cells = [f"{e['difference']:+.3f} [{e['ci95'][0]:+.3f}, {e['ci95'][1]:+.3f}]" for e in entries]
            print(f"| {name} | {' | '.join(cells)} | {t_interval([e['difference'] for e in entries])} |")

    for other in ("yarn_tuned", "yarn_mistral"):
        if other in results[0]["by_eighth"]:
            along_windows(results, workdirs, other, lengths[-1])

    means = {int(n): {method: float(values[n, method].mean()) for method in methods} for n in lengths}
    controls = [method for method in ("tuned_at_original", "unscaled") if method in methods][:1]
    plots.perplexity_by_length(means, original, controls).savefig(picture)


def along_windows(results: list[dict], workdirs: Sequence[str], other: str, longest: str) -> None:
    """Prints LongRoPE minus another method on parts of the longest windows, in nats per token and as a change of the
    mean perplexity in percent.
    """
    print(f"\n| LongRoPE minus {plots.label(other)} | {' | '.join(workdirs)} | mean [95 % t interval over runs] | % |")
    print("| --- |" + " --- |" * (len(workdirs) + 2))
    rows: dict[str, list[float]] = {"whole window": [], "worst eighth": [], "last eighth": [], "just beyond": []}
    for result in results:
        entries = result["perplexity"][longest]
        eighths = np.log(result["by_eighth"]["longrope"]) - np.log(result["by_eighth"][other])
        beyond = np.log(entries["longrope"]["beyond"]) - np.log(entries[other]["beyond"])
        rows["whole window"].append(result["longrope_minus"][longest][other]["difference"])
        for name, value in (("worst eighth", eighths.max()), ("last eighth", eighths[-1]), ("just beyond", beyond)):
            rows[name].append(value)
    for name, values in rows.items():
        cells = " | ".join(f"{value:+.3f}" for value in values)
        print(f"| {name} | {cells} | {t_interval(values)} | {100 * np.expm1(np.mean(values)):+.1f} |")


def t_interval(differences: list[float]) -> str:
    """The mean, and for three or more its 95 % t interval."""
    mean = np.mean(differences)
    if len(differences) < 3:
        return f"{mean:+.3f}"
    half = scipy.stats.t.ppf(0.975, len(differences) - 1) * scipy.stats.sem(differences)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


if __name__ == "__main__":
    main(*sys.argv[1:])
