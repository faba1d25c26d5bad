"""Whole experiments, small: what they leave, how they resume, and what they refuse before any work."""

import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import hurry
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from speeds import SPEEDS

from longrope_jax import experiment, rope
from longrope_jax.evaluation import run as evaluation_run
from longrope_jax.evaluation.run import Arm, EvaluationSettings, published_arms
from longrope_jax.experiment import DataSettings
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.runtime import preemption
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.search.evolution import EvolutionSettings
from longrope_jax.search.objective import Objective
from longrope_jax.search.settings import SearchSettings
from longrope_jax.settings import section
from longrope_jax.stages import TableSettings, evaluate, finetune, pretrain, search
from longrope_jax.training import loop
from longrope_jax.training.finetune import FinetuneSettings
from longrope_jax.training.loop import load_params
from longrope_jax.training.pretrain import PretrainSettings

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


SIZES = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
EVOLUTION = EvolutionSettings(population=8, mutations=3, crossovers=3, parents=4, iterations=3)


def make_config(folder, **sections):
    """A config of these stages."""
    basis = dict(
        model=LlamaConfig(vocab_size=258, original_length=LENGTH, **SIZES),
        data=DataSettings(folder=str(folder)),
        pretrain=PretrainSettings(steps=8, batch=4, checkpoint_every=4, log_every=2),
    )
    made = {name: section(settings) for name, settings in (basis | sections).items()}
    return ConfigDict(dict(stages=("pretrain", *sections), **made))


