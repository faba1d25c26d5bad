"""From 128 bytes of context to 65,536: one more search on the model of `progressive_tiny`, evaluated on long files.

    make progressive_512x
    python -m longrope_jax.main --config=experiments/progressive_512x.py --workdir=runs/progressive

In the work directory of a finished `progressive_tiny` it runs only the new stages: tuned YaRN and a search at 512L on
one long document, where screening reads one candidate of 32 in full; the tables with one more boundary; and the
evaluation on the files that are long enough. It trains nothing; 512L is 64 times the length of the fine-tuning. Memory
does not depend on the length, except for the activations of one window.
"""

from ml_collections import ConfigDict

import longrope_jax as lr
from experiments import progressive_tiny
from experiments.progressive_tiny import L, searches

CELL = "longrope_50"


def get_config() -> ConfigDict:
    """The experiment."""
    config = progressive_tiny.get_config(CELL)
    tuned = f"finetune_{CELL}"
    screening = lr.ScreeningSettings(share=1 / 64, reduction_factor=32)
    stages = searches("512x", tuned, target_length=512 * L, documents=1, iterations=4, screening=screening)
    methods = {"tuned_at_original": lr.Method("original", f"finetune_original_{CELL.split('_')[1]}")}
    for name, search in (("longrope", "search_512x"), ("yarn_tuned", "search_yarn_512x")):
        table, before = f"table_{name}_512x", config[f"table_{CELL}_{name}"]
        stages[table] = lr.TableSettings(
            lengths=(*before.lengths, 512 * L), factors=(*before.factors, search), model=tuned
        )
        methods[name] = lr.Method(table, tuned)
    stages["evaluate_512x"] = lr.EvaluationSettings(
        lengths=(L, 8 * L, 64 * L, 512 * L), documents=5, methods=methods, controls=("tuned_at_original",)
    )
    for name, settings in stages.items():
        config[name] = lr.section(settings)
    config.stages = (*config.stages, *stages)
    return config
