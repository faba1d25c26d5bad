"""From 128 bytes of context to 65,536: one more search on the model of `progressive_tiny`, evaluated on long files.

    make progressive_512x
    python -m longrope_jax.main --config=experiments/progressive_512x.py --workdir=runs/progressive

In the work directory of a finished `progressive_tiny` it runs only the new stages: a search at 512L on one long
document, the tables with one more boundary, and the evaluation on the files that are long enough. It trains nothing;
512L is 64 times the length of the fine-tuning. Memory does not depend on the length, except for the activations of one
window.
"""

from ml_collections import ConfigDict

import longrope_jax as lr
from experiments import progressive_tiny
from experiments.progressive_tiny import L


def get_config() -> ConfigDict:
    """The experiment."""
    config = progressive_tiny.get_config()
    config.stages = (*config.stages, "search_512x", "table_longrope_512x", "table_yarn_512x", "evaluate_512x")
    config.search_512x = lr.section(
        lr.SearchSettings(
            target_length=512 * L,
            model="finetune_8x",
            documents=1,
            evolution=lr.EvolutionSettings.paper(population=8, mutations=4, crossovers=4, iterations=1),
        )
    )
    config.table_longrope_512x = lr.section(
        lr.TableSettings(
            lengths=(*config.table_longrope.lengths, 512 * L),
            factors=(*config.table_longrope.factors, "search_512x"),
            model="finetune_8x",
        )
    )
    config.table_yarn_512x = lr.section(
        lr.TableSettings(
            lengths=(8 * L, 64 * L, 512 * L),
            factors=("yarn", "yarn_without_temperature", "yarn_without_temperature"),
            model="finetune_yarn",
        )
    )
    config.evaluate_512x = lr.section(
        lr.EvaluationSettings(
            lengths=(L, 8 * L, 64 * L, 512 * L),
            documents=5,
            methods={
                "longrope": lr.Method("table_longrope_512x", "finetune_8x"),
                "yarn_without_temperature": lr.Method("table_yarn_512x", "finetune_yarn"),
                "tuned_at_original": lr.Method("original", "finetune_original"),
            },
            controls=("tuned_at_original",),
        )
    )
    return config
