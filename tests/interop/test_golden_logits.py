"""Logits against those that Transformers computed on PyTorch; tests/parity/make_golden_logits.py made the files."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import longrope_jax as lr
from longrope_jax.interop.pretrained import Pretrained

GOLDEN = Path(__file__).parent.parent / "golden"
ONE_ROTATION = ("llama2", "llama3", "llama_linear", "llama_yarn", "mistral")
WITH_SWITCH = ("llama_longrope", "phi3")
SWITCH = 64
BOUND = 1e-4  # of logits between -3 and 3


@functools.cache
def load(name: str) -> tuple[Pretrained, dict[str, np.ndarray]]:
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return lr.load_pretrained(GOLDEN / name), dict(arrays)


@functools.partial(jax.jit, static_argnums=0)
def compute_logits(config, params, tokens, factors):
    return lr.Llama(config).apply({"params": params}, tokens, factors)[0]


def worst_difference(name, length, factors):
    model, golden = load(name)
    tokens = golden["tokens"][None, :length].astype(np.int32)
    found = compute_logits(model.config, model.params, tokens, factors)
    return np.abs(found[golden[f"positions_{length}"]] - golden[f"logits_{length}"]).max()


@pytest.mark.parametrize("length", [64, 65, 512, 2048])
@pytest.mark.parametrize("name", [*ONE_ROTATION, *WITH_SWITCH])
def test_logits_are_those_of_transformers(name, length):
    assert worst_difference(name, length, load(name)[0].factors.select(length)) < BOUND


@pytest.mark.parametrize("name", [*ONE_ROTATION, *WITH_SWITCH])
def test_factors_that_are_off_by_a_percent_are_far_beyond_the_bound(name):
    factors = load(name)[0].factors.select(SWITCH + 1)
    assert worst_difference(name, SWITCH + 1, factors.replace(lam=1.01 * factors.lam)) > 20 * BOUND
    assert worst_difference(name, SWITCH + 1, factors.replace(mscale=1.01 * factors.mscale)) > 20 * BOUND


@pytest.mark.parametrize("name", WITH_SWITCH)
def test_factors_of_the_other_side_of_the_switch_are_far_beyond_the_bound(name):
    table = load(name)[0].factors
    assert worst_difference(name, SWITCH, table.select(SWITCH + 1)) > 1000 * BOUND
    assert worst_difference(name, SWITCH + 1, table.select(SWITCH)) > 1000 * BOUND
