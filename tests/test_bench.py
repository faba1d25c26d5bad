"""The table of all benchmarks, and of two runs of them."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", FOLDER / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ratio(case, value, better="higher"):
    return {"case": case, "ratio": value, "against": "dense / blockwise", "better": better}


def run_of(commit, *ratios, jax="0.10.2"):
    return {"machine": {"commit": commit, "jax": jax, "load": 1.0}, "ratios": list(ratios)}


def rows(text):
    return {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()[2:]
        if line[:1] == "|"
    }


def test_every_benchmark_has_ratios(bench):
    for name in bench.BENCHMARKS:
        names = {node.name for node in ast.parse((FOLDER / f"{name}.py").read_text()).body if hasattr(node, "name")}
        assert {"ratios", "main"} <= names, name
    others = {"bench", "timing"}
    assert {path.stem for path in FOLDER.glob("*.py")} == {*bench.BENCHMARKS, *others}


def test_what_has_changed_is_reported_as_better_or_worse_whichever_way_is_up(bench):
    before = run_of("old", ratio("speed", 2.0), ratio("cost", 3.0, "lower"), ratio("same", 1.0), ratio("gone", 1.0))
    after = run_of("new", ratio("speed", 1.0), ratio("cost", 2.0, "lower"), ratio("same", 1.05), ratio("new one", 7.0))
    found = rows(bench.changes(before, after))
    assert found["speed"] == ["2", "1", "0.50 worse"] and found["cost"] == ["3", "2", "1.50 better"]
    assert found["same"] == ["1", "1.05", "1.05"]
    assert found["gone"] == ["1", "gone", ""] and found["new one"] == ["new", "7", ""]


def test_other_versions_are_reported(bench):
    text = bench.changes(run_of("old", ratio("speed", 1.0)), run_of("new", ratio("speed", 1.0), jax="0.12.0"))
    assert "jax: 0.10.2 before, 0.12.0 after" in text and "load" not in text


def test_a_benchmark_that_is_not_installed_or_fails_is_reported_in_its_place(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "PARITY", tmp_path / "python")
    (missing,) = bench.measure("versus_pytorch")
    assert "not installed: make parity" in bench.summary([missing])
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    (tmp_path / "broken.py").write_text("raise ValueError('no such shape')\n")
    (failed,) = bench.measure("broken")
    assert failed["failed"] == "ValueError: no such shape" and "no such shape" in bench.summary([failed])


def test_another_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"machine": {}}))
    command = [sys.executable, FOLDER / "bench.py", "--compare", tmp_path / "a.json", tmp_path / "b.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'a.json'} is not what `make bench` writes")
    assert len(done.stderr.splitlines()) == 1