@pytest.fixture(scope="module")
def config(folder):
    return make_config(
        folder,
        search=SearchSettings(target_length=TARGET, documents=2, evolution=EVOLUTION),
        evaluate=EvaluationSettings(
            lengths=(8, 16, 32, 64), documents=3, arms={**published_arms(), "longrope": Arm("search")}
        ),
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished run of it. Copy it before you change anything."""
    workdir = tmp_path_factory.mktemp("finished")
    experiment.run(config, workdir)
    return workdir


@pytest.fixture(scope="module")
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
            arms={
                "longrope": Arm("table"),
                "yarn": Arm("yarn", "finetune_a"),
                "dynamic_ntk": Arm("dynamic_ntk"),
                "original": Arm("original", "pretrain"),
                "second": Arm("search_8x"),
            },
            controls=("original", "yarn"),
            compared=(("second", "yarn"), ("longrope", "original")),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
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


class Stopped(Exception):
    """Stands for whatever ends a process early."""


def contents(workdir):
    """What must not depend on how often a run was stopped."""
    return {
        "factors": (workdir / "factors" / "search.json").read_text(),
        **{
            name: [{k: v for k, v in record.items() if k not in SPEEDS} for record in read(workdir / f"{name}.jsonl")]
            for name in ("metrics", "search", "evaluation")
        },
    }


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def forbid_work(monkeypatch):
    """From now on no stage may do anything that takes time."""
    for module, name in [
        (pretrain, "pretrain"), (search, "run_search"), (finetune, "finetune"), (evaluate, "run_evaluation"),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a finished stage ran again"))


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
    "unknown stage": ("stages", ("pretrain", "polish"), "polish.*pretrain, search, finetune, table, evaluate"),
    "stage twice": ("stages", ("pretrain", "search", "search"), "twice"),
    "no model first": ("stages", ("search", "evaluate"), "can't come first"),
    "wrong type": ("pretrain.steps", "many", "config.pretrain.steps = 'many' must be int"),
    "lengths past the target": ("evaluate.lengths", (16, 128), "must end at 64, which arms.longrope.factors"),
    "lengths short of the target": ("evaluate.lengths", (16, 32), "must end at 64, which arms.longrope.factors"),
    "no room for factors": ("search.upper_bound", 0.2, "config.search: need 1 <= low < high for lam, not .*0.8"),
    "below the original": ("search.target_length", 8, "target_length = 8 must not be below.*original_length = 16"),
    "unknown model": ("search.model", "finetune", "config.search: model = 'finetune' is no stage .* are pretrain"),
    "batch too large": ("pretrain.batch", 10_000, "config.pretrain: .*fewer than a batch of 10000"),
    "share above 1": ("pretrain.needle_share", 1.5, r"config.pretrain: needle_share = 1.5 must lie in \[0, 1\]"),
    "no room for needles": (
        "pretrain.needle_share",
        0.5,
        "config.pretrain: length = 16 tokens is too short for needles",
    ),
    "small vocabulary": ("model.vocab_size", 100, "vocab_size = 100 is below"),
    "unknown factors": ("evaluate.arms.yarn.factors", "yern", "config.evaluate: arms.yarn.factors = 'yern' is neither"),
    "unknown model of an arm": ("evaluate.arms.yarn.model", "search", "config.evaluate: arms.yarn.model = 'search' is"),
    "control that is no arm": ("evaluate.controls", ("original",), "config.evaluate: controls = .* must be arms"),
    "no arms": ("evaluate.arms", {}, "config.evaluate: arms is empty"),
    "mesh without devices": ("mesh", {"axes": "data:16"}, "config.mesh: axes = 'data:16' needs 16 devices"),
    "batch not for the mesh": ("mesh", {"axes": "data:8"}, "config.pretrain: batch / accumulate = 4 sequences can't"),
    "model not for the mesh": ("mesh", {"axes": "tensor:2"}, "config.mesh: .*num_heads = 1 is not a multiple"),
    "profile of no stage": (
        "profile",
        {"steps": (1, 3), "stage": "serach"},
        "config.profile: stage = 'serach' must be",
    ),
    "profile of one step": ("profile", {"steps": (3,)}, r"config.profile: steps = \(3,\) must be \(first, one after"),
    "odd head": ("model.head_dim", 7, "config.model: head_dim = 7"),
    "missing folder": ("data.folder", "/nonexistent", "'/nonexistent' is not a directory"),
}


@pytest.mark.parametrize(("path", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_configs_are_refused_in_one_line_before_any_work(config, tmp_path, monkeypatch, path, value, message):
    forbid_work(monkeypatch)
    with pytest.raises(ValueError, match=message) as caught:
        experiment.run(change(config, path, value), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.json").exists()  # the mended config may use the directory


def test_lengths_beyond_all_documents_are_refused_before_any_work(config, tmp_path):
    config = change(change(config, "search.target_length", 100_000), "evaluate.lengths", (16, 100_000))
    with pytest.raises(
        ValueError, match="config.search: objective.perplexity: none of .* documents has the 100001 tokens"
    ):
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


@pytest.fixture(scope="module")
def two_texts(config, folder, tmp_path_factory):
    """The same with documents of another folder to search and judge on, and a finished run of it."""
    books, workdir = tmp_path_factory.mktemp("books"), tmp_path_factory.mktemp("two_texts")
    for k in range(5):
        (books / f"book {k}.txt").write_text((folder / f"{k}.txt").read_text().upper())
    config = copy.deepcopy(config)
    with config.unlocked():
        config.data_books = section(DataSettings(folder=str(books), shares=(0.0, 0.4, 0.6)))
        config.search.data = config.evaluate.data = "data_books"
    experiment.run(config, workdir)
    return config, workdir


def test_stages_read_the_text_that_they_name(two_texts):
    _, workdir = two_texts
    content = json.loads((workdir / "report.json").read_text())
    documents = [*content["evaluations"]["evaluate"]["documents"], *content["search"][0]["documents"]]
    assert len(set(documents)) == 5 and all(name.startswith("book ") for name in documents)
    made = {path.name[:-13]: {file.stem for file in path.glob("*.json")} for path in (workdir / "tokens").iterdir()}
    assert made == {"data": {"train", "source"}, "data_books": {"search", "evaluation", "source"}}


def test_a_text_that_changes_is_named_with_its_section(two_texts, folder, monkeypatch):
    config, workdir = two_texts
    forbid_work(monkeypatch)
    with pytest.raises(ValueError) as caught:
        experiment.prepare(change(config, "data_books.suffix", ".txt"), workdir)
    assert str(caught.value).endswith("differing: data_books.suffix ('' there, '.txt' now)")
    with pytest.raises(ValueError) as caught:
        experiment.prepare(change(config, "evaluate.data", "data"), workdir)
    assert "evaluate.data ('data_books' there, 'data' now)" in str(caught.value)
    with pytest.raises(
        ValueError, match=r"^config.data_books is read by no stage: pretrain.data = 'data', search.data"
    ):
        experiment.prepare(change(change(config, "evaluate.data", "data"), "search.data", "data"), workdir)
    with pytest.raises(ValueError, match="^config.data_more is missing, the text that config.evaluate.data names"):
        experiment.prepare(change(config, "evaluate.data", "data_more"), workdir)
    # A stage that reads none of it is not bound by it.
    begun = json.loads((workdir / "stages" / "pretrain.begun.json").read_text())
    assert set(begun) == {"model", "data", "pretrain", "stages before pretrain"}


def test_a_split_without_documents_is_refused_before_any_work(config, folder, tmp_path, monkeypatch):
    forbid_work(monkeypatch)
    with pytest.raises(ValueError, match=r"^config.data: no document is for search, which search would read; shares"):
        experiment.run(change(config, "data.shares", (0.5, 0.0, 0.5)), tmp_path)


def test_work_directories_of_earlier_versions_go_on(progressive_config, copied, monkeypatch):
    """They noted the one text of every stage, with two fields, and that a stage has a section of text nowhere; and how
    devices did the work.
    """
    forbid_work(monkeypatch)
    for path in (copied / "stages").glob("*.begun.json"):
        begun, stage = json.loads(path.read_text()), path.name.split(".")[0]
        begun[stage].pop("data", None)
        begun["data"] = {"folder": progressive_config.data.folder, "suffix": ""}
        begun["model"] |= {"attention": "blockwise", "remat": "nothing_saveable"}
        begun[stage] |= {"accumulate": 2, "tokens_at_once": 4096} if stage in ("pretrain", "evaluate") else {}
        path.write_text(json.dumps(begun))
    shutil.rmtree(copied / "tokens")
    experiment.run(progressive_config, copied)
    with pytest.raises(ValueError, match=r"differing: data.shares \(\[0.7, 0.1, 0.2\] there, \[0.6, 0.2, 0.2\] now\)$"):
        experiment.prepare(change(progressive_config, "data.shares", (0.6, 0.2, 0.2)), copied)


def test_how_devices_do_the_work_binds_no_work_directory(progressive_config, copied, monkeypatch):
    forbid_work(monkeypatch)
    changed = progressive_config
    for path, value in (
        ("model.attention", "dense"), ("model.remat", "dots_saveable"), ("finetune_a.remat", "attention_saveable"),
        ("pretrain.accumulate", 2), ("search_4x.candidates_at_once", 2), ("search_8x.documents_at_once", 2),
        ("evaluate.tokens_at_once", 64),
    ):  # fmt: skip
        changed = change(changed, path, value)
    experiment.run(changed, copied)
    for stage in ("pretrain", "finetune_a"):
        begun = json.loads((copied / "stages" / f"{stage}.begun.json").read_text())
        assert not {"attention", "remat"} & {*begun["model"], *begun[stage]} and begun["model"]["dtype"] == "float32"
    with pytest.raises(ValueError, match=r"differing: model.dtype \('float32' there, 'bfloat16' now\)$"):
        experiment.prepare(change(changed, "model.dtype", "bfloat16"), copied)


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


# --- progressive extension --------------------------------------------------------------------------------------------

PROGRESSIVE_STAGES = ("pretrain", "search_4x", "finetune_a", "search_8x", "search_1x", "table", "evaluate")


def test_a_progressive_run_reports_everything(progressive):
    content = json.loads((progressive / "report.json").read_text())
    assert set(content) == {
        "original_length", "perplexity", "evaluations", "exports", "retrieval", "search", "seconds"
    }  # fmt: skip
    assert set(content["seconds"]) == set(PROGRESSIVE_STAGES)
    (evaluation,) = content["evaluations"].values()
    assert evaluation["perplexity"] == content["perplexity"]
    others = {"yarn", "dynamic_ntk", "original", "second"}
    assert {n: set(row) for n, row in content["perplexity"].items()} == {
        n: {"longrope", *others} for n in ("16", "64", "128")
    }
    assert {n: set(row) for n, row in evaluation["longrope_minus"].items()} == {n: others for n in ("16", "64", "128")}
    controls = evaluation["longrope_minus_disjoint_windows_of_original_length"]
    assert {n: set(row) for n, row in controls.items()} == {n: {"original", "yarn"} for n in ("64", "128")}
    assert [pair["arms"] for pair in evaluation["compared"]] == [["second", "yarn"], ["longrope", "original"]]
    for n, found in evaluation["compared"][1]["by_length"].items():
        assert found == evaluation["longrope_minus"][n]["original"]
    assert evaluation["start_tokens"]["original"] == {"16": 0, "64": 0, "128": 0}
    searches = {entry["stage"]: entry for entry in content["search"]}
    assert [(e["target_length"], e["model"]) for e in searches.values()] == [
        (64, "pretrain"), (128, "finetune_a"), (16, "finetune_a")
    ]  # fmt: skip
    assert {"linear", "ntk", "yarn"} <= set(searches["search_8x"]["seeds"])
    assert {"trained", "trained_clipped", "unscaled"} >= set(searches["search_1x"]["seeds"])
    for entry in searches.values():
        assert entry["curve"][-1] == entry["best_nll"] <= min(entry["seeds"].values())


def test_a_progressive_run_uses_the_right_factors_everywhere(progressive):
    found = {name: rope.load_factors(progressive / "factors" / f"{name}.json", 8) for name in PROGRESSIVE_STAGES[1:5]}
    first, second = (np.asarray(found[f"search_{n}x"].lam, np.float64) for n in (4, 8))
    np.testing.assert_array_equal(found["finetune_a"].lam, found["search_4x"].lam)
    table = rope.load_table(progressive / "factors" / "table.json", 8)
    for length, name in [(1, "search_1x"), (16, "search_1x"), (17, "search_4x"), (65, "search_8x"), (128, "search_8x")]:
        np.testing.assert_array_equal(table.select(length).lam, found[name].lam)
    used = {(r["method"], r["length"]): r["factors"] for r in read(progressive / "evaluation.jsonl")}
    tuned = rope.Trained(64, found["search_4x"])
    for length, name in [(16, "search_1x"), (64, "search_4x"), (128, "search_8x")]:
        assert used["longrope", length]["lam"] == pytest.approx(found[name].lam.tolist())
        assert used["second", length]["lam"] == pytest.approx(second.tolist())
        assert used["original", length]["lam"] == [1.0] * 4
        assert used["yarn", length]["lam"] == pytest.approx(rope.extend("yarn", tuned, 128, 8).lam.tolist())
        assert used["dynamic_ntk", length]["lam"] == pytest.approx(rope.extend("ntk", tuned, length, 8).lam.tolist())
    assert used["dynamic_ntk", 128]["lam"] == pytest.approx((first * 2.0 ** (np.arange(4) / 3)).tolist(), rel=1e-5)


def test_a_progressive_run_has_its_figures(progressive):
    figures = {path.stem for path in (progressive / "figures").iterdir()}
    names = {"perplexity_by_length", "perplexity_by_position", "factors", "factors_by_length", "training"}
    assert figures == names | {f"convergence_search_{n}x" for n in (1, 4, 8)}
    text = (progressive / "report.md").read_text()
    for name in figures:
        assert (progressive / "figures" / f"{name}.png").stat().st_size > 5000
        assert f"(figures/{name}.png)" in text
    assert "| second minus YaRN " in text
    trained = {(entry["stage"], "held_out_loss" in entry) for entry in read(progressive / "metrics.jsonl")}
    assert trained == {("pretrain", False), ("finetune_a", False), ("finetune_a", True)}


def test_a_finished_progressive_run_is_skipped(progressive_config, copied, monkeypatch, capsys):
    forbid_work(monkeypatch)
    before = json.loads((copied / "report.json").read_text())
    experiment.run(progressive_config, copied)
    out = capsys.readouterr().out
    assert [f"{name}: finished before, skipped" in out for name in PROGRESSIVE_STAGES] == [True] * 7
    assert json.loads((copied / "report.json").read_text()) == before


def test_a_stage_can_be_added_later_and_another_mesh_taken(progressive_config, copied, monkeypatch):
    for module, name in [(pretrain, "pretrain"), (search, "run_search"), (finetune, "finetune")]:
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a finished stage ran again"))
    added = change(progressive_config, "stages", (*PROGRESSIVE_STAGES, "evaluate_again"))
    with added.unlocked():
        arms = {"longrope": Arm("table"), "pi": Arm("linear")}
        added.evaluate_again = section(EvaluationSettings(lengths=(64,), documents=2, arms=arms, controls=()))
        added.mesh = section(MeshSettings("seq:2"))
    experiment.run(added, copied)
    content = json.loads((copied / "report.json").read_text())
    assert list(content["evaluations"]) == ["evaluate", "evaluate_again"]
    assert (copied / "figures" / "perplexity_by_length_again.png").exists()


def test_a_model_tuned_at_less_than_its_factors_are_for_reaches_as_far_as_they_do(progressive_config, copied):
    """LongRoPE tunes Mistral on 16k tokens with the factors of 256k; a method's factors are for the length at hand."""
    stages = {
        "finetune_b": "search_4x", "finetune_c": "search_8x_best_seed", "finetune_d": "yarn", "finetune_e": "table"
    }  # fmt: skip
    config = change(progressive_config, "stages", (*PROGRESSIVE_STAGES, *stages))
    with config.unlocked():
        for name, factors in stages.items():
            config[name] = section(
                FinetuneSettings(length=32, factors=factors, model="pretrain", steps=1, batch=2, evaluate_every=0)
            )
    experiment.run(config, copied)
    trained = experiment.reopen(config, copied).trained
    assert [trained[name].length for name in ("pretrain", "finetune_a", *stages)] == [LENGTH, 64, 64, 128, 32, 64]
    searched = rope.load_factors(copied / "factors" / "search_4x.json", 8)
    np.testing.assert_array_equal(trained["finetune_b"].factors.lam, searched.lam)
    again = rope.extend("linear", trained["finetune_b"], 128, 8)
    np.testing.assert_allclose(again.lam, 2 * searched.lam, rtol=1e-5)  # 128 is twice the 64, not four times the 32


def test_a_finished_stage_may_not_change(progressive_config, copied):
    for path, value, message in [
        ("finetune_a.steps", 7, r"finetune_a.steps (6 there, 7 now)"),
        ("search_4x.model", "pretrain", r"search_4x.model ('' there, 'pretrain' now)"),
        ("table.lengths", (16, 32, 128), r"table.lengths ([16, 64, 128] there, [16, 32, 128] now)"),
        ("model.norm_eps", 1e-6, r"model.norm_eps (1e-05 there, 1e-06 now)"),
    ]:
        with pytest.raises(ValueError) as caught:
            experiment.prepare(change(progressive_config, path, value), copied)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"stages before search_8x \(\['finetune_a'\] there, \['pretrain'\] now\)"):
        # Without a word in its own section, the search of "the latest model" would be one of another.
        order = ("pretrain", "search_4x", "search_8x", "finetune_a", *PROGRESSIVE_STAGES[4:])
        experiment.prepare(change(progressive_config, "stages", order), copied)


