"""Whatever language, encoding and clock a machine has set, the files are the same."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import fast_compilation
import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys, time, warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"longrope_jax(\\\\.|$)")
# A clock that jumps back and forth by a minute; Orbax gives up on a save when it jumps on by ten.
real, jumps = time.time, iter(range(10**9))
time.time = lambda: real() + 60 * (-1) ** next(jumps)

from ml_collections import ConfigDict
from longrope_jax import experiment
from longrope_jax.data.corpus import DataSettings
from longrope_jax.evaluation.evaluate import Method, EvaluationSettings
from longrope_jax.model import LlamaConfig
from longrope_jax.settings import section
from longrope_jax.experiment.stages import ExportSettings, TableSettings
from longrope_jax.training.pretrain import PretrainSettings

folder, workdir = sys.argv[1:]
sizes = dict(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
sections = {
    "model": LlamaConfig(vocab_size=258, original_length=16, **sizes),
    "data": DataSettings(folder, suffix=".txt"),
    "pretrain": PretrainSettings(steps=2, batch=2, checkpoint_every=2, log_every=1),
    "table": TableSettings((16, 32), ("original", "yarn_without_temperature")),
    "evaluate": EvaluationSettings(lengths=(16, 32), documents=3, methods={"original": Method("original")}, controls=()
    ),
    "export": ExportSettings(factors="table"),
}
stages = ("pretrain", "table", "evaluate", "export")
experiment.run(ConfigDict(dict(stages=stages, **{name: section(s) for name, s in sections.items()})), workdir)
"""
SETTINGS = {
    "utf-8": dict(LC_ALL="C.UTF-8", TZ="UTC"),
    "ascii": dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", TZ="Pacific/Kiritimati"),
}
# As far as the machine has them: commas in numbers, and an i that has no dot.
LANGUAGES = {"german": dict(LC_ALL="de_DE.ISO-8859-1", TZ="Europe/Berlin"), "turkish": dict(LC_ALL="tr_TR.ISO-8859-9")}


def start(folder, workdir, settings):
    environment = {
        **fast_compilation.environment(1),
        "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONPATH": str(ROOT),
        **settings,
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(workdir)],
        env={name: value for name, value in environment.items() if name != "PYTHONIOENCODING"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def results(workdir):
    """What must not depend on the machine: who went into which split, the tokens, the losses, the exported model."""
    (index,) = workdir.glob("tokens/*/evaluation.json")
    shards = [
        {key: shard[key] for key in ("names", "tokens", "sha256")} for shard in json.loads(index.read_bytes())["shards"]
    ]
    report = json.loads((workdir / "report.json").read_bytes())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (workdir / "export").iterdir()}
    del files["README.md"]  # has the seconds that stages took
    return shards, report["perplexity"], files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts whose names and contents are no ASCII, two names no UTF-8 either."""
    folder = tmp_path_factory.mktemp("texte")
    names = [*(f"{word} {number}.txt" for word in ("straße", "ılık İÇ", "日本語") for number in range(8))]
    for name in [*map(os.fsencode, names), b"latin \xe4.txt", b"latin \xff.txt"]:
        with open(os.path.join(os.fsencode(folder), name), "w", encoding="utf-8") as file:
            file.write(f"{name!r}: ünï 日本 ıİ. " * 20)
    return folder


def test_the_same_comes_out(folder, tmp_path):
    running = {name: start(folder, tmp_path / name, settings) for name, settings in SETTINGS.items()}
    for process in running.values():
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors.decode(errors="replace")[-3000:]
    assert results(tmp_path / "ascii") == results(tmp_path / "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_same_comes_out_in_other_languages(folder, tmp_path, language):
    for name, settings in {"utf-8": SETTINGS["utf-8"], language: LANGUAGES[language]}.items():
        process = start(folder, tmp_path / name, settings)
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors.decode(errors="replace")[-3000:]
    assert results(tmp_path / language) == results(tmp_path / "utf-8")
