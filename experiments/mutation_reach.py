"""Measures the effect of a mutation's reach: Algorithm 1 with several reaches and seeds, on the quickstart's model.

    python experiments/mutation_reach.py runs/quickstart

Uses the pretrained model, the search documents and the evaluation documents of a finished quickstart. For every reach
it prints the best perplexity after 704 and after all 1344 candidates, and the perplexity of the best on the
evaluation documents: mean and range over the seeds. About a minute a search on two cores; results in
docs/results/ablations.md.
"""

import sys
from dataclasses import replace

import numpy as np
from finished_quickstart import Quickstart, mean_and_range
from tqdm import tqdm

from longrope_jax.search.settings import EvolutionSettings, SearchSettings

REACHES, SEEDS = (1, 2, 4), range(4)
EARLY = 704
SCALE, EVALUATED = 8, 64


def main(workdir: str) -> None:
    """Runs every search and prints the table as Markdown."""
    quickstart = Quickstart(workdir)
    target = SCALE * quickstart.config.original_length
    settings = SearchSettings(target_length=target, documents=5, documents_at_once=5)
    print(f"| reach | after {EARLY} | after all | evaluation documents |\n| --- | --- | --- | --- |")
    for reach in REACHES:
        rows = []
        for seed in tqdm(SEEDS, desc=f"reach {reach}", unit="search"):
            state = quickstart.search(replace(settings, seed=seed, evolution=EvolutionSettings.paper(reach=reach)))
            evaluated = quickstart.evaluate(state.best(), target, EVALUATED).ppl
            rows.append([np.exp(state.nll[:EARLY].min()), np.exp(state.nll.min()), evaluated])
        cells = map(mean_and_range, zip(*rows, strict=True))
        print(f"| {reach} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
