"""Fine-tuning: a longer window is learnt from given parameters, with any of the data mixtures, resumed exactly."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from timing_fields import SPEEDS

import longrope_jax as lr
from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import token_nll
from longrope_jax.rope import RopeFactors, unscaled
from longrope_jax.runtime import preemption
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.training import loop
from longrope_jax.training.finetune import FinetuneSettings, finetune
from longrope_jax.training.loop import load_params
from longrope_jax.training.step import OptimizerSettings, init_params, train_step

SIZES = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
MODEL = lr.Llama(lr.LlamaConfig(vocab_size=258, original_length=16, **SIZES))
LENGTH = 64
FACTORS = RopeFactors(np.array([1, 1.5, 3, 4], np.float32), np.int32(2), np.float32(1.1))
SETTINGS = FinetuneSettings(
    steps=24,
    batch=4,
    length=LENGTH,
    factors="search",
    checkpoint_every=8,
    log_every=1,
    evaluate_every=6,
    held_out_documents=3,
    remat="none",
    optimizer=OptimizerSettings(learning_rate=2e-2, warmup_steps=0, schedule="linear"),
)


@pytest.fixture(scope="module")
def documents():
    """Counting modulo 29 from different numbers; seven long documents and four short ones in each split."""

    def make(name, first, count):
        text = np.arange(first, first + count) % 29
        return Document(name, np.concatenate([[256], text, [257]]).astype(np.uint16), count)

    return {split: [make(f"{split}{k}", k, 290 if k < 7 else 20) for k in range(11)] for split in ("train", "search")}


def first_params():
    """Parameters that know nothing: every token has the same probability."""
    params = init_params(MODEL, seed=3)
    return params | {"lm_head": jnp.zeros_like(params["lm_head"])}


def tune(documents, workdir, layout=None, **changes):
    settings = FinetuneSettings(**{**SETTINGS.__dict__, **changes})
    finetune(
        MODEL, layout or Layout(), settings, FACTORS, first_params, documents, ByteTokenizer(), workdir, "finetune"
    )


@pytest.fixture(scope="module")
def whole(documents, tmp_path_factory):
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    tune(documents, workdir)
    return workdir


class Stopped(Exception):
    """Stands for whatever ends a process early."""


def metrics(workdir):
    """Lines without speed."""
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in SPEEDS} for e in entries]


def params_of(workdir):
    return load_params(workdir, "finetune", MODEL, Layout(), SETTINGS.steps)


def assert_same_run(workdir, whole):
    jax.tree.map(np.testing.assert_array_equal, params_of(workdir), params_of(whole))
    assert metrics(workdir) == metrics(whole)


def test_it_starts_from_the_given_parameters_and_learns(whole):
    training = [entry for entry in metrics(whole) if "loss" in entry]
    assert [entry["step"] for entry in training] == list(range(1, 25))
    assert training[0]["loss"] == pytest.approx(np.log(258), rel=1e-6)
    assert training[-1]["loss"] < 3
    assert {f"nll/{k}-{k + 8}" for k in range(0, 64, 8)} <= set(training[0])  # by position up to the new length
    per_byte = (7 * 292 + 4 * 22) / (7 * 290 + 4 * 20)
    assert training[0]["bits_per_byte"] == pytest.approx(training[0]["loss"] / np.log(2) * per_byte)


def test_it_is_evaluated_on_held_out_documents_with_the_same_factors(documents, whole):
    judged = {entry["step"]: entry["held_out_loss"] for entry in metrics(whole) if "held_out_loss" in entry}
    assert list(judged) == [6, 12, 18, 24]
    assert judged[24] < judged[6]
    windows = fixed_windows(documents["search"], LENGTH, 3, 0)
    for factors, is_same in [(FACTORS, True), (unscaled(8), False)]:
        nll = token_nll(MODEL, Layout(), params_of(whole), factors, windows.tokens, LENGTH)
        assert (abs(nll.mean(dtype=np.float64) - judged[24]) < 1e-5) == is_same


def test_a_stopped_run_goes_on_bit_for_bit(documents, whole, tmp_path, monkeypatch):
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 14:
            raise Stopped
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(Stopped):
        tune(documents, tmp_path)
    tune(documents, tmp_path)
    assert len(calls) == 14 + SETTINGS.steps - 8
    assert_same_run(tmp_path, whole)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_for_bit(documents, whole, tmp_path, monkeypatch):
    calls = []

    def asking(*args):
        calls.append(1)
        if len(calls) in (6, 15):  # a step that is evaluated, and one where nothing else happens
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", asking)
    for step in (6, 15):
        with pytest.raises(preemption.Preempted, match=f"finetune: .* step {step} of 24 is saved"):
            tune(documents, tmp_path)
    tune(documents, tmp_path)
    assert len(calls) == SETTINGS.steps
    assert_same_run(tmp_path, whole)


def test_a_run_goes_on_on_other_devices_with_the_same_numbers(documents, whole, tmp_path, monkeypatch):
    layout = Layout.of(MeshSettings("data:2,seq:2"))

    def until_eight(model, accumulate, state, *args):
        if int(state.step) == 8:
            raise Stopped
        return train_step(model, accumulate, state, *args)

    with layout.active(), monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "train_step", until_eight)
        tune(documents, tmp_path, layout)
    tune(documents, tmp_path)
    one, moved = metrics(whole), metrics(tmp_path)
    assert [entry.keys() for entry in moved] == [entry.keys() for entry in one]
    for mine, wanted in zip(moved, one, strict=True):
        for name in wanted.keys() & {"loss", "held_out_loss"}:
            assert mine[name] == pytest.approx(wanted[name], rel=1e-5), (name, wanted["step"])


@pytest.mark.parametrize(
    ("changes", "contexts", "boundaries"),
    [
        (dict(long_share=0.5), {16: 8, 64: 8}, [16, 64]),
        (dict(packed=True), {64: 16}, [64]),
    ],
    ids=["mixed", "packed"],
)
def test_mixtures(documents, tmp_path, monkeypatch, changes, contexts, boundaries):
    seen = []

    def watched(model, accumulate, state, batch, table):
        seen.append((np.asarray(batch.context), np.asarray(batch.segment_ids)))
        there = jax.device_get(table)
        np.testing.assert_array_equal(there.boundaries, boundaries)
        np.testing.assert_array_equal(there.factors.lam[-1], FACTORS.lam)
        np.testing.assert_array_equal(there.factors.lam[:-1], np.ones((len(boundaries) - 1, 4)))
        return train_step(model, accumulate, state, batch, table)

    monkeypatch.setattr(loop, "train_step", watched)
    tune(documents, tmp_path, steps=4, evaluate_every=0, **changes)
    context, segments = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    assert {int(n): int((context == n).sum()) for n in np.unique(context)} == contexts
    assert segments.max() > 1  # several pieces in a sequence
    entry = metrics(tmp_path)[-1]
    assert 1 < entry["loss"] < np.log(258)
    assert "nll/56-64" in entry
