"""All of LongRoPE on two cores: extends 128 bytes of context to 8,192 and keeps short inputs good.

    make progressive
    python -m longrope_jax.main --config=experiments/progressive_tiny.py --workdir=runs/progressive

LongRoPE's recipe (sec. 3.3) on a byte-level model of 0.57M parameters and the embedded corpus, L = 128: pretrain at L;
search factors for 4L and 8L; fine-tune at 4L with the factors for 4L, then at 8L with those for 8L (the paper's
intermediate step); search 64L on the tuned model, without further training; search L and 2L with a smaller maximum of
lambda, to recover short inputs; make a table of all factors by length; evaluate from L/2 to 64L; export.

The baselines: YaRN with as much fine-tuning, all of it at 8L, and a second extension on its effective wavelengths; and
the model fine-tuned at L with as many tokens.
"""

from ml_collections import ConfigDict

import longrope_jax as lr

L = 128


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.stages = (
        "pretrain",
        "search_4x",
        "search_8x",
        "finetune_4x",
        "finetune_8x",
        "search_64x",
        "search_1x",
        "search_2x",
        "table_longrope",
        "table_best_seed",
        "finetune_yarn",
        "table_yarn",
        "table_yarn_without_temperature",
        "table_yarn_mistral",
        "finetune_original",
        "evaluate",
        "export",
    )
    config.model = lr.section(lr.LlamaConfig.preset("tiny"))
    config.data = lr.section(lr.DataSettings())
    config.mesh = lr.section(lr.MeshSettings())
    config.profile = lr.section(lr.ProfileSettings())
    config.pretrain = lr.section(
        lr.PretrainSettings(
            steps=1000,
            batch=16,
            checkpoint_every=250,
            optimizer=lr.OptimizerSettings(learning_rate=5e-3, warmup_steps=50),
        )
    )

    config.search_4x = lr.section(
        lr.SearchSettings(
            target_length=4 * L,
            model="pretrain",
            documents_at_once=5,
            evolution=lr.EvolutionSettings.paper(iterations=5),
        )
    )
    config.search_8x = lr.section(
        lr.SearchSettings(
            target_length=8 * L,
            model="pretrain",
            documents_at_once=5,
            evolution=lr.EvolutionSettings.paper(iterations=10),
        )
    )

    tuning = dict(optimizer=lr.OptimizerSettings(learning_rate=1.5e-3, schedule="linear", warmup_steps=20))
    tuning |= dict(checkpoint_every=100, evaluate_every=50, remat="none")
    config.finetune_4x = lr.section(
        lr.FinetuneSettings(length=4 * L, batch=8, steps=100, model="pretrain", factors="search_4x", **tuning)
    )
    config.finetune_8x = lr.section(
        lr.FinetuneSettings(length=8 * L, batch=4, steps=100, model="finetune_4x", factors="search_8x", **tuning)
    )

    config.search_64x = lr.section(
        lr.SearchSettings(
            target_length=64 * L,
            model="finetune_8x",
            documents=2,
            # Halved, as in the paper above 512k tokens; and fewer iterations, to save time.
            evolution=lr.EvolutionSettings.paper(population=24, mutations=8, crossovers=8, iterations=10),
        )
    )
    short = dict(
        model="finetune_8x", documents=20, documents_at_once=20, evolution=lr.EvolutionSettings.paper(iterations=6)
    )
    config.search_1x = lr.section(lr.SearchSettings(target_length=L, upper_bound=4.0, **short))
    config.search_2x = lr.section(lr.SearchSettings(target_length=2 * L, upper_bound=4.0, **short))
    config.table_longrope = lr.section(
        lr.TableSettings(
            lengths=(L, 2 * L, 8 * L, 64 * L),
            factors=("search_1x", "search_2x", "search_8x", "search_64x"),
            model="finetune_8x",
        )
    )
    # Shows the gain of the second search: the same up to 8L, and the best seed of the second search beyond.
    config.table_best_seed = lr.section(
        lr.TableSettings(
            lengths=(L, 2 * L, 8 * L, 64 * L),
            factors=("search_1x", "search_2x", "search_8x", "search_64x_best_seed"),
            model="finetune_8x",
        )
    )

    config.finetune_yarn = lr.section(
        lr.FinetuneSettings(length=8 * L, batch=4, steps=200, model="pretrain", factors="yarn", **tuning)
    )
    for name in ("yarn", "yarn_without_temperature", "yarn_mistral"):
        config[f"table_{name}"] = lr.section(
            lr.TableSettings(lengths=(8 * L, 64 * L), factors=("yarn", name), model="finetune_yarn")
        )
    config.finetune_original = lr.section(
        lr.FinetuneSettings(length=L, batch=32, steps=200, model="pretrain", factors="original", **tuning)
    )

    config.evaluate = lr.section(
        lr.EvaluationSettings(
            split="test",
            lengths=(L // 2, L, 2 * L, 4 * L, 8 * L, 16 * L, 32 * L, 64 * L),
            documents=16,
            methods={
                "longrope": lr.Method("table_longrope", "finetune_8x"),
                "longrope_without_second_search": lr.Method("table_best_seed", "finetune_8x"),
                "yarn": lr.Method("table_yarn", "finetune_yarn"),
                "yarn_without_temperature": lr.Method("table_yarn_without_temperature", "finetune_yarn"),
                "yarn_mistral": lr.Method("table_yarn_mistral", "finetune_yarn"),
                "original": lr.Method("original", "pretrain"),
                "tuned_at_original": lr.Method("original", "finetune_original"),
            },
            controls=("original", "tuned_at_original"),
        )
    )
    config.export = lr.section(
        lr.ExportSettings(
            factors="table_longrope", model="finetune_8x", allow_dropping_start_tokens=True, allow_dropping_lengths=True
        )
    )
    return config
