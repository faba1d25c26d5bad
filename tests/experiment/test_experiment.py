"""Whole experiments, small: what they leave, and how they resume."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import fast_compilation
import numpy as np
import pytest
from tiny_experiment import LENGTH, ROOT, TARGET, Stopped, change, contents, forbid_work, read

from longrope_jax import experiment, rope
from longrope_jax.evaluation import evaluate as evaluation_run
from longrope_jax.runtime import preemption
from longrope_jax.search.objective import Objective
from longrope_jax.training import loop


def test_a_run_leaves_all_that_is_promised(finished):
    for name in ("config.json", "metrics.jsonl", "search.jsonl", "evaluation.jsonl", "factors/search.json"):
        assert (finished / name).stat().st_size > 0
    for name in ("pretrain", "search"):
        assert any((finished / "checkpoints" / name).iterdir())
    assert any((finished / "tensorboard").iterdir())

    content = json.loads((finished / "report.json").read_text())
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

    factors = rope.load_factors(finished / "factors" / "search.json", head_dim=8)
    metadata = rope.load_metadata(finished / "factors" / "search.json")
    assert metadata["original_length"] == LENGTH and metadata["target_length"] == TARGET
    entries = [json.loads(line) for line in (finished / "search.jsonl").read_text().splitlines()]
    best = min(entries, key=lambda entry: entry["nll"])
    np.testing.assert_allclose(factors.lam, best["lam"], atol=1e-6)
    assert factors.n_hat == best["n_hat"]

    text = (finished / "report.md").read_text()
    figures = sorted(path.name for path in (finished / "figures").iterdir())
    assert len(figures) == 5 and all(f"figures/{name}" in text for name in figures)
    longrope = content["perplexity"]["64"]["longrope"]["ppl"]
    assert f"{longrope:.2f}" in text
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures) and f"<td>{longrope:.2f}" in page

    # Evaluation documents are not search documents, nor training ones.
    files = json.loads(next((finished / "data").rglob("metadata.json")).read_text())["files"]
    assert set(content["evaluations"]["evaluate"]["documents"]) <= set(files["evaluation"])
    assert not set(files["evaluation"]) & (set(files["search"]) | set(files["train"]))


def test_a_finished_run_is_not_run_again(config, finished, tmp_path, monkeypatch, capsys):
    workdir = Path(shutil.copytree(finished, tmp_path / "copied"))
    forbid_work(monkeypatch)
    assert experiment.run(config, workdir) == workdir / "report.md"
    assert capsys.readouterr().out.count("finished before") == 3
    assert contents(workdir) == contents(finished)


def test_two_identical_runs_are_identical_and_so_is_one_stopped_in_every_stage(config, finished, tmp_path, monkeypatch):
    for module, function, after in [
        (loop, "train_step", 6),
        (Objective, "block_nll", 24),  # 12 candidates on 2 documents
        (evaluation_run, "token_nll", 5),
    ]:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(module, function, _stop(getattr(module, function), after))
            experiment.run(config, tmp_path)
    experiment.run(config, tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_stages_can_be_profiled_which_changes_nothing(config, finished, copied_finished):
    profiled = change(config, "profile", {"steps": (2, 4)})
    for stage, file in [("search", "search.jsonl"), ("evaluate", "evaluation.jsonl")]:
        (copied_finished / "stages" / f"{stage}.json").unlink()
        (copied_finished / file).unlink()
    shutil.rmtree(copied_finished / "checkpoints" / "search")
    experiment.run(profiled, copied_finished)
    assert contents(copied_finished) == contents(finished)
    traced = {path.relative_to(copied_finished / "profile").parts[0] for path in copied_finished.rglob("*.xplane.pb")}
    assert traced == {"search", "evaluate"}  # pretrain was finished before


def _stop(function, after):
    """The function, until it was called `after` times."""
    calls = []

    def until(*args):
        calls.append(1)
        if len(calls) > after:
            raise Stopped
        return function(*args)

    return until


def test_windows_of_one_file_count_as_one_document():
    record = {"documents": ["a", "b", "a"], "nll_sums": [1.0, 2.0, 4.0], "counts": [10, 20, 30]}
    nll = evaluation_run.recorded_nll(record)
    np.testing.assert_array_equal(nll.sums, [5.0, 2.0])
    np.testing.assert_array_equal(nll.counts, [40, 20])


def test_a_seed_without_a_finite_score_does_not_spoil_a_run(config, tmp_path, monkeypatch):
    block_nll, first = Objective.block_nll, []

    def first_overflows(self, block, candidates):
        nll = block_nll(self, block, candidates)
        if not first:
            first.append(nll.__setitem__(0, np.inf))
        return nll

    monkeypatch.setattr(Objective, "block_nll", first_overflows)
    path = experiment.run(config, tmp_path)
    assert "PI (linear) not finite" in path.read_text()
    assert json.loads((tmp_path / "report.json").read_text())["search"][0]["seeds"]["linear"] is None


def test_another_config_is_refused_with_the_fields_that_differ(config, finished):
    other = change(change(config, "search.documents", 3), "pretrain.steps", 9)
    with pytest.raises(ValueError) as caught:
        experiment.prepare(other, finished)
    message = str(caught.value)
    assert "pretrain.steps (8 there, 9 now)" in message and "search.documents (2 there, 3 now)" in message
    assert "model." not in message


def test_a_request_to_stop_in_the_last_step_of_a_stage_is_not_lost(config, tmp_path, monkeypatch):
    calls, step = [], loop.train_step

    def asking(*args):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(loop, "train_step", asking)
    with pytest.raises(preemption.Preempted):
        experiment.run(config, tmp_path)
    assert (tmp_path / "stages" / "pretrain.json").exists()
    assert not (tmp_path / "stages" / "search.json").exists()


def test_a_command_that_is_asked_to_stop_exits_with_75_and_goes_on(config, tmp_path):
    """Stopped in a process of its own; it goes on in this one, where JAX is imported already."""
    steps = 400
    for name, value in [("steps", steps), ("log_every", 1), ("checkpoint_every", steps)]:
        config = change(config, f"pretrain.{name}", value)
    with config.unlocked():
        del config["search"], config["evaluate"]
    config = change(config, "stages", ("pretrain",))
    path, workdir = tmp_path / "config.py", tmp_path / "run"
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({config.to_dict()})\n"
    )
    flags = [f"--config={path}", f"--workdir={workdir}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "longrope_jax.main", *flags],
        cwd=ROOT,
        env=fast_compilation.environment(devices=1),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    with contextlib.closing(process.stderr):
        while not (workdir / "metrics.jsonl").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        messages = process.stderr.read()
    assert process.wait() == 75, messages
    assert "Traceback" not in messages
    stopped = int(
        re.search(rf"\npretrain: asked to stop, step (\d+) of {steps} is saved; the same command continues", messages)[
            1
        ]
    )
    assert [entry["step"] for entry in read(workdir / "metrics.jsonl")] == list(range(1, stopped + 1))
    done = command_line.run(*flags)
    assert done.returncode == 0, done.stderr
    assert [entry["step"] for entry in read(workdir / "metrics.jsonl")] == list(range(1, steps + 1))
    assert (workdir / "report.md").exists()
