"""Killed while saving, and what can't be saved: it is told, and the step before is there."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from saved_steps import names, save, saved_step

from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.preemption import Preempted

# Killed while saving.


def test_an_interrupted_save_is_not_taken_for_a_step(tmp_path, monkeypatch):
    stage = tmp_path / "stage"
    save(stage, 1)

    def killed(*_, **__):
        raise OSError("killed before the step got its name")

    with monkeypatch.context() as patch:
        for function in ("rename", "replace"):
            patch.setattr(os, function, killed)
        with pytest.raises(OSError, match="step 2 could not be saved; last good step: 1; killed"):
            save(stage, 2)
    (left_over,) = set(names(stage)) - {"1", "manifests"}
    assert left_over != "2"

    with Checkpoints(stage) as checkpoints:
        assert checkpoints.latest() == 1
        assert names(stage) == ["1", "manifests"]
        checkpoints.save(2, {"params": {"x": jnp.full(2, 2)}}, {"step": 2})
    assert saved_step(stage, 2)


def test_killed_right_behind_a_steps_completion(tmp_path, monkeypatch):
    stage = tmp_path / "stage"
    with monkeypatch.context() as patch:
        patch.setattr("longrope_jax.runtime.checkpoints._complete_manifest", lambda directory, step: None)
        save(stage, 1)
    manifest = json.loads((stage / "manifests/1.json").read_text())
    assert "_CHECKPOINT_METADATA" not in manifest
    assert "params/manifest.ocdbt" in manifest
    assert saved_step(stage, 1)
    assert not (stage / "damaged").exists()


SAVE_IN_A_LOOP = """
import sys, itertools, jax.numpy as jnp
from longrope_jax.runtime.checkpoints import Checkpoints
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    for step in itertools.count((checkpoints.latest() or 0) + 1):
        checkpoints.save(step, {"params": {"x": jnp.full(2, step)}}, {"step": step})
        print(step, flush=True)
"""


def test_killed_at_any_time_there_is_a_good_step(tmp_path, caplog):
    stage, known = tmp_path / "stage", 0
    for wait in (0.0, 0.017):
        command = [sys.executable, "-c", SAVE_IN_A_LOOP, str(stage)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            first = int(process.stdout.readline())
            process.stdout.readline()
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        with Checkpoints(stage, keep=1) as checkpoints:
            newest = checkpoints.latest()
            assert newest >= first > known
            arrays, record = checkpoints.restore(newest)
        assert record == {"step": newest}
        assert arrays["params"]["x"].tolist() == [newest, newest]
        known = newest
    assert not [entry for entry in caplog.records if "damaged" in entry.getMessage()]


# What can't be saved is told.


@pytest.fixture
def disk():
    """Fills up on `disk.fill()`: no file may grow beyond what a small step needs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield SimpleNamespace(fill=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1])))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_too_much(checkpoints, step):
    checkpoints.save(step, {"params": {"x": jnp.arange(1_000_000)}}, {})


@pytest.mark.parametrize("good", [None, 1])
def test_a_full_disk_is_reported_in_one_line_and_leaves_the_step_before(tmp_path, disk, good):
    stage = tmp_path / "stage"
    if good:
        save(stage, good, keep=1)
    expected = f"^{stage}: step 2 could not be saved; last good step: {good}; [^\n]*$"
    with pytest.raises(OSError, match=expected), Checkpoints(stage, keep=1) as checkpoints:
        disk.fill()
        save_too_much(checkpoints, 2)
    with Checkpoints(stage, keep=1) as checkpoints:
        assert checkpoints.latest() == good
    assert good is None or saved_step(stage, good)
    assert not (stage / "damaged").exists()


def test_a_full_disk_is_reported_at_the_next_save_which_can_be_tried_again(tmp_path, disk):
    stage = tmp_path / "stage"
    save(stage, 1)
    with Checkpoints(stage) as checkpoints:
        disk.fill()
        save_too_much(checkpoints, 2)
        with pytest.raises(OSError, match="step 2 could not be saved; last good step: 1; "):
            checkpoints.save(3, {"params": {"x": jnp.full(2, 3)}}, {"step": 3})
        assert checkpoints.latest() == 1
        checkpoints.save(3, {"params": {"x": jnp.full(2, 3)}}, {"step": 3})
    assert saved_step(stage, 3)


def test_a_stop_does_not_hide_that_its_step_is_not_saved(tmp_path, disk):
    with pytest.raises(OSError, match="step 2 could not be saved"), Checkpoints(tmp_path / "stage") as checkpoints:
        disk.fill()
        save_too_much(checkpoints, 2)
        raise Preempted("stage", "step 2 is saved")


def test_a_full_disk_does_not_hide_another_exception(tmp_path, disk, caplog):
    stage = tmp_path / "stage"
    with pytest.raises(KeyError, match="another reason to leave"), Checkpoints(stage) as checkpoints:
        disk.fill()
        save_too_much(checkpoints, 2)
        raise KeyError("another reason to leave")
    assert f"{stage}: step 2 could not be saved" in caplog.text


def test_a_manifest_that_cannot_be_written_is_a_step_not_saved(tmp_path):
    stage = tmp_path / "stage"
    save(stage, 1)
    (stage / "manifests/.2.json.partial").mkdir()
    with pytest.raises(OSError, match="step 2 could not be saved; last good step: 1; "):
        save(stage, 2)
    (stage / "manifests/.2.json.partial").rmdir()
    assert saved_step(stage, 1)


@pytest.mark.parametrize(("leaf", "record"), [("text", {}), (jnp.ones(2), {"a": jnp.ones(2)})])
def test_what_cannot_be_written_is_reported_and_does_not_stop_the_next_save(tmp_path, leaf, record):
    with Checkpoints(tmp_path / "stage") as checkpoints:
        with pytest.raises(OSError, match="step 1 could not be saved; last good step: None; "):
            checkpoints.save(1, {"params": {"x": leaf}}, record)
            checkpoints.latest()
        checkpoints.save(1, {"params": {"x": jnp.ones(2)}}, {"step": 1})
    assert saved_step(tmp_path / "stage", 1)


def test_a_place_that_is_no_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file/stage")
