"""Small experiments for tests: their configs, and how to look at what they left and to stop them."""

import copy
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from timing_fields import SPEEDS

from longrope_jax.data.corpus import DataSettings
from longrope_jax.experiment.stages import evaluation, search, training
from longrope_jax.model import LlamaConfig
from longrope_jax.search.settings import EvolutionSettings
from longrope_jax.settings import section
from longrope_jax.training.pretrain import PretrainSettings

ROOT = Path(__file__).parent.parent
LENGTH, TARGET = 16, 64
SIZES = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
EVOLUTION = EvolutionSettings(population=8, mutations=3, crossovers=3, parents=4, iterations=3)
PROGRESSIVE_STAGES = ("pretrain", "search_4x", "finetune_a", "search_8x", "search_1x", "table", "evaluate")


def make_config(folder, **sections):
    """A config of these stages."""
    basis = dict(
        model=LlamaConfig(vocab_size=258, original_length=LENGTH, **SIZES),
        data=DataSettings(folder=str(folder)),
        pretrain=PretrainSettings(steps=8, batch=4, checkpoint_every=4, log_every=2),
    )
    made = {name: section(settings) for name, settings in (basis | sections).items()}
    return ConfigDict(dict(stages=("pretrain", *sections), **made))


class Stopped(Exception):
    """Stands for whatever ends a process early."""


def contents(workdir):
    """What must not depend on how often a run was stopped."""
    return {
        "factors": (workdir / "factors" / "search.json").read_text(),
        **{
            name: [{k: v for k, v in record.items() if k not in SPEEDS} for record in read(workdir / f"{name}.jsonl")]
            for name in ("metrics", "search", "evaluation")
        },
    }


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def forbid_work(monkeypatch):
    """From now on no stage may do anything that takes time."""
    for module, name in [
        (training, "pretrain"), (search, "run_search"), (training, "finetune"), (evaluation, "run_evaluation"),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a finished stage ran again"))


def change(config, path, value):
    changed = copy.deepcopy(config)
    with changed.unlocked(), changed.ignore_type():
        target = changed
        *parents, last = path.split(".")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return changed
