"""LongRoPE2's space, its objective and its mixed windows, each alone against LongRoPE's, on the progressive model.

    python -m longrope_jax.main --config=experiments/longrope2_tiny.py --workdir=runs/longrope2

The model and the text with planted pairs are those of `progressive_tiny`, extended from L = 128 to 8L. Searches with
the same budget: by perplexity in the paper's space (`search_8x`), by perplexity above a critical dimension, by planted
pairs, which are the needles of this text, and by planted pairs above a critical dimension. The searches in the paper's
space start from tuned YaRN too, which the other space does not contain. Then the model is tuned for 50 steps with the
factors of each space, and with mixed windows. The evaluations have perplexity and planted pairs at 8L, and the
perplexity of short inputs, with the original rotation and with the factors. An hour on two busy
cores, after pretraining.
"""

import dataclasses

from ml_collections import ConfigDict

import longrope_jax as lr
from experiments.progressive_tiny import FACTORS, L, finetune
from experiments.progressive_tiny import get_config as get_progressive

CELL, STEPS = "longrope_50", 50
SEARCHES = {
    "critical": dict(space="critical_dimension"),
    "pairs": dict(
        objective={"pairs": lr.TermSettings("pairs")}, seeds={"yarn_tuned": lr.SeedSettings("search_yarn_8x")}
    ),
    "critical_pairs": dict(space="critical_dimension", objective={"pairs": lr.TermSettings("pairs")}),
}


def get_config() -> ConfigDict:
    """The experiment."""
    config = get_progressive(CELL)
    stages = ["pretrain", "search_yarn_8x", "search_8x"]
    evolution = lr.EvolutionSettings(iterations=22)
    for name, changes in SEARCHES.items():
        stages.append(f"search_8x_{name}")
        config[stages[-1]] = lr.section(
            lr.SearchSettings(
                target_length=8 * L, model="pretrain", racing=0.9, ramps=128, evolution=evolution, **changes
            )
        )
    factors = {"longrope": FACTORS["longrope"], "critical": "search_8x_critical", "mixed": FACTORS["longrope"]}
    tuned = {"original": lr.Method("original", "pretrain")}
    for name, source in factors.items():
        model = f"finetune_{name}_{STEPS}"
        settings = finetune(8 * L, STEPS, source)
        stages.append(model)
        config[model] = lr.section(dataclasses.replace(settings, long_share=0.5 if name == "mixed" else 1.0))
        tuned |= {name: lr.Method(source, model), f"{name}_original_rotation": lr.Method("original", model)}
    untuned = {"longrope": "search_8x", "yarn_tuned": "search_yarn_8x", "original": "original"}
    untuned |= {name: f"search_8x_{name}" for name in SEARCHES}
    methods = {"evaluate": {name: lr.Method(source, "pretrain") for name, source in untuned.items()}}
    methods["evaluate_tuned"] = tuned
    for name, chosen in methods.items():
        stages.append(name)
        pairs = tuple(("longrope", other) for other in chosen if other != "longrope")
        config[name] = lr.section(
            lr.EvaluationSettings(
                split="test", lengths=(L, 8 * L), methods=chosen, controls=("original",), compared=pairs
            )
        )
    for name in set(config.stages) - set(stages):
        del config[name]
    config.stages = tuple(stages)
    return config
