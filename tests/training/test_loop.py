"""Pretraining: it learns, resumes exactly, on other devices too, and stops on a loss that is no number."""

import contextlib
import json
import os
import signal
from functools import partial

import jax
import numpy as np
import pytest
from timing_fields import SPEEDS

import longrope_jax as lr
from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.model.flops import TRAINING, count_flops
from longrope_jax.runtime import preemption
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.training import loop, progress
from longrope_jax.training import pretrain as pretrain_module
from longrope_jax.training.loop import load_params
from longrope_jax.training.pretrain import PretrainSettings, pretrain
from longrope_jax.training.progress import Diverged
from longrope_jax.training.step import OptimizerSettings, train_step

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
MODEL = lr.Llama(lr.LlamaConfig(**SIZES, original_length=16))
TOKENIZER = ByteTokenizer()  # no prompt is made
SETTINGS = PretrainSettings(
    steps=24, batch=8, checkpoint_every=8, log_every=4, optimizer=OptimizerSettings(learning_rate=1e-2, warmup_steps=4)
)


@pytest.fixture(scope="module")
def documents():
    """Counting modulo 29 from different numbers: the next token is certain once learnt."""
    return [Document(f"{k}", (np.arange(k, k + 400) % 29).astype(np.uint16), 400) for k in range(8)]


@pytest.fixture(scope="module")
def whole(documents, tmp_path_factory):
    """A run that nothing happened to, and that had its step compiled once."""
    workdir, compiled = tmp_path_factory.mktemp("whole"), train_step._cache_size()
    pretrain(MODEL, Layout(), SETTINGS, documents, TOKENIZER, workdir, "pretrain")
    assert train_step._cache_size() == compiled + 1
    return workdir


class Stopped(Exception):
    """Stands for whatever ends a process early."""


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_speed(entries):
    return [{key: value for key, value in entry.items() if key not in SPEEDS} for entry in entries]


def params_of(workdir, steps=SETTINGS.steps):
    return load_params(workdir, "pretrain", MODEL, Layout(), steps)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_learns_and_reports(documents, tmp_path):
    settings = PretrainSettings(**{**SETTINGS.__dict__, "steps": 150})
    seconds = pretrain(MODEL, Layout(), settings, documents, TOKENIZER, tmp_path, "pretrain")
    entries = metrics(tmp_path)
    assert seconds > 0
    assert entries[0]["loss"] > 2.5 and entries[-1]["loss"] < 0.7
    assert [entry["step"] for entry in entries[:3]] == [4, 8, 12]
    for entry in entries:
        assert entry["bits_per_byte"] == pytest.approx(entry["loss"] / np.log(2))
        assert entry["tokens_per_second"] > 0 and entry["gradient_norm"] > 0 and entry["parameter_norm"] > 0
        assert entry["step_seconds"] * entry["tokens_per_second"] == pytest.approx(8 * 16)
        assert entry["tokens_per_second_per_device"] == entry["tokens_per_second"]
        assert "mfu" not in entry  # nobody states what a CPU could do at best
        by_position = {key: value for key, value in entry.items() if key.startswith("nll/")}
        assert list(by_position) == [f"nll/{k}-{k + 2}" for k in range(0, 16, 2)]
        assert np.mean(list(by_position.values())) == pytest.approx(entry["loss"], rel=1e-6)
    rates = {entry["step"]: entry["learning_rate"] for entry in entries}
    assert rates[4] == pytest.approx(1e-2 * 3 / 4)  # step 4 is the last of the warmup
    assert rates[8] > rates[80] > rates[150] > 1e-3
    assert params_of(tmp_path, 150)["lm_head"].shape == (16, 32)
    assert any((tmp_path / "tensorboard" / "pretrain").iterdir())


@pytest.mark.parametrize("stop_at", [6, 17])
def test_a_stopped_run_goes_on_bit_for_bit(documents, whole, tmp_path, monkeypatch, stop_at):
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == stop_at:
            raise Stopped
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(Stopped):
        pretrain(MODEL, Layout(), SETTINGS, documents, TOKENIZER, tmp_path, "pretrain")
    calls = [None] * stop_at
    pretrain(MODEL, Layout(), SETTINGS, documents, TOKENIZER, tmp_path, "pretrain")
    assert len(calls) - stop_at == SETTINGS.steps - stop_at // 8 * 8
    assert_same(params_of(tmp_path), params_of(whole))
    assert without_speed(metrics(tmp_path)) == without_speed(metrics(whole))


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_for_bit(documents, whole, tmp_path, monkeypatch):
    calls = []

    def asking(*args):
        calls.append(1)
        if len(calls) in (7, 15):  # neither a step that is saved anyway nor one that is logged
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", asking)
    for step in (7, 15):
        with pytest.raises(preemption.Preempted, match=f"pretrain: .* step {step} of 24 is saved"):
            pretrain(MODEL, Layout(), SETTINGS, documents, TOKENIZER, tmp_path, "pretrain")
    pretrain(MODEL, Layout(), SETTINGS, documents, TOKENIZER, tmp_path, "pretrain")
    assert len(calls) == SETTINGS.steps
    assert_same(params_of(tmp_path), params_of(whole))
    assert without_speed(metrics(tmp_path)) == without_speed(metrics(whole))


def test_a_diverging_run_stops_and_names_the_last_good_checkpoint(documents, tmp_path, monkeypatch):
    calls = []

    def poisoned(model, accumulate, state, batch, table):
        calls.append(1)
        if len(calls) == 11:
            with jax.transfer_guard("allow"):
                state = state.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
        return train_step(model, accumulate, state, batch, table)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(Diverged, match=r"loss nan.* at step 12; last good checkpoint: .*pretrain/8"):
        pretrain(MODEL, Layout(), SETTINGS, documents, TOKENIZER, tmp_path, "pretrain")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params_of(tmp_path, 8)))
    with pytest.raises(LookupError, match="the newest sound checkpoint is step 8, not 24"):
        params_of(tmp_path)


