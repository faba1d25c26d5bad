"""What a profile can be read by: the names under which the compiler knows a step's operations."""

import re

import jax
import numpy as np
import pytest
from hlo import compile_only

import longrope_jax as lr
from longrope_jax.data.sequences import Batch
from longrope_jax.rope import FactorTable
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.training.step import OptimizerSettings, init_params, init_state, make_optimizer, train_step

MODEL = lr.Llama(
    lr.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        original_length=16,
    )
)  # fmt: skip
NAMES = {"embed", "rope", "attention", "query", "attend", "mlp", "loss", "optimizer"}


def scopes(axes):
    layout, rows = Layout.of(MeshSettings(axes)), np.zeros((2, 16), np.int32)
    batch = Batch(rows, rows, rows + np.arange(16, dtype=np.int32), None, np.full(2, 16, np.int32))
    table = FactorTable.of({16: lr.rope.unscaled(8)})
    optimizer = make_optimizer(OptimizerSettings(), 10)
    with layout.active():
        state = init_state(init_params(MODEL, 0), optimizer)
        step = lambda state, batch, table: train_step(MODEL, 1, state, batch, table)  # noqa: E731
        text = compile_only(step, state, layout.place(batch), layout.replicate(table)).as_text()
    names = re.findall(r'op_name="([^"]+)"', text)
    return {re.sub(r".*\((\w+)\).*", r"\1", part) for name in names for part in name.split("/")}


@pytest.mark.parametrize("axes, more", [("data:1", set()), ("seq:2", {"ring_step", "ring_send", "ring_merge"})])
def test_the_parts_of_a_step_have_names(axes, more):
    assert not (NAMES | more) - scopes(axes)


def test_the_names_are_those_of_this_package_and_not_of_jax():
    plain = jax.jit(lambda x: x @ x).lower(np.ones((4, 4), np.float32)).compile().as_text()
    assert not any(f"/{name}" in plain for name in NAMES)
