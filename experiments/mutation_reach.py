"""How far a mutation should reach: Algorithm 1 with several reaches, several seeds each, on the quickstart's model.

    python experiments/mutation_reach.py runs/quickstart

Takes the pretrained model, the search documents and the evaluation documents of a finished quickstart and prints, for
every reach, the best perplexity after 704 and after all 1344 candidates, and that of the best on the evaluation
documents: mean and range over the seeds. About a minute a search on two cores; results in RESULTS.md.
"""

import json
import sys

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from longrope_jax import Llama, LlamaConfig
from longrope_jax.data import corpus
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import by_document, perplexity, token_nll
from longrope_jax.rope import Trained, unscaled
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.evolution import EvolutionSettings, search
from longrope_jax.search.objective import perplexity_objective
from longrope_jax.search.space import paper_seeds, paper_space
from longrope_jax.training.loop import load_params

REACHES, SEEDS = (1, 2, 4), range(4)
EARLY = 704


def main(workdir: str) -> None:
    """Runs every search and prints the table as Markdown."""
    path = epath.Path(workdir)
    config = json.loads((path / "config.json").read_text())
    model = Llama(LlamaConfig(**config["model"]))
    layout = Layout()
    params = load_params(path, "pretrain", model, layout, config["pretrain"]["steps"])
    target, length = config["search"]["target_length"], model.config.original_length
    builder = corpus.build(corpus.stdlib_config(), path / "data")
    searched, judged = (
        fixed_windows(corpus.documents(builder, split, ByteTokenizer()), target, count, seed=0).tokens
        for split, count in (("search", config["search"]["documents"]), ("evaluation", config["evaluate"]["documents"]))
    )
    score = perplexity_objective(model, layout, params, searched, 1, len(searched))
    head_dim, base, scale = model.config.head_dim, model.config.rope_theta, target / length
    space = paper_space(scale, length)
    seeds = paper_seeds(head_dim, target, base, length, Trained(length, unscaled(head_dim)), space)

    print(f"| reach | after {EARLY} | after all | evaluation documents |\n| --- | --- | --- | --- |")
    for reach in REACHES:
        rows = []
        for seed in tqdm(SEEDS, desc=f"reach {reach}", unit="search"):
            settings = EvolutionSettings(reach=reach)
            state = search(jax.random.key(seed), seeds, space, settings, score)
            nll = token_nll(model, layout, params, state.best(), judged, target)
            rows.append([np.exp(state.nll[:EARLY].min()), np.exp(state.nll.min()), perplexity(by_document(nll)).ppl])
        cells = (f"{np.mean(column):.3f} [{min(column):.3f}, {max(column):.3f}]" for column in zip(*rows, strict=True))
        print(f"| {reach} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
