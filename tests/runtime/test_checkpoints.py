import os

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_nothing_saved_is_no_step(tmp_path):
    with Checkpoints(tmp_path / "stage") as checkpoints:
        assert checkpoints.latest() is None


def test_arrays_and_record_come_back(tmp_path):
    arrays = {"a": jnp.arange(3.0), "deep": {"b": np.arange(4, dtype=np.uint16), "c": jnp.bfloat16([1.5, -2])}}
    record = {"batches": {"next_index": 12345678901}, "note": "ünï", "list": [1, 0.1, None, True, {"x": []}]}
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(7, arrays, record)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        assert checkpoints.latest() == 7
        restored, found = checkpoints.restore(7)
    assert_same(restored, arrays)
    assert found == record


@pytest.mark.parametrize("like", ["arrays", "shapes"])
def test_restoring_into_a_structure_gives_its_types(tmp_path, like):
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(1, make_state(3), {})
    template = make_state(0) if like == "arrays" else jax.eval_shape(make_state)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        restored, _ = checkpoints.restore(1, like=template)
    assert isinstance(restored, State)
    assert_same(restored, make_state(3))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_the_newest_are_kept_and_each_has_its_own_content(tmp_path):
    with Checkpoints(tmp_path / "stage", keep=3) as checkpoints:
        for step in (1, 2, 5, 10, 11):
            checkpoints.save(step, {"x": jnp.full(2, step)}, {"step": step})
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["10", "11", "5"]
    with Checkpoints(tmp_path / "stage", keep=3) as checkpoints:
        assert checkpoints.latest() == 11
        for step in (5, 10, 11):
            arrays, record = checkpoints.restore(step)
            assert arrays["x"].tolist() == [step, step]
            assert record == {"step": step}


def test_two_are_kept_by_default_across_processes_that_go_on(tmp_path):
    for step in (1, 2, 3):
        with Checkpoints(tmp_path / "stage") as checkpoints:
            assert checkpoints.latest() == (step - 1 or None)
            checkpoints.save(step, {"x": jnp.full(2, step)}, {"step": step})
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["2", "3"]


def test_device_arrays_are_copied_before_save_returns(tmp_path):
    arrays = {"x": jnp.arange(1 << 18)}
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(1, arrays, {})
        arrays["x"].delete()  # as a training step does that takes its arguments' memory
    with Checkpoints(tmp_path / "stage") as checkpoints:
        restored, _ = checkpoints.restore(1)
    np.testing.assert_array_equal(restored["x"], np.arange(1 << 18))


def test_an_interrupted_save_is_not_taken_for_a_step(tmp_path, monkeypatch):
    directory = tmp_path / "stage"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)}, {"step": 1})

    def killed(*_, **__):
        raise OSError("killed before the step got its name")

    with monkeypatch.context() as patch:
        for function in ("rename", "replace"):
            patch.setattr(os, function, killed)
        with pytest.raises(OSError, match="killed"), Checkpoints(directory) as checkpoints:
            checkpoints.save(2, {"x": jnp.full(2, 2.0)}, {"step": 2})
    left_over = [path.name for path in directory.iterdir() if path.name != "1"]
    assert len(left_over) == 1
    assert left_over[0] != "2"

    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest() == 1
        assert checkpoints.restore(1)[1] == {"step": 1}
        checkpoints.save(2, {"x": jnp.full(2, 3.0)}, {"step": "2 again"})
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest() == 2
        arrays, record = checkpoints.restore(2)
    assert record == {"step": "2 again"}
    assert arrays["x"].tolist() == [3.0, 3.0]
