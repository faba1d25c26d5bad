"""How much of the window an objective reads decides whether factors hold to its last token.

    python experiments/search_objectives.py runs/h32_s3 runs/h64_s3 runs/h64_s4

On finished quickstarts with other seeds than the published ones, whose models no other figure uses: tuned YaRN and the
default search, by the mean over L' = 1,024 tokens and by the mean over a margin beyond it too. Prints perplexities on
64 evaluation documents: of the whole window, of its last 32 tokens and of the 32 beyond. Half an hour a model on two
cores; the table is in docs/results/quickstart.md.
"""

import sys

import numpy as np
from finished_quickstart import Quickstart

import longrope_jax as lr

TARGET, END, DOCUMENTS = 1024, 32, 64
MARGINS = (0.0, 1 / 16, 1 / 8)


def main(*workdirs: str) -> None:
    """Prints a row for every model and margin, of LongRoPE / tuned YaRN."""
    rows = []
    for workdir in workdirs:
        quickstart = Quickstart(workdir)
        for margin in MARGINS:
            common = dict(target_length=TARGET, racing=0.9, objective={"text": lr.TermSettings(margin=margin)})
            yarn = quickstart.search(lr.SearchSettings(method="yarn_grid", **common)).best()
            evolution = lr.EvolutionSettings(iterations=22)
            settings = lr.SearchSettings(ramps=128, evolution=evolution, **common)
            found = quickstart.search(settings, {"yarn_tuned": yarn}).best()
            parts = zip(*(perplexities(quickstart, factors) for factors in (found, yarn)), strict=True)
            rows.append([workdir, f"{1 + margin:g} L'", *(f"{one:.2f} / {other:.2f}" for one, other in parts)])
            print(rows[-1], file=sys.stderr, flush=True)
    print(lr.markdown_table(["model", "read", "mean", f"last {END}", f"{END} beyond"], rows))


def perplexities(quickstart: Quickstart, factors: lr.RopeFactors) -> list[float]:
    """Of the whole window, its end, and what is beyond."""
    nll = quickstart.token_nll(factors, TARGET + END, DOCUMENTS)
    parts = nll[:, :TARGET], nll[:, TARGET - END : TARGET], nll[:, TARGET:]
    return [float(np.exp(part.mean(dtype=np.float64))) for part in parts]


if __name__ == "__main__":
    main(*sys.argv[1:])
