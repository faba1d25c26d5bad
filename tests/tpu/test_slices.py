"""Compiled for real TPUs, without any: the kernels for every chip, and the programs of a seven-billion model.

`make tpu`; needs libtpu (requirements-tpu.txt) and no TPU.
"""

import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from longrope_jax.model.ring import ring_attention
from longrope_jax.model.sharding import partition_spec
from longrope_jax.runtime.ahead_of_time import describe_slice
from longrope_jax.runtime.collectives import RING, traffic
from longrope_jax.runtime.estimate import GIB, TPUS
from longrope_jax.runtime.mesh import MeshSettings

pytestmark = pytest.mark.tpu

ROOT = Path(__file__).parent.parent.parent
SMALL = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
NUMERICS = {"64": (64, "bfloat16"), "96": (96, "bfloat16"), "128": (128, "bfloat16"), "128 float32": (128, "float32")}


def test_all_chips_are_here():
    assert set(SMALL) == set(TPUS)


@pytest.mark.parametrize(("dim", "dtype"), NUMERICS.values(), ids=NUMERICS)
@pytest.mark.parametrize("name", SMALL)
def test_kernels_compile_alone_and_in_the_ring_forward_and_backward(name, dim, dtype):
    """Eight heads on two of keys, 16,384 tokens a device."""
    for axes, is_ring in (("data:-1", False), ("seq:-1", True)):
        layout, _ = describe_slice(SMALL[name], MeshSettings(axes))
        devices = layout.mesh.size
        batch, length = (1, 16384 * devices) if is_ring else (devices, 16384)

        def array(heads, layout=layout, shape=(batch, length)):
            where = NamedSharding(layout.mesh, partition_spec("batch", "length", None, None))
            return jax.ShapeDtypeStruct((*shape, heads, dim), dtype, sharding=where)

        def gradients(query, key, value, positions):
            attend = partial(ring_attention, positions=positions, segment_ids=None, backend="auto")
            loss = lambda *qkv: attend(*qkv).astype(jnp.float32).sum()  # noqa: E731
            return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)

        with layout.active():
            arguments = array(8), array(2), array(2), layout.abstract_rows(batch, length)
            text = jax.jit(gradients).lower(*arguments).compile().as_text()
        assert text.count('custom_call_target="tpu_custom_call"') >= (6 if is_ring else 3)
        assert (RING in traffic(text)) == is_ring


# --- LLaMA2-7B --------------------------------------------------------------------------------------------------------

LLAMA2, SLICE = "experiments/llama2_7b_2048k.py", "v5p:4x4x4"
TOKENS = 2048 * 1024


@cache
def measured(*arguments):
    """In a process of its own, as memory is what it took at most."""
    line = [sys.executable, "-m", "tests.tpu.one_program", LLAMA2, *arguments]
    # Without the flags by which tests speed up this machine's compiler.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": ""}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(arguments, found)
    return found


tuning = partial(measured, "finetune_256k", "step", SLICE)


def test_tuning_at_256k_fits_and_compiles_on_a_small_machine():
    found = tuning()
    assert found["fits"] and found["peak"] < 0.9 * found["hbm"]
    assert found["host_bytes"] < 6 * GIB


def test_what_is_compiled_does_not_grow_with_layers_or_tokens():
    """So neither does the time it takes. The compiler may place a copy here or there."""
    whole = tuning()
    for change in ("num_layers=4", "length=131072"):
        other = tuning(change)
        assert other["operations_lowered"] == whole["operations_lowered"]
        assert other["operations"] == pytest.approx(whole["operations"], rel=0.1)


def test_two_million_tokens_are_evaluated_with_room_to_spare_and_nobody_holds_them_all():
    """Keys or values of all tokens would be 2M times 32 heads of 128, a device's share is less than a quarter of that;
    all tokens are together only where each is a number.
    """
    found = measured("evaluate_books", f"windows of {TOKENS}", SLICE)
    assert found["fits"] and found["peak"] < 0.6 * found["hbm"]
    assert found["largest_array"] < TOKENS * 32 * 128 // 4
    assert 0 < found["largest_of_all_tokens"] <= TOKENS
    assert found["host_bytes"] < 6 * GIB
