"""A search with all that it can have, in a whole experiment: from a config to a report, and through a kill."""

import json
import random
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from timing_fields import SPEEDS

from longrope_jax import experiment, rope
from longrope_jax.data.corpus import DataSettings
from longrope_jax.evaluation.evaluate import EvaluationSettings, Method
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime import preemption
from longrope_jax.search import gradient
from longrope_jax.search.objective import TermSettings
from longrope_jax.search.settings import EvolutionSettings, GradientSettings, SearchSettings, SeedSettings
from longrope_jax.settings import section
from longrope_jax.training.pretrain import PretrainSettings

LENGTH, NEAR, TARGET = 64, 128, 320
SIZES = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
EVOLUTION = EvolutionSettings(population=10, mutations=4, crossovers=4, parents=4, iterations=2)
OWN = rope.RopeFactors(np.array([1, 1.5, 2, 2.5], np.float32), np.int32(2), np.float32(1))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A short search first, whose factors are a seed of the hybrid one, as are those of a file."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(30)]
    for k in range(20):
        (folder / f"{k}.txt").write_text(". ".join(rng.choices(words, k=rng.randint(80, 200))))
    own = tmp_path_factory.mktemp("own") / "own.json"
    rope.save_factors(own, OWN, original_length=LENGTH, target_length=NEAR)
    few = EvolutionSettings.paper(population=4, mutations=1, crossovers=1, parents=2, iterations=1)
    sections = dict(
        model=LlamaConfig(vocab_size=258, original_length=LENGTH, **SIZES),
        data=DataSettings(folder=str(folder)),
        pretrain=PretrainSettings(steps=4, batch=4),
        search_near=SearchSettings(
            target_length=NEAR, documents=2, ramps=8, evolution=few, objective={"text": TermSettings.paper()}
        ),
        search=SearchSettings(
            target_length=TARGET,
            documents=3,
            objective={"text": TermSettings.paper(), "needle": TermSettings("needle", share=2.0, documents=2)},
            method="hybrid",
            racing=0.9,
            published=("yarn", "linear"),
            seeds={"file": SeedSettings(str(own)), "stage": SeedSettings("search_near")},
            n_hat=(0, 2),
            evolution=EVOLUTION,
            ramps=4,
            gradient=GradientSettings(rounds=2, starts=1, steps=6, learning_rate=0.05),
            held_out_documents=2,
        ),
        evaluate=EvaluationSettings(
            lengths=(LENGTH, TARGET), documents=2, methods={"longrope": Method("search"), "pi": Method("linear")},
            controls=("pi",),
        ),
    )  # fmt: skip
    stages = ("pretrain", "search_near", "search", "evaluate")
    return ConfigDict(dict(stages=stages, **{name: section(settings) for name, settings in sections.items()}))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished run of it. Copy it before you change anything."""
    workdir = tmp_path_factory.mktemp("finished")
    experiment.run(config, workdir)
    return workdir


def test_a_report_names_the_split_and_population_0_has_all_ramps(finished):
    report = (finished / "report.md").read_text()
    assert "on 2 documents of the evaluation split, which neither training nor search has seen" in report
    near, _ = json.loads((finished / "report.json").read_text())["search"]
    log = [json.loads(line) for line in (finished / "search.jsonl").read_text().splitlines()]
    origins = [entry["operator"] for entry in log if entry["stage"] == "search_near"]
    assert near["population"] == origins.count("seed") + 8 and set(origins[: near["population"]]) == {"seed", "ramp"}


def candidates(workdir):
    lines = [json.loads(line) for line in (workdir / "search.jsonl").read_text().splitlines()]
    assert not any(SPEEDS & line.keys() for line in lines)
    return [line for line in lines if line["stage"] == "search"]


def test_a_hybrid_search_runs_from_a_config_to_its_report(finished):
    entries = candidates(finished)
    operators = [entry["operator"] for entry in entries]
    assert set(operators) == {"seed", "ramp", "gradient", "mutation", "crossover"}
    assert operators[:10] == ["seed"] * 4 + ["ramp"] * 4 + ["gradient"] * 2
    (summary,) = (entry for entry in json.loads((finished / "report.json").read_text())["search"]
                  if entry["stage"] == "search")  # fmt: skip
    assert (summary["method"], summary["evaluations"]) == ("hybrid", len(entries))
    assert set(summary["seeds"]) == {"linear", "yarn", "file", "stage"}
    assert len(summary["documents"]) == 5 and sum("needle at" in name for name in summary["documents"]) == 2
    np.testing.assert_allclose(summary["costs"], np.cumsum([entry["cost"] for entry in entries]))
    dropped = [entry for entry in entries if None in entry["documents"]]
    assert summary["dropped"] == len(dropped) > 0
    # Two rounds of six steps on one of five blocks of documents.
    steps = sum(e["cost"] for e in entries) - sum(sum(d is not None for d in e["documents"]) / 5 for e in entries)
    assert steps == pytest.approx(2 * 6 * 5 / 5)
    best = min(entries, key=lambda entry: entry["nll"])
    assert best not in dropped and summary["best_nll"] == best["nll"] < min(summary["seeds"].values())
    costs, scores, held_out = np.array(summary["held_out"]).T
    assert (np.diff(costs) > 0).all() and (np.diff(scores) < 0).all() and scores[-1] == summary["best_nll"]
    assert (np.isfinite(held_out) & (held_out > 0)).all()
    text = (finished / "report.md").read_text()
    assert "Search for 320 tokens (stage `search`" in text and "convergence_search.png" in text


def test_seeds_of_ones_own_are_carried_to_the_target_length(finished):
    seeds = {entry["seed"]: entry for entry in candidates(finished) if "seed" in entry}
    high = 1.25 * TARGET / LENGTH
    np.testing.assert_allclose(seeds["file"]["lam"], np.clip(1 + (OWN.lam - 1) * (TARGET / LENGTH - 1), 1, high))
    assert seeds["file"]["n_hat"] == 2
    near = rope.load_factors(finished / "factors" / "search_near.json", 8)
    expected = np.clip(1 + (near.lam - 1) * (TARGET / LENGTH - 1), 1, high)
    np.testing.assert_allclose(seeds["stage"]["lam"], expected, rtol=1e-6)
    begun = json.loads((finished / "stages" / "search.started.json").read_text())
    assert begun["stages before search"] == ["pretrain", "search_near"]


class Killed(Exception):
    """Stands for whatever ends a process at once."""


@pytest.fixture
def begun(finished, tmp_path):
    """As before the hybrid search."""
    workdir = Path(shutil.copytree(finished, tmp_path / "begun"))
    shutil.rmtree(workdir / "checkpoints" / "search")
    shutil.rmtree(workdir / "refinements", ignore_errors=True)
    for name in ("stages/search.json", "stages/evaluate.json", "factors/search.json", "scores.jsonl"):
        (workdir / name).unlink(missing_ok=True)
    log = (workdir / "search.jsonl").read_text().splitlines(keepends=True)
    (workdir / "search.jsonl").write_text("".join(line for line in log if '"stage": "search_near"' in line))
    return workdir


@pytest.mark.parametrize("is_asked", [True, False], ids=["asked to stop", "killed"])
@pytest.mark.parametrize("after", [4, 9])
def test_a_search_that_ends_in_a_gradient_refinement_goes_on_as_if_nothing_had_happened(
    config, finished, begun, monkeypatch, after, is_asked
):
    steps, take = [], gradient.step

    def counting(*arguments):
        steps.append(1)
        if not is_asked and len(steps) == after:
            raise Killed
        return take(*arguments)

    monkeypatch.setattr(gradient, "step", counting)
    with monkeypatch.context() as patch, pytest.raises(preemption.Preempted if is_asked else Killed) as caught:
        patch.setattr(preemption, "requested", lambda: is_asked and len(steps) == after)
        experiment.run(config, begun)
    assert not is_asked or f"search: asked to stop, step {(after - 1) % 6 + 1} of gradient refinement" in str(
        caught.value
    )
    experiment.run(config, begun)
    # Who was asked has saved its last step; a kill costs what the last minute made.
    assert len(steps) == (12 if is_asked else 12 + (after - 1) % 6 + 1)
    assert candidates(begun) == candidates(finished)
    assert (begun / "factors" / "search.json").read_text() == (finished / "factors" / "search.json").read_text()


REFUSED = {
    "seed of no file": ("seeds.file.factors", "/nowhere.csv", "config.search: seeds.file: .*'/nowhere.csv' do not exi"),
    "seed of no search": ("seeds.stage.factors", "pretrain", "config.search: seeds.stage.factors = 'pretrain' is nei"),
    "seed of a later stage": ("seeds.stage.factors", "evaluate", "config.search: seeds.stage: .*'evaluate' do not ex"),
    "needle that does not fit": ("objective.needle.length", 50, "config.search: objective.needle: length = "),
    "text that is too short": ("objective.text.length", 9000, "config.search: objective.text: none of"),
    "a taken name": (
        "seeds.yarn_mistral",
        {"factors": "x"},
        "config.search: seeds.yarn_mistral: another seed has that",
    ),
    "no held-out text": ("held_out_documents", -1, "config.search: held_out_documents = -1"),
    "temperatures": ("mscale", (1.2, 0.9), "config.search: mscale = .* must be two positive bounds"),
}


@pytest.mark.parametrize(("path", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_search_cannot_do_is_refused_before_any_work(config, tmp_path, path, value, message):
    changed = ConfigDict(config.to_dict())
    target, (*parents, last) = changed.search, path.split(".")
    for name in parents:
        target = target[name]
    target[last] = value
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        experiment.prepare(changed, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "config.json").exists()


def test_blocks_that_a_race_goes_by_may_not_change_but_those_of_a_search_in_full_may(config, finished):
    changed = ConfigDict(config.to_dict())
    changed.search_near.documents_at_once = config.search_near.documents_at_once + 1
    experiment.prepare(changed, finished)
    changed.search.documents_at_once = config.search.documents_at_once + 1
    with pytest.raises(ValueError, match="documents_at_once"):
        experiment.prepare(changed, finished)
