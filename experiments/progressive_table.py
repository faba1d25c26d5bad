"""Makes the tables of docs/results/progressive.md of finished runs of `progressive_tiny.py:all`.

    python experiments/progressive_table.py runs/p0 runs/p1 runs/p2

Prints what the second search gains over tuned YaRN, what tuning with LongRoPE's factors gains over tuning with those of
tuned YaRN, what the context is worth, and how well planted numbers are predicted by their distance.
"""

import sys

import numpy as np
from etils import epath
from over_seeds import t_interval
from progressive_tiny import CELLS, LENGTHS, STEPS, L

from longrope_jax.evaluation.evaluate import EVALUATION_RECORD, recorded_nll
from longrope_jax.evaluation.perplexity import compare, perplexity
from longrope_jax.report.tables import markdown_table
from longrope_jax.runtime import json_lines


def main(*workdirs: str) -> None:
    """Prints what the second search gains, what tuning with its factors gains, and what the context is worth."""
    runs = []
    for workdir in workdirs:
        found = json_lines.of_stage(epath.Path(workdir) / "evaluation.jsonl", "evaluate", EVALUATION_RECORD)
        runs.append({(record["method"], record["length"]): record for record in found})
    second = [((f"{cell}_longrope", 64 * L), (f"{cell}_yarn_tuned", 64 * L)) for cell in CELLS]
    compare_all("Second extension: searched minus tuned YaRN, 64L", workdirs, runs, second)
    tuned = [
        ((f"longrope_{steps}_{extended}", length), (f"yarn_{steps}_{extended}", length))
        for length, extended in ((8 * L, "longrope"), (64 * L, "longrope"), (64 * L, "yarn_tuned"), (L, "longrope"))
        for steps in STEPS
    ]
    compare_all("Tuned with LongRoPE's factors minus with tuned YaRN's", workdirs, runs, tuned)
    control = [
        ((f"{cell}_longrope", length), (f"tuned_at_original_{cell.split('_')[1]}", L))
        for length in (8 * L, 64 * L)
        for cell in CELLS
    ]
    compare_all(
        "Context: windows of 8L and 64L minus disjoint windows of L, of the model tuned at L", workdirs, runs, control
    )
    print_answers(workdirs, runs)


def compare_all(title: str, workdirs: tuple[str, ...], runs: list[dict], pairs: list[tuple]) -> None:
    """Prints a row for every pair of (method, length): perplexities; by run the difference in nats per token with its
    95 % interval over documents; and its mean with a t interval over runs.
    """
    rows = []
    for one, other in pairs:
        nll = [tuple(recorded_nll(run[key]) for key in (one, other)) for run in runs]
        differences = [compare(*pair) for pair in nll]
        cells = [f"{d.difference:+.3f} [{d.ci95[0]:+.3f}, {d.ci95[1]:+.3f}]" for d in differences]
        both = [" / ".join(f"{perplexity(each).ppl:.3f}" for each in pair) for pair in nll]
        names = [f"{method}, {length // L}L" for method, length in (one, other)]
        rows.append([" minus ".join(names), "; ".join(both), *cells, t_interval([d.difference for d in differences])])
    print(f"\n### {title}\n\n{markdown_table(['', 'perplexity', *workdirs, 'mean [95 % t interval over runs]'], rows)}")


def print_answers(workdirs: tuple[str, ...], runs: list[dict]) -> None:
    """Prints the mean NLL per digit of planted numbers by their distance, for windows of 8L and 64L."""
    header = ["nats per digit", *(f"{workdir}: up to {edge // L}L" for workdir in workdirs for edge in LENGTHS)]
    rows = []
    for method, length in sorted(key for key in runs[0] if key[1] > L):
        cells = []
        for run in runs:
            answers = run[method, length]["answers"]
            ranges, nll = np.searchsorted(LENGTHS, answers["distances"]), np.array(answers["nll"], float)
            cells += [f"{nll[ranges == number].mean():.2f}" for number in range(len(LENGTHS))]
        rows.append([f"{method}, windows of {length // L}L", *cells])
    print(f"\n### Planted pairs by distance\n\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
