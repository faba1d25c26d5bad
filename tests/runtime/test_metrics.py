import numpy as np
from etils import epath

from longrope_jax.runtime import json_lines
from longrope_jax.training.progress import Metrics


def steps(workdir):
    return [(record["stage"], record["step"]) for record in json_lines.read(workdir / "metrics.jsonl")]


def test_a_line_has_the_stage_the_step_and_plain_numbers(tmp_path):
    workdir = epath.Path(tmp_path)
    with Metrics(workdir, "pretrain") as metrics:
        metrics.write(3, loss=np.float32(0.5), accuracy=1)
    line = {"stage": "pretrain", "step": 3, "loss": 0.5, "accuracy": 1.0}
    assert json_lines.read(workdir / "metrics.jsonl") == [line]
    assert list((tmp_path / "tensorboard/pretrain").iterdir())


def test_going_on_forgets_what_was_written_beyond_the_checkpoint(tmp_path):
    workdir = epath.Path(tmp_path)
    for stage in ("pretrain", "search"):
        with Metrics(workdir, stage) as metrics:
            for step in (1, 2, 3):
                metrics.write(step, loss=1.0)
    with Metrics(workdir, "search", start=1) as metrics:
        metrics.write(2, loss=1.0)
    assert steps(workdir) == [("pretrain", 1), ("pretrain", 2), ("pretrain", 3), ("search", 1), ("search", 2)]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path)
    with Metrics(workdir, "pretrain") as metrics:
        metrics.write(1, loss=1.0)
    before = sorted((tmp_path / "tensorboard").rglob("*"))
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Metrics(workdir, "pretrain") as metrics:
        metrics.write(2, loss=1.0)
    with Metrics(workdir, "search") as metrics:
        metrics.write(2, loss=1.0)
    assert steps(workdir) == [("pretrain", 1)]
    assert [path for path in sorted((tmp_path / "tensorboard").rglob("*")) if path.is_file()] == [
        path for path in before if path.is_file()
    ]