def test_parameters_that_blow_up_are_not_saved_as_good(documents, tmp_path):
    wild = OptimizerSettings(learning_rate=1e39, warmup_steps=0)  # the first step is finite, its parameters are not
    settings = PretrainSettings(steps=3, batch=8, checkpoint_every=1, optimizer=wild)
    with pytest.raises(Diverged, match="parameter norm (inf|nan) at step 1; last good checkpoint: none"):
        pretrain(MODEL, Layout(), settings, documents, TOKENIZER, tmp_path, "pretrain")


def test_a_run_goes_on_on_other_devices_with_the_same_numbers(documents, whole, tmp_path):
    for axes, until in [("data:8", 8), ("seq:4", 16), ("data:1", 24)]:
        layout = Layout.of(MeshSettings(axes))
        with layout.active(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "train_step", stopping_after(until))
            with contextlib.nullcontext() if until == SETTINGS.steps else pytest.raises(Stopped):
                pretrain(MODEL, layout, SETTINGS, documents, TOKENIZER, tmp_path, "pretrain")
    one, moved = metrics(whole), metrics(tmp_path)
    assert [entry["step"] for entry in moved] == list(range(4, 25, 4))
    for name in ("loss", "gradient_norm", "parameter_norm", "nll/0-2", "nll/14-16"):
        np.testing.assert_allclose([e[name] for e in moved], [e[name] for e in one], rtol=1e-5, err_msg=name)
    assert one[-1]["loss"] < one[0]["loss"] - 0.1
    for layout, devices in [(Layout(), 1), (Layout.of(MeshSettings("fsdp:2,tensor:2")), 4)]:
        head = load_params(tmp_path, "pretrain", MODEL, layout, 24)["lm_head"]
        assert len(head.sharding.device_set) == devices
        np.testing.assert_allclose(head, params_of(whole)["lm_head"], atol=1e-5)


def stopping_after(step):
    """`train_step`, until that step is done."""

    def stepping(model, accumulate, state, *args):
        if int(state.step) == step:
            raise Stopped
        return train_step(model, accumulate, state, *args)

    return stepping


class Watched:
    """A source of batches that tells when it is asked, and what is where in the loop around it."""

    def __init__(self, batches, events):
        self._batches, self._events, self._count = batches, events, 0

    def __next__(self):
        self._count += 1
        self._events.append(f"batch {self._count}")
        return next(self._batches)

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state):
        self._batches.set_state(state)


@pytest.fixture
def events(monkeypatch):
    """What happens in the loop, in order."""
    happened = []

    def stepping(*args):
        happened.append(f"step {sum(event.startswith('step') for event in happened) + 1}")
        return train_step(*args)

    def writing(self, step, **scalars):
        happened.append(f"told {step}")

    def saving(self, step, items, record):
        happened.append(f"saved {step}, next batch {record['batches']['next_index'] + 1}")

    real = pretrain_module.pretraining_batches
    monkeypatch.setattr(pretrain_module, "pretraining_batches", lambda *args: Watched(real(*args), happened))
    monkeypatch.setattr(loop, "train_step", stepping)
    monkeypatch.setattr(loop.Metrics, "write", writing)
    monkeypatch.setattr(loop.Checkpoints, "save", saving)
    return happened


def test_the_next_batch_is_loaded_and_the_last_numbers_are_read_while_a_step_runs(documents, tmp_path, events):
    settings = PretrainSettings(steps=5, batch=8, checkpoint_every=4, log_every=2)
    pretrain(MODEL, Layout(), settings, documents, TOKENIZER, tmp_path, "pretrain")
    assert events == [
        "batch 1",
        "step 1",
        "batch 2",
        "step 2",
        "batch 3",
        "step 3",
        "batch 4",
        "told 2",
        "step 4",
        "batch 5",
        "told 4",
        "saved 4, next batch 5",  # though the fifth is loaded already
        "step 5",
        "told 5",
        "saved 5, next batch 6",
    ]


@pytest.mark.parametrize("axes", ["data:1", "data:2,seq:2"])
def test_a_step_takes_nothing_from_the_host(documents, tmp_path, monkeypatch, axes):
    layout = Layout.of(MeshSettings(axes))

    def careless(model, accumulate, state, batch, table):
        return train_step(model, accumulate, state, jax.tree.map(np.asarray, batch), table)

    monkeypatch.setattr(loop, "train_step", careless)
    with layout.active(), pytest.raises(Exception, match="Disallowed (host-to-device|device-to-host) transfer"):
        pretrain(MODEL, layout, SETTINGS, documents, TOKENIZER, tmp_path, "pretrain")


def test_a_known_chip_tells_how_full_it_is(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "throughput", partial(as_if_on, "TPU v5 lite", progress.throughput))
    monkeypatch.setattr(progress, "memory", lambda statistics: {"hbm_peak_bytes": len(list(statistics))})
    pretrain(MODEL, Layout(), SETTINGS, documents, TOKENIZER, tmp_path, "pretrain")
    flops = count_flops(MODEL.config, SETTINGS.batch, 16, TRAINING)
    for entry in metrics(tmp_path):
        per_second = 197e12 * entry["step_seconds"]
        assert entry["mfu"] == pytest.approx(flops.matrices / per_second)
        assert entry["mfu_with_attention"] == pytest.approx(flops.total / per_second)
        assert entry["hbm_peak_bytes"] == jax.local_device_count()


def as_if_on(kind, throughput, flops, tokens, seconds, devices, _):
    return throughput(flops, tokens, seconds, devices, kind)
