"""LLaMA3-8B from 8k to 128k tokens with mixed context windows, as LongRoPE2 does (arXiv 2502.20082).

    python -m longrope_jax.main --config=experiments/llama3_8b_128k.py --coordinator=auto \\
        --workdir=gs://BUCKET/llama3-128k --config.load.path=gs://BUCKET/Meta-Llama-3-8B \\
        --config.data.folder=gs://BUCKET/redpajama --config.data_pg19.tfds_dir=gs://BUCKET/tfds

The stages: search factors for 128k and a critical dimension on the pretrained model, by the perplexity of the digits
of needles in ten books; tune 2250 steps, batch 64, learning rate 2e-5 with cosine decay, on sequences of 128k. Three
in ten sequences are packed with documents of at most 8k tokens, which do not attend to each other, under the original
rotation. Then a table with the original rotation up to 8k, perplexity, needles at five depths, and an export that
drops only start tokens.

Slice: v5p:4x4x4 (64 chips). Expected time, from `--mode=compile` and not from a run (docs/results): 72 hours, of
which fine-tuning takes 70 (111 s a step, as if all sequences were long).

Published figures to compare with (LongRoPE2): short benchmarks keep 98.6 % of the original model's scores (`python -m
longrope_jax.commands.harness --model=WORKDIR/export`); RULER at 128k is 82.0 with its search on needles, and 78.7 with
the same search on PG19's perplexity (`--config.search.objective.needle.kind=perplexity`; RULER is not part of this).

The paper has 10B tokens: 3B short, 3B of up to 100k and 4B of 100k to 200k. These 2250 steps are 19B, as every
sequence has 128k; `--config.finetune.steps=1190` makes 10B. Weight decay and warmup are not published; these are
common values.

Text: long and short documents for fine-tuning, for example RedPajama; PG19 for search and evaluation.
"""

from ml_collections import ConfigDict

import longrope_jax as lr

K = 1024
TARGET = 128 * K


def get_config() -> ConfigDict:
    """The experiment."""
    return mixed_windows(
        lr.LoadSettings("gs://BUCKET/Meta-Llama-3-8B", dtype="bfloat16", preset="llama3_8b"), original=8 * K
    )


def mixed_windows(load: lr.LoadSettings, original: int) -> ConfigDict:
    """The experiment for a model with `original` tokens of original length."""
    config = ConfigDict()
    config.stages = ("load", "search", "finetune", "table", "evaluate", "retrieval", "export")
    config.mesh = lr.section(lr.MeshSettings(axes="tensor:4,seq:-1"))
    config.profile = lr.section(lr.ProfileSettings())
    config.load = lr.section(load)
    config.data = lr.section(lr.DataSettings(folder="gs://BUCKET/redpajama", shares=(0.99, 0.01, 0.0, 0.0)))
    config.data_pg19 = lr.section(lr.DataSettings(tfds="pg19", tfds_dir="gs://BUCKET/tfds"))
    config.search = lr.section(
        lr.SearchSettings(
            target_length=TARGET,
            documents=10,
            objective={"needle": lr.TermSettings("needle")},
            space="critical_dimension",
            evolution=lr.EvolutionSettings.paper(),
            data="data_pg19",
        )
    )
    config.finetune = lr.section(
        lr.FinetuneSettings(
            length=TARGET,
            steps=2250,
            batch=64,
            accumulate=64,
            factors="search",
            packed=True,
            long_share=0.7,
            checkpoint_every=50,
            log_every=5,
            remat="attention_saveable",
            optimizer=lr.OptimizerSettings(learning_rate=2e-5, schedule="cosine", warmup_steps=50),
        )
    )
    config.table = lr.section(lr.TableSettings(lengths=(original, TARGET), factors=("original", "search")))
    lengths = tuple(length * K for length in (4, 8, 16, 32, 64, 128))
    config.evaluate = lr.section(
        lr.EvaluationSettings(
            split="test",
            lengths=lengths,
            stride=256,
            tokens_at_once=TARGET,
            documents=10,
            methods={
                "longrope": lr.Method("table"),
                "not_tuned": lr.Method("search", "load"),
                "yarn_not_tuned": lr.Method("yarn", "load"),
                "original": lr.Method("original", "load"),
            },
            controls=("original",),
            data="data_pg19",
        )
    )
    config.retrieval = lr.section(
        lr.RetrievalSettings(
            lengths=lengths,
            task="needle",
            depths=(0.0, 0.25, 0.5, 0.75, 1.0),
            methods={"longrope": lr.Method("table")},
            prompts_at_once=8,
            tokens_at_once=8 * K,
            data="data_pg19",
        )
    )
    config.export = lr.section(
        lr.ExportSettings(
            factors="table",
            dtype="bfloat16",
            allow_dropping_start_tokens=True,
            cost_lengths=(TARGET,),
            data="data_pg19",
        )
    )
    return config
