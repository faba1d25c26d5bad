"""Two processes on one machine, talking through CPU collectives, train as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fast_compilation
import jax
import numpy as np
import pytest

from longrope_jax.interop import load_pretrained
from longrope_jax.runtime import processes

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from etils import epath
import numpy as np
import longrope_jax as lr
from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.runtime import processes
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.training.pretrain import PretrainSettings, pretrain
from longrope_jax.training.step import OptimizerSettings

workdir, axes, coordinator, count, index = sys.argv[1:]
if coordinator != "none":
    processes.join(coordinator, int(count), int(index))
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
model = lr.Llama(lr.LlamaConfig(**sizes, original_length=16))
documents = [Document(f"{k}", (np.arange(k, k + 400) % 29).astype(np.uint16), 400) for k in range(8)]
optimizer = OptimizerSettings(learning_rate=1e-2, warmup_steps=4)
settings = PretrainSettings(steps=12, batch=4, checkpoint_every=6, log_every=1, optimizer=optimizer)
layout = Layout.of(MeshSettings(axes))
with layout.active():
    pretrain(model, layout, settings, documents, ByteTokenizer(), epath.Path(workdir), "pretrain")
"""


def start(workdir, axes, coordinator="none", count=1, index=0, devices=1):
    workdir.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(workdir), axes, coordinator, str(count), str(index)],
        env=fast_compilation.environment(devices),
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))  # one writer: no line is there twice
    return np.array([[line["loss"], line["gradient_norm"]] for line in lines])


@pytest.mark.parametrize(
    ("axes", "devices"),
    [
        ("data:2", 1),
        pytest.param("data:2,seq:2", 2, marks=pytest.mark.slow),
        pytest.param("seq:2", 1, marks=pytest.mark.slow),  # both processes hold parts of every sequence
    ],
)
def test_two_processes_have_the_loss_curve_of_one(tmp_path, axes, devices):
    coordinator = free_address()
    running = [start(tmp_path / "one", "data:1")]
    running += [start(tmp_path / "two", axes, coordinator, 2, index, devices) for index in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-3000:]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


SMALL = [
    "--config=experiments/quickstart.py",
    "--config.pretrain.steps=12",
    "--config.search.evolution.iterations=1",
    "--config.search.evolution.population=4",
    "--config.search.documents_at_once=1",
    "--config.evaluate.documents=4",
    "--config.evaluate.lengths=(128,1024)",
]


def run_command(workdir, *processes):
    """The quickstart, small, by one process or by as many as there are lists of flags."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "longrope_jax.main", f"--workdir={workdir}", *SMALL, *flags],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for flags in processes
    ]
    outputs = [process.communicate(timeout=600) for process in running]
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return outputs[0][0], json.loads((workdir / "report.json").read_text())["perplexity"]


@pytest.mark.slow
def test_two_processes_do_a_whole_experiment_and_skip_what_is_done(tmp_path):
    def two():
        flags = ["--config.mesh.axes=data:2", f"--coordinator={free_address()}", "--num_processes=2"]
        return run_command(tmp_path / "two", [*flags, "--process_id=0"], [*flags, "--process_id=1"])

    _, alone = run_command(tmp_path / "one", [])
    _, together = two()
    for length, row in alone.items():
        for method, entry in row.items():
            assert together[length][method]["nll"] == pytest.approx(entry["nll"], rel=1e-3), (length, method)
    output, again = two()
    assert output.count("finished before, skipped") == 5
    one, both = (load_pretrained(tmp_path / name / "export") for name in ("one", "two"))
    assert both.config == one.config
    for a, b in zip(jax.tree.leaves(both.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert again == together


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, None), "need the coordinator's address"),
        (("auto", 2, 0), "need the coordinator's address"),
        (("localhost:1", None, 0), "needs num_processes too"),
        (("localhost:1", 2, 2), "process_id = 2 must lie between 0 and num_processes - 1 = 1"),
        (("localhost", 2, 0), "must be host:port"),
    ],
)
def test_processes_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*arguments)
