"""The paper's recipe, small: what it leaves, and which factors are used where."""

import json

import jax
import numpy as np
import pytest
from tiny_experiment import LENGTH, PROGRESSIVE_STAGES, SIZES, change, forbid_work, read

from longrope_jax import experiment, rope
from longrope_jax.evaluation.evaluate import EvaluationSettings, Method
from longrope_jax.experiment.stages import search, training
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.settings import section
from longrope_jax.training.finetune import FinetuneSettings
from longrope_jax.training.loop import load_params


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
        begun = json.loads((copied / "stages" / f"{stage}.started.json").read_text())
        assert not {"attention", "remat"} & {*begun["model"], *begun[stage]} and begun["model"]["dtype"] == "float32"
    with pytest.raises(ValueError, match=r"differing: model.dtype \('float32' there, 'bfloat16' now\)$"):
        experiment.prepare(change(changed, "model.dtype", "bfloat16"), copied)


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
    assert [pair["methods"] for pair in evaluation["compared"]] == [["second", "yarn"], ["longrope", "original"]]
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
    for module, name in [(training, "pretrain"), (search, "run_search"), (training, "finetune")]:
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a finished stage ran again"))
    added = change(progressive_config, "stages", (*PROGRESSIVE_STAGES, "evaluate_again"))
    with added.unlocked():
        methods = {"longrope": Method("table"), "pi": Method("linear")}
        added.evaluate_again = section(
            EvaluationSettings(lengths=(64,), documents=2, methods=methods, controls=(), margin=0.0)
        )
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


def test_settings_of_a_stage_that_was_left_out_for_a_while_may_not_change_either(progressive_config, copied):
    without = change(progressive_config, "stages", PROGRESSIVE_STAGES[:-1])
    with without.unlocked():
        del without["evaluate"]
    experiment.run(without, copied)
    with pytest.raises(ValueError, match="evaluate.documents"):
        experiment.prepare(change(progressive_config, "evaluate.documents", 2), copied)
