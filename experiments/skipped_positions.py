"""What skipped positions save: the same search with and without screening, for 8L and for 64L.

    for h in 32 64; do for s in 3 13 23; do
        python -m longrope_jax.main --config=experiments/skipped_positions.py:8,$s --workdir=runs/skipped_${h}_$s \\
            --config.model.head_dim=$h
    done; done
    python experiments/skipped_positions.py runs/skipped_*

Every search reads a single document, so that a race cannot help. With `:8` it is for 8L, on the quickstart's model with
pretraining seed 3; with `:64` for 64L, on that model fine-tuned at 8L with YaRN's factors. The number after it is the
seed of the searches. The last command prints a row per search: its cost, its score, and the difference to the search
without screening, at the same cost (the control) and at its end. It also prints how well skipped positions rank the
candidates that were read both ways. Five minutes a work directory for 8L on two cores; results in
docs/results/search.md.
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
    "eighth": lr.ScreeningSettings(share=1 / 8, pieces=16),
    "quarter": lr.ScreeningSettings(share=1 / 16, reduction_factor=4),
}
"""Searches by name; "quarter" reads a quarter of the candidates in full, the others an eighth."""


def get_config(which: str = "8,3") -> ConfigDict:
    """The experiment for a target of 8 or 64 times L and a seed of the searches, such as "8,3"."""
    scale, _, seed = which.partition(",")
    if scale not in ("8", "64") or not seed.isdigit():
        raise ValueError(f"experiments/skipped_positions.py:{which} must be 8 or 64, a comma, and a seed")
    stages = {
        "pretrain": lr.PretrainSettings(
            steps=1300,
            seed=3,
            batch=16,
            checkpoint_every=260,
            optimizer=lr.OptimizerSettings(learning_rate=5e-3, warmup_steps=50),
        ),
    }
    if scale == "64":
        stages["finetune"] = lr.FinetuneSettings(
            length=8 * L,
            batch=4,
            steps=100,
            model="pretrain",
            factors="yarn_without_temperature",
            checkpoint_every=50,
            remat="none",
            optimizer=lr.OptimizerSettings(learning_rate=1.5e-3, schedule="linear", warmup_steps=20),
        )
    for name, screening in SCREENING.items():
        stages[f"search_{name}"] = lr.SearchSettings(
            target_length=int(scale) * L,
            documents=1,
            seed=int(seed),
            screening=screening,
            ramps=128,
            evolution=lr.EvolutionSettings(iterations=22),
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


def main(*workdirs: str) -> None:
    """Prints the table of the searches in finished work directories."""
    rows = []
    for workdir in workdirs:
        log = [json.loads(line) for line in (epath.Path(workdir) / "search.jsonl").read_text().splitlines()]
        without = [record for record in log if record["stage"] == "search_races"]
        costs, curve = np.cumsum([r["cost"] for r in without]), np.minimum.accumulate([r["nll"] for r in without])
        for name in SCREENING:
            candidates = [record for record in log if record["stage"] == f"search_{name}"]
            in_full = [record for record in candidates if None not in record["documents"]]
            both = np.array([(record["nll"], record["screen"]) for record in in_full if "screen" in record])
            cost, best = sum(record["cost"] for record in candidates), min(record["nll"] for record in in_full)
            control = curve[np.searchsorted(costs, cost + 1e-6) - 1]
            rank = f"{scipy.stats.spearmanr(*both.T).statistic:.2f}" if len(both) else ""
            row = [workdir, name, f"{cost:.0f}", str(len(in_full)), f"{best:.3f}", f"{best - control:+.3f}"]
            rows.append([*row, f"{best - curve[-1]:+.3f}", rank])
    header = ["", "screening", "forward equivalents", "read in full", "nats a token", "minus races at the same cost"]
    print(markdown_table([*header, "minus races at their end", "rank correlation"], rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
