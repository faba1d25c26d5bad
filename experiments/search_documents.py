"""Measures how many documents a search needs: the same small budget on 1 to 20 documents, three seeds each.

    python experiments/search_documents.py runs/quickstart PICTURE.png [gradient | evolution]

Searches factors for 8L on the pretrained model of a finished quickstart. Every seed draws other search documents and
candidates; all use the same 64 evaluation documents. Prints the perplexity of the best candidate on its search
documents and on the evaluation documents, and the gap between them in nats per token. A part of this gap is that some
documents are harder than others. The last columns avoid that: they show the gain of the best candidate over the best
seed, on either kind of documents. Cells are mean and range over the seeds. The budget is 100 gradient steps, each on
one document, or 128 candidates of Algorithm 1; a minute or two on two cores.
"""

import sys
from collections.abc import Sequence

import numpy as np
from finished_quickstart import Quickstart, mean_and_range
from matplotlib.figure import Figure
from tqdm import tqdm

from longrope_jax.search.settings import EvolutionSettings, GradientSettings, SearchSettings

DOCUMENTS, SEEDS = (1, 2, 5, 10, 20), range(3)
SCALE, EVALUATED = 8, 64
COLUMNS = ("search perplexity", "evaluation perplexity", "gap", "gain on search documents", "on evaluation documents")
BUDGETS = dict(
    evolution=EvolutionSettings.paper(reach=4, population=32, mutations=8, crossovers=8, parents=16, iterations=6),
    gradient=GradientSettings(steps=100, starts=1),
)


def main(workdir: str, picture: str, method: str = "gradient") -> None:
    """Runs every search, prints the table as Markdown and draws it."""
    if method not in BUDGETS:
        raise SystemExit(f"error: {method!r} must be one of {', '.join(BUDGETS)}")
    quickstart, measured = Quickstart(workdir), {}
    print(f"| documents | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    for count in DOCUMENTS:
        searches = tqdm(SEEDS, desc=f"{count} documents", unit="search")
        measured[count] = [_measure(quickstart, method, count, seed) for seed in searches]
        cells = map(mean_and_range, zip(*measured[count], strict=True))
        print(f"| {count} | {' | '.join(cells)} |", flush=True)
    draw(measured, method).savefig(picture)


def _measure(quickstart: Quickstart, method: str, documents: int, seed: int) -> list[float]:
    target = SCALE * quickstart.config.original_length
    settings = SearchSettings(
        target_length=target, documents=documents, seed=seed, method=method, **{method: BUDGETS[method]}
    )
    state = quickstart.search(settings)
    seeds = state.take(np.flatnonzero(state.operator == 0))
    found, before = (quickstart.evaluate(each.best(), target, EVALUATED) for each in (state, seeds))
    searched = float(state.nll.min())
    return [
        np.exp(searched), found.ppl, found.nll - searched, float(seeds.nll.min()) - searched, before.nll - found.nll
    ]  # fmt: skip


def draw(measured: dict[int, Sequence[Sequence[float]]], method: str) -> Figure:
    """Perplexity and gain against the number of documents: the mean over seeds, and every seed as a dot."""
    figure = Figure(figsize=(7.2, 3.4), dpi=140, layout="constrained")
    panels = figure.subplots(1, 2)
    values = np.array(list(measured.values()))  # documents, seeds, columns
    for axes, columns, what in (
        (panels[0], (0, 1), "perplexity of the best candidate"),
        (panels[1], (3, 4), "gain over the best seed (nats per token)"),
    ):
        for column, color, name in zip(columns, ("#d62728", "#1f77b4"), ("search", "evaluation"), strict=True):
            axes.plot(list(measured), values[:, :, column].mean(1), color=color, label=f"{name} documents")
            axes.plot(list(measured), values[:, :, column], ".", color=color, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xticks(list(measured), list(map(str, measured)))
        axes.minorticks_off()
        axes.set_xlabel("search documents")
        axes.set_ylabel(what)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Search by {method}, {SCALE}L, three seeds", fontsize=10)
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:])
