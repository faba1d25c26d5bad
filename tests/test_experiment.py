"""Whole experiments, small: what they leave, how they resume, and what they refuse before any work."""

import copy
import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from longrope_jax import experiment, report, rope, stages
from longrope_jax.evaluation import run as evaluation_run
from longrope_jax.evaluation.run import EvaluationSettings
from longrope_jax.experiment import DataSettings
from longrope_jax.model import LlamaConfig
from longrope_jax.search import run as search_run
from longrope_jax.search.evolution import EvolutionSettings
from longrope_jax.search.run import SearchSettings
from longrope_jax.settings import section
from longrope_jax.training import loop
from longrope_jax.training.loop import PretrainSettings, load_params

ROOT = Path(__file__).parent.parent
LENGTH, TARGET = 16, 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twenty texts of repeated words, most of them longer than the target length."""
    path, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(30)]
    for k in range(20):
        (path / f"{k}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(60, 200))))
    return path


@pytest.fixture
def config(folder):
    sizes = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
    evolution = EvolutionSettings(population=8, mutations=3, crossovers=3, parents=4, iterations=3)
    return ConfigDict(
        dict(
            stages=("pretrain", "search", "evaluate"),
            model=section(LlamaConfig(vocab_size=258, original_length=LENGTH, **sizes)),
            data=section(DataSettings(folder=str(folder))),
            pretrain=section(PretrainSettings(steps=8, batch=4, checkpoint_every=4, log_every=2)),
            search=section(SearchSettings(target_length=TARGET, documents=2, evolution=evolution)),
            evaluate=section(EvaluationSettings(lengths=(8, 16, 32, 64), documents=3)),
        )
    )


class Stopped(Exception):
    """Stands for whatever ends a process early."""


def contents(workdir):
    """What must not depend on how often a run was stopped."""
    times = {"tokens_per_second", "seconds"}
    return {
        "factors": (workdir / "factors" / "search.json").read_text(),
        **{
            name: [{k: v for k, v in record.items() if k not in times} for record in read(workdir / f"{name}.jsonl")]
            for name in ("metrics", "search", "evaluation")
        },
    }


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_all_that_is_promised(config, tmp_path):
    workdir = tmp_path / "run"
    report_path = experiment.run(config, workdir)
    assert report_path == workdir / "report.md"
    for name in ("config.json", "metrics.jsonl", "search.jsonl", "evaluation.jsonl", "factors/search.json"):
        assert (workdir / name).stat().st_size > 0
    for name in ("pretrain", "search"):
        assert any((workdir / "checkpoints" / name).iterdir())
    assert any((workdir / "tensorboard").iterdir())

    content = json.loads((workdir / "report.json").read_text())
    assert set(content["perplexity"]) == {"8", "16", "32", "64"}
    for row in content["perplexity"].values():
        assert {"unscaled", "linear", "ntk", "yarn", "longrope"} <= set(row)
        for entry in row.values():
            assert np.exp(entry["nll"]) == pytest.approx(entry["ppl"])
            assert entry["ci95"][0] <= entry["ppl"] <= entry["ci95"][1]
    (search,) = content["search"]
    assert search["target_length"] == TARGET and search["evaluations"] == len(search["curve"]) == 8 + 3 * 6
    assert search["curve"][-1] == search["best_nll"] <= min(search["seeds"].values())
    assert 0 < search["objective_seconds"] < search["seconds"]
    assert set(content["seconds"]) == {"pretrain", "search", "evaluate"}

    factors = rope.load_factors(workdir / "factors" / "search.json", head_dim=8)
    metadata = rope.load_metadata(workdir / "factors" / "search.json")
    assert metadata["original_length"] == LENGTH and metadata["target_length"] == TARGET
    entries = [json.loads(line) for line in (workdir / "search.jsonl").read_text().splitlines()]
    best = min(entries, key=lambda entry: entry["nll"])
    np.testing.assert_allclose(factors.lam, best["lam"], atol=1e-6)
    assert factors.n_hat == best["n_hat"]

    text = report_path.read_text()
    figures = sorted(path.name for path in (workdir / "figures").iterdir())
    assert len(figures) == 4 and all(f"figures/{name}" in text for name in figures)
    longrope = content["perplexity"]["64"]["longrope"]["ppl"]
    assert f"{longrope:.2f}" in text

    # Evaluation documents are not search documents, nor training ones.
    files = json.loads(next((workdir / "data").rglob("metadata.json")).read_text())["files"]
    assert set(content["documents"]) <= set(files["evaluation"])
    assert not set(files["evaluation"]) & (set(files["search"]) | set(files["train"]))


def test_a_finished_run_is_not_run_again(config, tmp_path, monkeypatch, capsys):
    experiment.run(config, tmp_path)
    before = contents(tmp_path)
    for name in ("pretrain", "run_search", "run_evaluation"):
        monkeypatch.setattr(stages, name, lambda *_: pytest.fail("a finished stage ran again"))
    capsys.readouterr()
    experiment.run(config, tmp_path)
    assert capsys.readouterr().out.count("finished before") == 3
    assert contents(tmp_path) == before


def test_two_identical_runs_are_identical_and_so_is_one_stopped_in_every_stage(config, tmp_path, monkeypatch):
    experiment.run(config, tmp_path / "a")
    for module, function, after in [
        (loop, "train_step", 6),
        (search_run, "perplexity_objective", 12),
        (evaluation_run, "token_nll", 5),
    ]:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            original = getattr(module, function)
            stop = _stop_scoring if function == "perplexity_objective" else _stop
            patch.setattr(module, function, stop(original, after))
            experiment.run(config, tmp_path / "b")
    experiment.run(config, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def _stop(function, after):
    """The function, until it was called `after` times."""
    calls = []

    def until(*args):
        calls.append(1)
        if len(calls) > after:
            raise Stopped
        return function(*args)

    return until


def _stop_scoring(make_objective, after):
    """Objectives that stop once they have scored `after` candidates."""

    def make(*args):
        score, scored = make_objective(*args), []

        def until(population):
            if sum(scored) >= after:
                raise Stopped
            scored.append(len(population.lam))
            return score(population)

        return until

    return make


def change(config, path, value):
    changed = copy.deepcopy(config)
    with changed.unlocked(), changed.ignore_type():
        target = changed
        *parents, last = path.split(".")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return changed


REFUSED = {
    "unknown field": ("search.taget_length", 64, "config.search.taget_length.*did you mean target_length"),
    "unknown section": ("serach", {}, "config.serach"),
    "unknown stage": ("stages", ("pretrain", "polish"), "polish.*pretrain, search, evaluate"),
    "stage twice": ("stages", ("pretrain", "search", "search"), "twice"),
    "no model first": ("stages", ("search", "evaluate"), "can't come first"),
    "wrong type": ("pretrain.steps", "many", "config.pretrain.steps = 'many' must be int"),
    "two models": ("stages", ("pretrain", "pretrain_b", "search"), "can have one pretrain stage"),
    "lengths past the target": ("evaluate.lengths", (16, 128), "must end at 64"),
    "no room for factors": ("search.upper_bound", 0.5, "upper_bound = 0.5 must be at least 1"),
    "no extension": ("search.target_length", LENGTH, "target_length = 16 must be above.*original_length = 16"),
    "batch too large": ("pretrain.batch", 10_000, "config.pretrain: .*fewer than a batch of 10000"),
    "small vocabulary": ("model.vocab_size", 100, "vocab_size = 100 is below"),
    "unknown method": ("evaluate.methods", ("yern",), "unknown methods .*yern"),
    "odd head": ("model.head_dim", 7, "config.model: head_dim = 7"),
    "missing folder": ("data.folder", "/nonexistent", "'/nonexistent' is not a directory"),
}


@pytest.mark.parametrize(("path", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_configs_are_refused_in_one_line_before_any_work(config, tmp_path, monkeypatch, path, value, message):
    monkeypatch.setattr(stages, "pretrain", lambda *_: pytest.fail("training began"))
    with pytest.raises(ValueError, match=message) as caught:
        experiment.run(change(config, path, value), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.json").exists()  # the mended config may use the directory


def test_lengths_beyond_all_documents_are_refused_before_any_work(config, tmp_path):
    config = change(change(config, "search.target_length", 100_000), "evaluate.lengths", (16, 100_000))
    with pytest.raises(ValueError, match="config.search: none of .* documents has the 100001 tokens"):
        experiment.prepare(config, tmp_path)


def test_a_mended_folder_is_looked_at_again(config, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for k in range(6):
        (texts / f"short{k}.txt").write_text("too short")
    config = change(config, "data.folder", str(texts))
    with pytest.raises(ValueError, match="documents"):
        experiment.run(config, tmp_path / "run")
    for k in range(30):
        (texts / f"long{k}.txt").write_text("long enough " * 30)
    experiment.prepare(config, tmp_path / "run")


def test_windows_of_one_file_count_as_one_document():
    record = {"documents": ["a", "b", "a"], "nll_sums": [1.0, 2.0, 4.0], "counts": [10, 20, 30]}
    nll = report._by_file(record)
    np.testing.assert_array_equal(nll.sums, [5.0, 2.0])
    np.testing.assert_array_equal(nll.counts, [40, 20])


def test_a_seed_without_a_finite_score_does_not_spoil_a_run(config, tmp_path, monkeypatch):
    make_objective = search_run.perplexity_objective

    def first_overflows(*args):
        score, first = make_objective(*args), []

        def scored(population):
            nll = score(population)
            if not first:
                first.append(nll.__setitem__(0, np.inf))
            return nll

        return scored

    monkeypatch.setattr(search_run, "perplexity_objective", first_overflows)
    path = experiment.run(config, tmp_path)
    assert "PI (linear) not finite" in path.read_text()
    assert json.loads((tmp_path / "report.json").read_text())["search"][0]["seeds"]["linear"] is None


def test_another_config_is_refused_with_the_fields_that_differ(config, tmp_path):
    experiment.run(config, tmp_path)
    other = change(change(config, "search.documents", 3), "pretrain.steps", 9)
    with pytest.raises(ValueError) as caught:
        experiment.run(other, tmp_path)
    message = str(caught.value)
    assert "pretrain.steps (8 there, 9 now)" in message and "search.documents (2 there, 3 now)" in message
    assert "model." not in message


def command(workdir, *overrides):
    path = str(ROOT / "experiments" / "quickstart.py")
    return [sys.executable, "-m", "longrope_jax.main", f"--config={path}", f"--workdir={workdir}", *overrides]


BAD_COMMANDS = {
    "unknown flag of the config": ["--config.search.taget_length=2048"],
    "bad value": ["--config.search.target_length=100"],
    "missing folder": ["--config.data.folder=/nonexistent"],
}


@pytest.mark.parametrize("overrides", BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_the_command_line_answers_bad_input_with_one_line(tmp_path, overrides):
    done = subprocess.run(command(tmp_path / "run", *overrides), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_an_unwritable_work_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run(command(tmp_path / "file" / "run"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "file/run" in done.stderr


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(folder, tmp_path):
    overrides = [
        f"--config.data.folder={folder}",
        "--config.pretrain.steps=60",
        "--config.pretrain.checkpoint_every=10",
        "--config.search.evolution.iterations=4",
        "--config.search.target_length=256",
        "--config.evaluate.lengths=(64,128,256)",
        "--config.evaluate.documents=3",
    ]
    subprocess.run(command(tmp_path / "whole", *overrides), check=True, cwd=ROOT, capture_output=True)
    rng, kills = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(
            command(tmp_path / "killed", *overrides), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(8, 25))
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run(command(tmp_path / "killed", *overrides), check=True, cwd=ROOT, capture_output=True)
    assert kills >= 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    trees = [jax.tree.leaves(load_params(tmp_path / name, "pretrain")) for name in ("whole", "killed")]
    for a, b in zip(*trees, strict=True):
        np.testing.assert_array_equal(a, b)
