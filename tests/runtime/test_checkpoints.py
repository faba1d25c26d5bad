"""What is saved comes back, and the newest are kept."""

import json
import os
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from saved_steps import names, save

from longrope_jax.runtime import checkpoints
from longrope_jax.runtime.checkpoints import Checkpoints


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    moments: tuple


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return State(
        step=jnp.int32(seed),
        params={"kernel": jax.random.normal(keys[0], (3, 4)), "half": jnp.arange(5, dtype=jnp.bfloat16) + seed},
        moments=(jax.random.normal(keys[1], (2,)), jnp.arange(6, dtype=jnp.uint16).reshape(2, 3)),
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


# What is saved comes back.


def test_nothing_saved_is_no_step(tmp_path):
    with Checkpoints(tmp_path / "stage") as checkpoints:
        assert checkpoints.latest() is None


def test_all_items_and_the_record_come_back(tmp_path):
    arrays = {
        "params": {"a": jnp.arange(3.0), "deep": {"c": jnp.bfloat16([1.5, -2])}},
        "search": {"b": np.arange(4, dtype=np.uint16), "long": np.arange(2) + (1 << 40), "double": np.array([0.1])},
    }
    record = {"batches": {"next_index": 12345678901}, "note": "ünï", "list": [1, 0.1, None, True, {"x": []}]}
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(7, arrays, record)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        assert checkpoints.latest() == 7
        restored, found = checkpoints.restore(7)
    assert_same(restored, arrays)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    assert found == record


def test_only_the_items_asked_for_are_read(tmp_path):
    state = make_state(3)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(1, {"params": state.params, "optimizer": state.moments}, {"step": 1})
    for file in (tmp_path / "stage/1/optimizer").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.MonkeyPatch.context() as patch:  # the manifest would not let the missing files pass
        patch.setattr("longrope_jax.runtime.checkpoints.difference", lambda expected, found: None)
        with Checkpoints(tmp_path / "stage") as checkpoints:
            for like in (None, state.params):
                restored, record = checkpoints.restore(1, {"params": like})
                assert_same(restored, {"params": state.params})
                assert record == {"step": 1}


@pytest.mark.parametrize("like", ["arrays", "shapes"])
def test_restoring_to_a_structure_gives_its_types(tmp_path, like):
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(1, {"state": make_state(3)}, {})
    template = make_state(0) if like == "arrays" else jax.eval_shape(make_state)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        restored = checkpoints.restore(1, {"state": template})[0]["state"]
    assert isinstance(restored, State)
    assert_same(restored, make_state(3))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_device_arrays_are_copied_before_save_returns(tmp_path):
    x = jnp.arange(1 << 18)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(1, {"params": {"x": x}}, {})
        x.delete()  # as a training step does that takes its arguments' memory
        restored, _ = checkpoints.restore(1)
    np.testing.assert_array_equal(restored["params"]["x"], np.arange(1 << 18))


def test_restoring_onto_another_mesh(tmp_path):
    rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    array = jnp.arange(8 * 12.0).reshape(8, 12)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(1, {"params": {"x": jax.device_put(array, rows)}}, {})
    columns = NamedSharding(jax.make_mesh((4,), ("seq",), devices=jax.devices()[:4]), PartitionSpec(None, "seq"))
    for sharding in (rows, columns, SingleDeviceSharding(jax.devices()[5])):
        struct = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        for like in (struct, jax.device_put(jnp.zeros_like(array), sharding)):
            with Checkpoints(tmp_path / "stage") as checkpoints:
                found = checkpoints.restore(1, {"params": {"x": like}})[0]["params"]["x"]
            assert found.sharding == sharding
            np.testing.assert_array_equal(found, array)


ON_ONE_DEVICE = """
import sys, jax, numpy as np
from longrope_jax.runtime.checkpoints import Checkpoints
assert jax.device_count() == 1
with Checkpoints(sys.argv[1]) as checkpoints:
    whole = checkpoints.restore(1)[0]["params"]["x"]
    like = jax.ShapeDtypeStruct((8, 12), "float32")
    placed = checkpoints.restore(1, {"params": {"x": like}})[0]["params"]["x"]
np.testing.assert_array_equal(whole, np.arange(96).reshape(8, 12))
np.testing.assert_array_equal(placed, whole)
assert placed.devices() == set(jax.devices())
"""


def test_what_eight_devices_saved_is_read_on_one(tmp_path):
    rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    with Checkpoints(tmp_path / "stage") as checkpoints:
        array = jax.device_put(jnp.arange(96.0).reshape(8, 12), rows)
        checkpoints.save(1, {"params": {"x": array}}, {})
        assert isinstance(checkpoints.restore(1)[0]["params"]["x"], np.ndarray)
    command = [sys.executable, "-c", ON_ONE_DEVICE, str(tmp_path / "stage")]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": ""}, check=True, timeout=200)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    save(tmp_path / "stage", 1)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        with pytest.raises(FileNotFoundError, match=r"stage/5: there is no such step, only \[1\]"):
            checkpoints.restore(5)
        with pytest.raises(FileNotFoundError, match="stage/1/nosuch"):
            checkpoints.restore(1, {"nosuch": None})
        with pytest.raises(ValueError, match="stage/1: "):
            checkpoints.restore(1, {"params": {"x": jnp.ones(5)}})
        with pytest.raises(ValueError, match="stage/1: "):
            checkpoints.restore(1, {"params": {"other": jnp.ones(2)}})
        with pytest.raises(ValueError, match="step 1 is not above the newest, 1"):
            checkpoints.save(1, {"params": {"x": jnp.ones(2)}}, {})


# The newest are kept, each with its manifest.


def test_the_newest_are_kept_and_each_has_its_own_content(tmp_path):
    save(tmp_path / "stage", 1, 2, 5, 10, 11, keep=3)
    assert names(tmp_path / "stage") == ["10", "11", "5", "manifests"]
    assert names(tmp_path / "stage/manifests") == ["10.json", "11.json", "5.json"]
    with Checkpoints(tmp_path / "stage", keep=3) as checkpoints:
        assert checkpoints.latest() == 11
        for step in (5, 10, 11):
            arrays, record = checkpoints.restore(step)
            assert arrays["params"]["x"].tolist() == [step, step]
            assert record == {"step": step}


def test_two_are_kept_by_default_across_processes_that_go_on(tmp_path):
    for step in (1, 2, 3):
        with Checkpoints(tmp_path / "stage") as checkpoints:
            assert checkpoints.latest() == (step - 1 or None)
            checkpoints.save(step, {"params": {"x": jnp.full(2, step)}}, {"step": step})
    assert names(tmp_path / "stage") == ["2", "3", "manifests"]
    assert names(tmp_path / "stage/manifests") == ["2.json", "3.json"]


def test_a_manifest_has_every_file_of_its_step(tmp_path):
    save(tmp_path / "stage", 1)
    step = tmp_path / "stage/1"
    files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    manifest = json.loads((tmp_path / "stage/manifests/1.json").read_text())
    assert manifest.keys() == files
    assert manifest == checkpoints.describe(epath.Path(step))
