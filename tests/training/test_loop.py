"""Pretraining: it learns, resumes exactly, and stops on a loss that is no number."""

import json

import jax
import numpy as np
import pytest

import longrope_jax as lr
from longrope_jax.data.corpus import Document
from longrope_jax.training import loop
from longrope_jax.training.loop import Diverged, PretrainSettings, load_params, pretrain
from longrope_jax.training.step import OptimizerSettings, init_params, init_state, make_optimizer, train_step

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
MODEL = lr.Llama(lr.LlamaConfig(**SIZES, original_length=16))
SETTINGS = PretrainSettings(
    steps=24, batch=4, checkpoint_every=8, log_every=4, optimizer=OptimizerSettings(learning_rate=1e-2, warmup_steps=4)
)


@pytest.fixture(scope="module")
def documents():
    """Counting modulo 29 from different numbers: the next token is certain once learnt."""
    return [Document(f"{k}", (np.arange(k, k + 400) % 29).astype(np.uint16), 400) for k in range(8)]


class Stopped(Exception):
    """Stands for whatever ends a process early."""


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_speed(entries):
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_learns_and_reports(documents, tmp_path):
    settings = PretrainSettings(**{**SETTINGS.__dict__, "steps": 150})
    seconds = pretrain(MODEL, settings, documents, tmp_path, "pretrain")
    entries = metrics(tmp_path)
    assert seconds > 0
    assert entries[0]["loss"] > 2.5 and entries[-1]["loss"] < 0.7
    assert [entry["step"] for entry in entries[:3]] == [4, 8, 12]
    for entry in entries:
        assert entry["bits_per_byte"] == pytest.approx(entry["loss"] / np.log(2))
        assert entry["tokens_per_second"] > 0 and entry["gradient_norm"] > 0
    assert load_params(tmp_path, "pretrain")["lm_head"].shape == (16, 32)
    assert any((tmp_path / "tensorboard" / "pretrain").iterdir())


@pytest.mark.parametrize("stop_at", [6, 17])
def test_a_stopped_run_goes_on_bit_for_bit(documents, tmp_path, monkeypatch, stop_at):
    pretrain(MODEL, SETTINGS, documents, tmp_path / "whole", "pretrain")
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == stop_at:
            raise Stopped
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(Stopped):
        pretrain(MODEL, SETTINGS, documents, tmp_path / "stopped", "pretrain")
    calls = [None] * stop_at
    pretrain(MODEL, SETTINGS, documents, tmp_path / "stopped", "pretrain")
    assert len(calls) - stop_at == SETTINGS.steps - stop_at // 8 * 8
    assert_same(*(load_params(tmp_path / name, "pretrain") for name in ("stopped", "whole")))
    assert without_speed(metrics(tmp_path / "stopped")) == without_speed(metrics(tmp_path / "whole"))


def test_a_diverging_run_stops_and_names_the_last_good_checkpoint(documents, tmp_path, monkeypatch):
    calls = []

    def poisoned(model, optimizer, state, tokens, factors):
        calls.append(1)
        if len(calls) == 11:
            state = state.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
        return train_step(model, optimizer, state, tokens, factors)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(Diverged, match=r"loss nan.* at step 12; last good checkpoint: .*pretrain/8"):
        pretrain(MODEL, SETTINGS, documents, tmp_path, "pretrain")
    params = load_params(tmp_path, "pretrain")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_parameters_that_blow_up_are_not_saved_as_good(documents, tmp_path):
    wild = OptimizerSettings(learning_rate=1e39, warmup_steps=0)  # the first step is finite, its parameters are not
    settings = PretrainSettings(steps=3, batch=4, checkpoint_every=1, optimizer=wild)
    with pytest.raises(Diverged, match="parameter norm (inf|nan) at step 1; last good checkpoint: none"):
        pretrain(MODEL, settings, documents, tmp_path, "pretrain")


def test_the_step_is_adamw_on_the_mean_loss(documents):
    optimizer = make_optimizer(SETTINGS.optimizer, SETTINGS.steps)
    factors = lr.rope.unscaled(8)
    params = init_params(MODEL, factors, seed=0)
    tokens = np.stack([documents[k].tokens[:17] for k in range(4)]).astype(np.int32)

    def loss_fn(params):
        logits = jax.nn.log_softmax(MODEL.apply({"params": params}, tokens[:, :-1], factors))
        return -np.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    expected = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
    state, result = train_step(MODEL, optimizer, init_state(params, optimizer), tokens, factors)
    assert result["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert int(state.step) == 1
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_weight_decay_spares_norms():
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    params = init_params(MODEL, lr.rope.unscaled(8), seed=0)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert (updates["final_norm"]["scale"] == 0).all()
    np.testing.assert_allclose(updates["lm_head"], -0.05 * params["lm_head"], rtol=1e-5)


def test_one_compilation_for_a_whole_run(documents, tmp_path):
    jax.clear_caches()
    pretrain(MODEL, SETTINGS, documents, tmp_path, "pretrain")
    assert train_step._cache_size() == 1


@pytest.mark.parametrize(
    "bad", [dict(learning_rate=0.0), dict(clip_norm=-1.0), dict(beta1=1.0), dict(weight_decay=-1.0)]
)
def test_optimizer_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerSettings(**bad)