def test_a_stage_whose_last_checkpoint_is_damaged_is_run_again(progressive_config, progressive, copied):
    victim = max((path for path in (copied / "checkpoints" / "finetune_a" / "6").rglob("*") if path.is_file()),
                 key=lambda path: path.stat().st_size)  # fmt: skip
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    experiment.run(progressive_config, copied)
    model = Llama(LlamaConfig(vocab_size=258, original_length=LENGTH, **SIZES))
    params = [load_params(workdir, "finetune_a", model, Layout(), 6) for workdir in (progressive, copied)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert (copied / "checkpoints" / "finetune_a" / "damaged" / "6").exists()
    entries = [[entry["step"] for entry in read(workdir / "metrics.jsonl")] for workdir in (progressive, copied)]
    assert entries[0] == entries[1]


@pytest.mark.parametrize(
    ("lost", "rerun"),
    [("factors/search_8x.json", "search_8x"), ("factors/table.json", "table"), ("evaluation.jsonl", "evaluate")],
)
def test_a_stage_whose_results_are_gone_is_run_again(progressive_config, copied, capsys, lost, rerun):
    (copied / lost).rename(copied / "away")
    experiment.run(progressive_config, copied)
    out = capsys.readouterr().out
    assert [name for name in PROGRESSIVE_STAGES if f"{name}: finished before, skipped" not in out] == [rerun]
    if lost.startswith("factors"):
        assert (copied / lost).read_text() == (copied / "away").read_text()
    else:
        assert [r["nll_sums"] for r in read(copied / lost)] == [r["nll_sums"] for r in read(copied / "away")]


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


def test_settings_of_a_stage_that_was_left_out_for_a_while_may_not_change_either(progressive_config, copied):
    without = change(progressive_config, "stages", PROGRESSIVE_STAGES[:-1])
    with without.unlocked():
        del without["evaluate"]
    experiment.run(without, copied)
    with pytest.raises(ValueError, match="evaluate.documents"):
        experiment.prepare(change(progressive_config, "evaluate.documents", 2), copied)


REFERENCES = {
    "model": ("finetune_a.model", "finetune_b", "finetune_a: model = 'finetune_b' is no stage before .* are pretrain"),
    "model that comes later": ("search_4x.model", "finetune_a", "search_4x: model = 'finetune_a' is no stage before"),
    "model of a table": ("table.model", "search_4x", "table: model = 'search_4x' is no stage .* pretrain, finetune_a"),
    "factors": (
        "finetune_a.factors",
        "search_8x",
        "finetune_a: factors = .search_8x. is neither a search, table or load",
    ),
    "factors too short": ("finetune_a.length", 128, "finetune_a: length = 128 is beyond 64, up to which search_4x"),
    "table beyond": ("table.factors", ("search_1x", "search_4x", "search_4x"), "table: .*search_4x is good up to 64"),
    "table of unknown": ("table.factors", ("yern", "yarn", "yarn"), "table: factors = 'yern' is neither"),
    "arm beyond its table": ("evaluate.lengths", (16, 256), "evaluate: lengths = .* must end at 128, which arms"),
    "arm target": ("evaluate.arms.second.factors", "search_4x", "evaluate: .* must end at 64, which arms.second.fac"),
    "arm factors": ("evaluate.arms.second.factors", "finetune_a", "evaluate: arms.second.factors = 'finetune_a' is ne"),
    "arm model": ("evaluate.arms.second.model", "table", "evaluate: arms.second.model = 'table' is no stage"),
    "control": ("evaluate.controls", ("unscaled",), "evaluate: controls = .'unscaled',. must be arms"),
    "length below L": ("finetune_a.length", 8, "finetune_a: length = 8 is below the original length, 16"),
}


@pytest.mark.parametrize(("path", "value", "message"), REFERENCES.values(), ids=REFERENCES)
def test_references_between_stages_are_checked(progressive_config, path, value, message):
    with pytest.raises(ValueError, match=f"^config.{message}") as caught:
        experiment.parse_experiment(change(progressive_config, path, value))
    assert "\n" not in str(caught.value)


def test_a_command_that_is_asked_to_stop_exits_with_75_and_goes_on(config, tmp_path):
    for name, value in [("pretrain.steps", 400), ("pretrain.log_every", 1), ("pretrain.checkpoint_every", 400)]:
        config = change(config, name, value)
    with config.unlocked():
        del config["search"], config["evaluate"]
    config = change(config, "stages", ("pretrain",))
    path, workdir = tmp_path / "config.py", tmp_path / "run"
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({config.to_dict()})\n"
    )
    line = [sys.executable, "-m", "longrope_jax.main", f"--config={path}", f"--workdir={workdir}"]
    quickly = hurry.environment(devices=1)
    process = subprocess.Popen(
        line, cwd=ROOT, env=quickly, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    with contextlib.closing(process.stderr):
        while not (workdir / "metrics.jsonl").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        told = process.stderr.read()
    assert process.wait() == 75, told
    assert "Traceback" not in told
    stopped = int(
        re.search(r"\npretrain: asked to stop, step (\d+) of 400 is saved; the same command goes on", told)[1]
    )
    assert [entry["step"] for entry in read(workdir / "metrics.jsonl")] == list(range(1, stopped + 1))
    subprocess.run(line, cwd=ROOT, env=quickly, check=True, capture_output=True)
    assert [entry["step"] for entry in read(workdir / "metrics.jsonl")] == list(range(1, 401))
    assert (workdir / "report.md").exists()


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
