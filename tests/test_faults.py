"""A whole command that is killed at any moment ends as if nothing had happened. Minutes long."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from timing_fields import SPEEDS

from longrope_jax.runtime.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
KILLS = 20
CELL = "longrope_50"
STAGES = (
    "pretrain",
    "search_yarn_8x",
    "search_8x",
    f"finetune_{CELL}",
    f"search_yarn_64x_{CELL}",
    f"search_64x_{CELL}",
    f"search_1x_{CELL}",
    f"table_{CELL}_longrope",
    "finetune_original_50",
    "evaluate",
    "export",
)
SMALL = {
    "stages": STAGES,
    "model.head_dim": 32,
    "pretrain.steps": 150,
    "pretrain.checkpoint_every": 15,
    "search_yarn_8x.target_length": 256,
    "search_8x.evolution.iterations": 8,
    "search_8x.target_length": 256,
    f"search_yarn_64x_{CELL}.target_length": 512,
    f"search_64x_{CELL}.evolution.iterations": 4,
    f"search_64x_{CELL}.target_length": 512,
    f"search_1x_{CELL}.evolution.iterations": 2,
    f"finetune_{CELL}.length": 256,
    f"finetune_{CELL}.steps": 60,
    f"finetune_{CELL}.checkpoint_every": 6,
    f"finetune_{CELL}.long_share": 0.75,
    "finetune_original_50.length": 256,
    "finetune_original_50.steps": 40,
    "finetune_original_50.checkpoint_every": 4,
    "finetune_original_50.packed": True,
    f"table_{CELL}_longrope.lengths": (128, 256, 512),
    "evaluate.lengths": (128, 256, 512),
    "evaluate.documents": 4,
    "evaluate.methods.yarn_tuned.factors": "yarn",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Restarts find their compiled programs again; the numbers are the same."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def command(tmp_path, workdir):
    """The progressive experiment, made small by a config of its own."""
    config = tmp_path / "small.py"
    config.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from experiments import progressive_tiny\n"
        "def get_config():\n"
        "    config = progressive_tiny.get_config()\n"
        f"    config.update_from_flattened_dict({SMALL!r})\n"
        "    sections = {'stages', 'model', 'data', 'data_pretrain', 'mesh', 'profile'}\n"
        "    for name in set(config) - set(config.stages) - sections:\n"
        "        del config[name]\n"
        "    return config\n"
    )
    return [sys.executable, "-m", "longrope_jax.main", f"--config={config}", f"--workdir={workdir}"]


def kinds_at_work(workdir):
    """The kind of the stage that has begun and not finished."""
    for name in STAGES:
        if not (workdir / "stages" / f"{name}.json").exists():
            return name.split("_")[0]
    return "report"


def progress(workdir):
    """What is new in the work directory once a run has got further: finished stages, checkpoints, evaluations."""
    evaluated = workdir / "evaluation.jsonl"
    return (
        {path.name for path in workdir.glob("stages/*.json") if not path.name.endswith(".started.json")},
        {str(path) for path in workdir.glob("checkpoints/*/*") if path.name.isdigit()},
        evaluated.stat().st_size if evaluated.exists() else 0,
    )


def results(workdir):
    """All that a run is about: metrics without speed, candidates, evaluations, factors, parameters and the export."""
    content = {}
    for name in ("metrics", "search", "evaluation"):
        lines = [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]
        content[name] = [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]
    for path in sorted((workdir / "factors").iterdir()):
        content[path.name] = json.loads(path.read_text())
    content["export"] = {path.name: path.read_bytes() for path in (workdir / "export").iterdir()}
    del content["export"]["README.md"]  # has the seconds that stages took
    for name in STAGES:
        if name.startswith(("pretrain", "finetune")):
            with Checkpoints(workdir / "checkpoints" / name) as checkpoints:
                items, _ = checkpoints.restore(checkpoints.latest())
            content[name] = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(items)]
    return content


def test_kill_9_at_random_moments_changes_nothing(tmp_path, environment):
    quiet = dict(cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(command(tmp_path, tmp_path / "whole"), check=True, **quiet)
    workdir, rng, killed = tmp_path / "killed", random.Random(0), []
    workdir.mkdir()
    while len(killed) < KILLS:
        before = progress(workdir)
        process = subprocess.Popen(command(tmp_path, workdir), **quiet)
        # Past its start and its first new result any moment is as good as another.
        while process.poll() is None and progress(workdir) == before:
            time.sleep(0.02)
        deadline = time.monotonic() + rng.expovariate(1 / 0.7)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        killed.append(kinds_at_work(workdir))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path, workdir), check=True, **quiet)
    print(f"killed {len(killed)} times: {killed}")
    assert len(killed) == KILLS
    assert {"pretrain", "search", "finetune"} <= set(killed)
    whole, resumed = results(tmp_path / "whole"), results(workdir)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert whole[name] == resumed[name], name
