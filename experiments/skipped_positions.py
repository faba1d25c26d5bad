"""What skipped positions save where a target is long: the same search for 64L with and without screening.

    python -m longrope_jax.main --config=experiments/skipped_positions.py --workdir=runs/skipped
    python experiments/skipped_positions.py runs/skipped

The quickstart's model is fine-tuned at 8L with YaRN's factors and then searched for 64L, 8,192 tokens and the margin:
with races alone, and with `screening` as their first rung. The second command prints a row per search. It also prints
how well skipped positions rank the candidates that were read both ways. An hour on two cores, nearly all of it the
search without screening; results in docs/results/search.md, with those for 8L of experiments/search_comparison.py.
"""

import json
import sys

import numpy as np
import scipy.stats
from etils import epath
from ml_collections import ConfigDict

import longrope_jax as lr
from longrope_jax.report.tables import markdown_table

L = 128
SCREENING = {
    "races": lr.ScreeningSettings(),
    "sixteenth": lr.ScreeningSettings(share=1 / 16),
    "thirtysecond": lr.ScreeningSettings(share=1 / 32),
}


def get_config() -> ConfigDict:
    """The experiment."""
    stages = {
        "pretrain": lr.PretrainSettings(
            steps=1300,
            batch=16,
            checkpoint_every=260,
            optimizer=lr.OptimizerSettings(learning_rate=5e-3, warmup_steps=50),
        ),
        "finetune": lr.FinetuneSettings(
            length=8 * L,
            batch=4,
            steps=100,
            model="pretrain",
            factors="yarn_without_temperature",
            checkpoint_every=50,
            remat="none",
            optimizer=lr.OptimizerSettings(learning_rate=1.5e-3, schedule="linear", warmup_steps=20),
        ),
    }
    for name, screening in SCREENING.items():
        stages[f"search_{name}"] = lr.SearchSettings(
            target_length=64 * L,
            model="finetune",
            documents=3,
            racing=0.9,
            screening=screening,
            ramps=64,
            evolution=lr.EvolutionSettings(population=32, mutations=8, crossovers=8, iterations=15),
        )
    config = ConfigDict()
    config.stages = tuple(stages)
    config.model = lr.section(lr.LlamaConfig.preset("tiny"))
    config.data = lr.section(lr.DataSettings())
    config.mesh = lr.section(lr.MeshSettings())
    config.profile = lr.section(lr.ProfileSettings())
    for name, settings in stages.items():
        config[name] = lr.section(settings)
    return config


def main(workdir: str) -> None:
    """Prints the table of the searches in a finished work directory."""
    folder = epath.Path(workdir)
    log = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    rows = []
    for name in SCREENING:
        candidates = [record for record in log if record["stage"] == f"search_{name}"]
        in_full = [record for record in candidates if None not in record["documents"]]
        both = np.array([(record["nll"], record["screen"]) for record in in_full if "screen" in record])
        cost, best = sum(record["cost"] for record in candidates), min(record["nll"] for record in in_full)
        rank = f"{scipy.stats.spearmanr(*both.T).statistic:.2f}" if len(both) else ""
        rows.append([name, str(len(candidates)), str(len(in_full)), f"{cost:.1f}", f"{np.exp(best):.3f}", rank])
    print(markdown_table(["", "candidates", "read in full", "forward equivalents", "search perplexity", "rank"], rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
