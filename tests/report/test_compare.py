"""Comparison of work directories: its tables, when it has differences, and which directories it refuses."""

import json
import os

import command_line
import numpy as np
import pytest

from longrope_jax.evaluation.perplexity import DocumentNll, compare, perplexity
from longrope_jax.report.compare import write_comparison
from longrope_jax.report.runs import read_runs

DOCUMENTS = ["a.txt", "b.txt", "c.txt", "d.txt"]
TOKENS = 64


def write_run(workdir, seed, *, lengths=(16, 64), methods=("yarn", "longrope"), text="1f", names=DOCUMENTS, **config):
    """A finished work directory, with NLL drawn by this seed; returns NLL sums by (length, method)."""
    rng = np.random.default_rng(seed)
    sums = {(n, method): rng.uniform(60, 120, len(names)) for n in lengths for method in methods}
    counts = np.full(len(names), TOKENS)
    (workdir / "tokens" / "data-0123").mkdir(parents=True)
    (workdir / "tokens" / "data-0123" / "evaluation.json").write_text(json.dumps({"shards": [{"sha256": text}]}))
    records = [
        dict(stage="evaluate", length=n, method=method, documents=names, nll_sums=list(values), counts=counts.tolist())
        for (n, method), values in sums.items()
    ]
    (workdir / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    by_length = {
        str(n): {method: perplexity(DocumentNll(sums[n, method], counts))._asdict() for method in methods}
        for n in lengths
    }
    best, held_out = np.log(5.0), np.log(6.0)
    search = dict(stage="search", target_length=64, method="hybrid", evaluations=3, seconds=12.0, best_nll=best)
    search |= dict(costs=[1.0, 2.0, 2.5], curve=[None, 2.0, best], held_out=[[1.0, 2.0, 2.0], [2.5, best, held_out]])
    share = dict(hits=9, tries=10, accuracy=0.9, ci95=[0.6, 0.98])
    report = dict(
        original_length=16,
        evaluations={"evaluate": {"perplexity": by_length}},
        retrieval={"retrieval": dict(task="passkey", seed=3, accuracy={"yarn": {"64": share}})},
        search=[search],
        seconds={"pretrain": 1.25, "search": 12.0},
    )
    (workdir / "report.json").write_text(json.dumps(report))
    stages = ["pretrain", "search", "evaluate", "retrieval"]
    made = {"stages": stages, "model": {"head_dim": 8}, "pretrain": {"seed": seed}, "evaluate": {"seed": 0}} | config
    (workdir / "config.json").write_text(json.dumps(made))
    return sums


def cells(text, *starting):
    """The table rows whose first cells are these."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row[len(starting) :] for row in rows if row[: len(starting)] == list(starting)]


def test_two_runs_are_compared(tmp_path):
    first, second = write_run(tmp_path / "one", 1), write_run(tmp_path / "two", 2)
    path = write_comparison([tmp_path / "one", f"{tmp_path / 'two'}/"], tmp_path / "out")
    text = path.read_text()
    counts = np.full(len(DOCUMENTS), TOKENS)
    ((at_16, at_64),) = cells(text, "LongRoPE (searched)", "two")
    assert float(at_64) == pytest.approx(np.exp(second[64, "longrope"].sum() / counts.sum()), abs=5e-4)
    assert "16 (1L)" in text and "64 (4L)" in text
    ((_, difference),) = cells(text, "YaRN", "two minus one")
    wanted = compare(DocumentNll(second[64, "yarn"], counts), DocumentNll(first[64, "yarn"], counts))
    assert difference == f"{wanted.difference:+.4f} [{wanted.ci95[0]:+.4f}, {wanted.ci95[1]:+.4f}]"
    assert cells(text, "search", "two") == [["64", "hybrid", "3", "2", "12", "5.000", "6.000"]]
    assert cells(text, "YaRN", "one", "9 of 10 [60, 98] %") == [[]]
    assert cells(text, "`pretrain.seed`") == [["`1`", "`2`"]] and "head_dim" not in text
    assert cells(text, "pretrain") == [["1.2", "1.2"]]
    drawn = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    assert drawn == {"compare_evaluate.png", "compare_evaluate_longest.png", "compare_searches.png"}
    assert all(f"(figures/{name})" in text for name in drawn)
    assert (tmp_path / "out" / "compare.html").read_text().count("data:image/png") == 3


DIFFERENT_TOKENS = {
    "text": (dict(text="2e"), "their evaluation text differs"),
    "windows": (dict(names=DOCUMENTS[::-1]), "they scored different windows of the same text"),
    "length": (dict(lengths=(16, 32)), "they scored different windows of the same text"),
    "section": (dict(evaluate={"data": "data_gone"}), "the tokens that they scored are unknown"),
}


@pytest.mark.parametrize(("change", "reason"), DIFFERENT_TOKENS.values(), ids=DIFFERENT_TOKENS)
def test_no_difference_is_reported_between_other_tokens(tmp_path, change, reason):
    write_run(tmp_path / "one", 1)
    write_run(tmp_path / "two", 2, **change)
    text = write_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "out").read_text()
    assert f"No differences between two and one: {reason}.\n" in text
    assert "two minus one" not in text and cells(text, "YaRN", "two")


def test_methods_lengths_and_sections_that_only_some_have_are_marked(tmp_path):
    write_run(tmp_path / "one", 1)
    write_run(tmp_path / "two", 2, lengths=(64,), methods=("yarn", "linear"), finetune={"steps": 3})
    text = write_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "out").read_text()
    ((at_16, at_64),) = cells(text, "PI (linear)", "two")
    assert at_16 == "–" and float(at_64) > 1
    assert not cells(text, "PI (linear)", "one") and not cells(text, "PI (linear)", "two minus one")
    assert cells(text, "`finetune`") == [["–", '`"present"`']]


def test_a_perplexity_that_is_not_finite_is_reported_and_left_out_of_the_pictures(tmp_path):
    write_run(tmp_path / "one", 1)
    write_run(tmp_path / "two", 2)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    for row in report["evaluations"]["evaluate"]["perplexity"].values():
        row["yarn"] = {"ppl": None, "nll": None, "ci95": [None, None]}
    (tmp_path / "two" / "report.json").write_text(json.dumps(report))
    text = write_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "out").read_text()
    assert cells(text, "YaRN", "two")[0] == ["not finite", "not finite"]


def test_runs_are_named_by_what_their_paths_do_not_share(tmp_path):
    for name in ("a/x", "b/x"):
        write_run(tmp_path / "runs" / name, 1)
    runs = read_runs([tmp_path / "runs" / "a" / "x", tmp_path / "runs" / "b" / "x"])
    assert [run.name for run in runs] == ["a/x", "b/x"]


def without(name):
    return lambda workdir: (workdir / name).unlink()


def with_other(name, content):
    return lambda workdir: (workdir / name).write_text(content)


PART = '{"original_length": 16}'
BROKEN = {
    "not there": (lambda workdir: os.rename(workdir, f"{workdir}_elsewhere"), "two is not there"),
    "no report": (without("report.json"), "has no report.json: its experiment has not"),
    "half a report": (with_other("report.json", '{"a'), "report.json: Unterminated .*the command of its experiment"),
    "another file": (with_other("report.json", "[]"), r"report.json: must hold a JSON object, not \[\]"),
    "a part of a report": (with_other("report.json", PART), "report.json: 'evaluations' is missing; the command"),
    "no config": (without("config.json"), "has no config.json"),
    "no records": (without("evaluation.jsonl"), "has no records of evaluate"),
    "other records": (with_other("evaluation.jsonl", '{"stage": "evaluate"}\n'), "line 1: 'length' is missing"),
    "another index": (with_other("tokens/data-0123/evaluation.json", "{}"), "evaluation.json: 'shards' is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_directory_without_a_finished_run_is_refused(tmp_path, name):
    damage, message = BROKEN[name]
    write_run(tmp_path / "one", 1)
    write_run(tmp_path / "two", 2)
    damage(tmp_path / "two")
    with pytest.raises(OSError if name == "other records" else ValueError, match=message):
        write_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "message"), [(["one"], "at least two work directories, not 1"), (["one", "one/"], "one is named twice")]
)
def test_what_is_no_comparison_is_refused(tmp_path, names, message):
    write_run(tmp_path / "one", 1)
    with pytest.raises(ValueError, match=message):
        write_comparison([f"{tmp_path}/{name}" for name in names], tmp_path / "out")


def test_the_command_compares_and_refuses_in_one_line(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name, 1)
    line = ["--mode=compare", f"--workdir={tmp_path / 'out'}"]
    done = command_line.run(*line, tmp_path / "one", tmp_path / "two")
    assert done.stdout.strip() == f"report: {tmp_path / 'out' / 'compare.md'}"
    done = command_line.run(*line, tmp_path / "one", tmp_path / "gone")
    assert done.returncode == 2 and done.stderr == f"error: work directory {tmp_path / 'gone'} is not there\n"
