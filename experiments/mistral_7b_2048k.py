"""Mistral-7B from 8k to 2048k tokens: LongRoPE's other model (arXiv 2402.13753, sec. 4.1).

    python -m longrope_jax.main --config=experiments/mistral_7b_2048k.py --coordinator=auto \\
        --workdir=gs://BUCKET/mistral-2048k --config.load.path=gs://BUCKET/Mistral-7B-v0.1 \\
        --config.data.folder=gs://BUCKET/long-data-collections --config.data_pg19.tfds_dir=gs://BUCKET/tfds \\
        --config.data_proofpile.folder=gs://BUCKET/proofpile --config.data_books.folder=gs://BUCKET/books

The stages and the text are those of `llama2_7b_2048k`, except the fine-tuning: 400 steps on sequences of only 16k
tokens, with the factors of 256k, batch 64, at a constant learning rate of 1e-6, on Long-Data-Collections. The model
claims 32k tokens with a sliding window of 4k. Here attention is full and the original length is 8k, as in the paper.

Slice: v5p:4x4x4 (64 chips).
Expected time, from `--mode=compile` and not from a run (docs/results): 55 hours, of which the search at 2048k takes 45
and fine-tuning half an hour (4.1 s a step).

Published figures to compare with: the paper's tables have a row of this model for Proof-pile, for books from 8k to
2048k tokens, and for passkeys.
"""

from ml_collections import ConfigDict

import longrope_jax as lr
from experiments import llama2_7b_2048k
from experiments.llama2_7b_2048k import K

L = 8 * K


def get_config() -> ConfigDict:
    """The experiment."""
    config = llama2_7b_2048k.get_config()
    config.load = lr.section(lr.LoadSettings(path="gs://BUCKET/Mistral-7B-v0.1", dtype="bfloat16", preset="mistral_7b"))
    config.data = lr.section(lr.DataSettings(folder="gs://BUCKET/long-data-collections", shares=(0.99, 0.01, 0.0, 0.0)))
    config.finetune = lr.section(
        lr.FinetuneSettings(
            length=16 * K,
            steps=400,
            model="load",
            factors="search_256k",
            batch=64,
            accumulate=8,
            checkpoint_every=50,
            log_every=5,
            remat="attention_saveable",
            optimizer=lr.OptimizerSettings(learning_rate=1e-6, schedule="constant", warmup_steps=20, weight_decay=0.0),
        )
    )
    for name in ("finetune_128k", "finetune_256k", "search_128k", "search_4k"):
        del config[name]
    for name in ("search_2048k", "search_8k", "table", "table_without_recovery", "table_yarn", "export"):
        config[name].model = "finetune"
    config.table = lr.section(
        lr.TableSettings(
            lengths=(L, 256 * K, 2048 * K), factors=("search_8k", "search_256k", "search_2048k"), model="finetune"
        )
    )
    later = [name for name in config.stages if name in config]
    config.stages = tuple(["load", "search_256k", "finetune", *later[later.index("search_2048k") :]])
    return config
