"""Phi3-mini (3.8B) from 4k to 128k tokens with mixed context windows, as LongRoPE2 does (arXiv 2502.20082).

    python -m longrope_jax.main --config=experiments/phi3_mini_128k.py --coordinator=auto \\
        --workdir=gs://BUCKET/phi3-128k --config.load.path=gs://BUCKET/Phi-3-mini-4k-instruct \\
        --config.data.folder=gs://BUCKET/redpajama --config.data_pg19.tfds_dir=gs://BUCKET/tfds

The stages, the text and the numbers are those of `llama3_8b_128k`, on a model with heads of 96 and an original length
of 4k. The export uses Phi-3's class in Transformers, which recomputes its cache where the factors change.

Slice: v5p:2x4x4 (32 chips) or v5e:8x16 (128).
Expected time on v5p:2x4x4, from `--mode=compile` and not from a run (docs/results): 100 hours, of which fine-tuning
takes 97 (155 s a step, as if all sequences were long).

Published figures to compare with: the factors of Phi-3-mini-128k-instruct, which LongRoPE found (`python -m
longrope_jax.commands.export factors CONFIG.json long.csv --length=131072`); in LongRoPE2 the real critical
dimension is pair 25, the theoretical one 31. That is the one for L = 2k; for this model's 4k the formula gives 34.
"""

from ml_collections import ConfigDict

import longrope_jax as lr
from experiments.llama3_8b_128k import K, mixed_windows


def get_config() -> ConfigDict:
    """The experiment."""
    load = lr.LoadSettings("gs://BUCKET/Phi-3-mini-4k-instruct", dtype="bfloat16", preset="phi3_mini")
    config = mixed_windows(load, original=4 * K)
    config.mesh.axes = "fsdp:4,seq:-1"
    config.finetune.accumulate = 16
    config.export.architecture = "Phi3ForCausalLM"
    return config
