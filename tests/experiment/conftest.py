"""Finished runs of small experiments. Copy one before you change anything."""

import random
import shutil
import string
from pathlib import Path

import pytest
from tiny_experiment import EVOLUTION, LENGTH, TARGET, make_config

from longrope_jax import experiment
from longrope_jax.evaluation.evaluate import EvaluationSettings, Method, published_methods
from longrope_jax.experiment.stages import TableSettings
from longrope_jax.search.settings import SearchSettings
from longrope_jax.training.finetune import FinetuneSettings


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twenty texts of repeated words, most of them longer than the target length."""
    path, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(30)]
    for k in range(20):
        (path / f"{k}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(60, 200))))
    return path


@pytest.fixture(scope="session")
def config(folder):
    return make_config(
        folder,
        search=SearchSettings(target_length=TARGET, documents=2, evolution=EVOLUTION),
        evaluate=EvaluationSettings(
            lengths=(8, 16, 32, 64), documents=3, methods={**published_methods(), "longrope": Method("search")}
        ),
    )


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    """A finished run of it. Copy it before you change anything."""
    workdir = tmp_path_factory.mktemp("finished")
    experiment.run(config, workdir)
    return workdir


@pytest.fixture(scope="session")
def progressive_config(folder):
    """The paper's recipe: 4L, fine-tuned there, 8L without, L recovered, all in a table."""
    search_settings = dict(documents=2, evolution=EVOLUTION)
    return make_config(
        folder,
        search_4x=SearchSettings(target_length=64, **search_settings),
        finetune_a=FinetuneSettings(
            length=64, factors="search_4x", steps=6, batch=2, checkpoint_every=3, log_every=2, evaluate_every=3,
            held_out_documents=2, remat="none",
        ),
        search_8x=SearchSettings(target_length=128, **search_settings),
        search_1x=SearchSettings(target_length=LENGTH, upper_bound=4.0, model="finetune_a", **search_settings),
        table=TableSettings(lengths=(16, 64, 128), factors=("search_1x", "search_4x", "search_8x")),
        evaluate=EvaluationSettings(
            lengths=(16, 64, 128),
            documents=3,
            methods={
                "longrope": Method("table"),
                "yarn": Method("yarn", "finetune_a"),
                "dynamic_ntk": Method("dynamic_ntk"),
                "original": Method("original", "pretrain"),
                "second": Method("search_8x"),
            },
            controls=("original", "yarn"),
            compared=(("second", "yarn"), ("longrope", "original")),
        ),
    )  # fmt: skip


@pytest.fixture(scope="session")
def progressive(progressive_config, tmp_path_factory):
    """A finished run of it. Copy it before you change anything."""
    workdir = tmp_path_factory.mktemp("progressive")
    experiment.run(progressive_config, workdir)
    return workdir


@pytest.fixture
def copied(progressive, tmp_path):
    return Path(shutil.copytree(progressive, tmp_path / "copied"))


@pytest.fixture
def copied_finished(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copied_finished"))
