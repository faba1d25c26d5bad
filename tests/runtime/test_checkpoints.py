import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from longrope_jax.runtime import manifests
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


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def save(directory, *steps, keep=2):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"params": {"x": jnp.full(2, step)}, "rest": {"y": jnp.ones(3)}}, {"step": step})


def saved_step(directory, step):
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest() == step
        arrays, record = checkpoints.restore(step)
    assert arrays["params"]["x"].tolist() == [step, step]
    return record == {"step": step}


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
        patch.setattr(manifests, "difference", lambda expected, found: None)
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
    assert manifest == manifests.describe(epath.Path(step))


# A damaged step is noticed, kept aside, and the one before it is used.


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def assert_step_before_is_used(stage, caplog, said):
    """With steps 1 and 2 saved and 2 damaged."""
    caplog.clear()
    with Checkpoints(stage) as checkpoints:
        assert checkpoints.latest() == 1
        (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
        assert f"{stage}: step 2 is damaged" in warning
        assert str(said) in warning
        assert checkpoints.restore(1)[1] == {"step": 1}
        assert "2" in names(stage / "damaged")
        checkpoints.save(2, {"params": {"x": jnp.full(2, 2)}}, {"step": 2})
    assert saved_step(stage, 2)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    stage = tmp_path_factory.mktemp("two") / "stage"
    save(stage, 1, 2)
    return stage


def copy(source, target):
    subprocess.run(["cp", "-r", source, target], check=True)
    return target


@pytest.mark.parametrize("damage", [flip, truncate, pathlib.Path.unlink])
def test_any_damage_to_any_file_is_noticed(tmp_path, two_steps, caplog, damage):
    files = [path.relative_to(two_steps) for path in (two_steps / "2").rglob("*") if path.is_file()]
    assert len(files) > 10
    for number, file in enumerate(files):
        stage = copy(two_steps, tmp_path / str(number))
        damage(stage / file)
        caplog.clear()
        with Checkpoints(stage) as checkpoints:
            assert checkpoints.latest() == 1
        (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
        assert f"{stage}: step 2 is damaged" in warning
        assert str(file.relative_to("2")) in warning
        assert names(stage / "damaged") == ["2", "2.json"]


def test_a_step_saved_again_after_damage(tmp_path, two_steps, caplog):
    stage = copy(two_steps, tmp_path / "stage")
    for _ in range(2):
        flip(next(path for path in (stage / "2/params/d").iterdir()))
        assert_step_before_is_used(stage, caplog, "params/d/")
    assert names(stage / "damaged") == ["2", "2-1", "2-1.json", "2.json"]


def test_a_file_too_many_is_damage(tmp_path, two_steps, caplog):
    stage = copy(two_steps, tmp_path / "stage")
    (stage / "2/params/d/more").write_text("?")
    assert_step_before_is_used(stage, caplog, "params/d/more is not in the manifest")


@pytest.mark.parametrize("text", ['{"record/metadata": [1', "[1, 2]", "3", "{}", "\x00", '{"record/metadata": 3}'])
def test_a_damaged_manifest_is_damage(tmp_path, two_steps, caplog, text):
    stage = copy(two_steps, tmp_path / "stage")
    (stage / "manifests/2.json").write_text(text)
    assert_step_before_is_used(stage, caplog, "manifest")


def test_a_flipped_byte_in_a_manifest_is_damage(tmp_path, two_steps):
    content = (two_steps / "manifests/2.json").read_bytes()
    stage = copy(two_steps, tmp_path / "stage")
    for place in range(0, len(content), 97):
        target = stage / "manifests/2.json"
        target.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with Checkpoints(stage) as checkpoints:
            assert checkpoints.latest() == 1
        (stage / "damaged/2").rename(stage / "2")
        (stage / "damaged/2.json").unlink()


def test_a_missing_manifest_is_damage(tmp_path, two_steps, caplog):
    stage = copy(two_steps, tmp_path / "stage")
    (stage / "manifests/2.json").unlink()
    assert_step_before_is_used(stage, caplog, "manifests/2.json is missing")
    assert names(stage / "damaged") == ["2"]


def test_all_damaged_is_no_step(tmp_path, two_steps, caplog):
    stage = copy(two_steps, tmp_path / "stage")
    for step in "12":
        flip(stage / step / "record/metadata")
    with Checkpoints(stage) as checkpoints:
        assert checkpoints.latest() is None
        assert [entry.levelname for entry in caplog.records].count("WARNING") == 2
        checkpoints.save(1, {"params": {"x": jnp.full(2, 1)}}, {"step": 1})
    assert saved_step(stage, 1)
    assert names(stage / "damaged") == ["1", "1.json", "2", "2.json"]


def test_an_older_step_is_checked_when_it_is_used(tmp_path, two_steps):
    stage = copy(two_steps, tmp_path / "stage")
    flip(stage / "1/record/metadata")
    (stage / "1/_CHECKPOINT_METADATA").write_text("{")
    with Checkpoints(stage) as checkpoints:
        assert checkpoints.latest() == 2
        assert checkpoints.restore(2)[1] == {"step": 2}
        with pytest.raises(OSError, match="stage/1 is damaged: "):
            checkpoints.restore(1)


# Killed while saving.


def test_an_interrupted_save_is_not_taken_for_a_step(tmp_path, monkeypatch):
    stage = tmp_path / "stage"
    save(stage, 1)

    def killed(*_, **__):
        raise OSError("killed before the step got its name")

    with monkeypatch.context() as patch:
        for function in ("rename", "replace"):
            patch.setattr(os, function, killed)
        with pytest.raises(OSError, match="step 2 could not be saved; last good step: 1; killed"):
            save(stage, 2)
    (left_over,) = set(names(stage)) - {"1", "manifests"}
    assert left_over != "2"

    with Checkpoints(stage) as checkpoints:
        assert checkpoints.latest() == 1
        assert names(stage) == ["1", "manifests"]
        checkpoints.save(2, {"params": {"x": jnp.full(2, 2)}}, {"step": 2})
    assert saved_step(stage, 2)


def test_killed_right_behind_a_steps_completion(tmp_path, monkeypatch):
    stage = tmp_path / "stage"
    with monkeypatch.context() as patch:
        patch.setattr("longrope_jax.runtime.checkpoints._complete_manifest", lambda directory, step: None)
        save(stage, 1)
    manifest = json.loads((stage / "manifests/1.json").read_text())
    assert "_CHECKPOINT_METADATA" not in manifest
    assert "params/manifest.ocdbt" in manifest
    assert saved_step(stage, 1)
    assert not (stage / "damaged").exists()


SAVE_IN_A_LOOP = """
import sys, itertools, jax.numpy as jnp
from longrope_jax.runtime.checkpoints import Checkpoints
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    for step in itertools.count((checkpoints.latest() or 0) + 1):
        checkpoints.save(step, {"params": {"x": jnp.full(2, step)}}, {"step": step})
        print(step, flush=True)
"""


def test_killed_at_any_time_there_is_a_good_step(tmp_path, caplog):
    stage, known = tmp_path / "stage", 0
    for wait in (0.0, 0.017):
        command = [sys.executable, "-c", SAVE_IN_A_LOOP, str(stage)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            first = int(process.stdout.readline())
            process.stdout.readline()
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        with Checkpoints(stage, keep=1) as checkpoints:
            newest = checkpoints.latest()
            assert newest >= first > known
            arrays, record = checkpoints.restore(newest)
        assert record == {"step": newest}
        assert arrays["params"]["x"].tolist() == [newest, newest]
        known = newest
    assert not [entry for entry in caplog.records if "damaged" in entry.getMessage()]


# What can't be saved is told.


@pytest.fixture
def disk():
    """Fills up on `disk.fill()`: no file may grow beyond what a small step needs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield SimpleNamespace(fill=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1])))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_too_much(checkpoints, step):
    checkpoints.save(step, {"params": {"x": jnp.arange(1_000_000)}}, {})


@pytest.mark.parametrize("good", [None, 1])
def test_a_full_disk_is_told_in_one_line_and_leaves_the_step_before(tmp_path, disk, good):
    stage = tmp_path / "stage"
    if good:
        save(stage, good, keep=1)
    expected = f"^{stage}: step 2 could not be saved; last good step: {good}; [^\n]*$"
    with pytest.raises(OSError, match=expected), Checkpoints(stage, keep=1) as checkpoints:
        disk.fill()
        save_too_much(checkpoints, 2)
    with Checkpoints(stage, keep=1) as checkpoints:
        assert checkpoints.latest() == good
    assert good is None or saved_step(stage, good)
    assert not (stage / "damaged").exists()


def test_a_full_disk_is_told_at_the_next_save_which_can_be_tried_again(tmp_path, disk):
    stage = tmp_path / "stage"
    save(stage, 1)
    with Checkpoints(stage) as checkpoints:
        disk.fill()
        save_too_much(checkpoints, 2)
        with pytest.raises(OSError, match="step 2 could not be saved; last good step: 1; "):
            checkpoints.save(3, {"params": {"x": jnp.full(2, 3)}}, {"step": 3})
        assert checkpoints.latest() == 1
        checkpoints.save(3, {"params": {"x": jnp.full(2, 3)}}, {"step": 3})
    assert saved_step(stage, 3)


def test_a_full_disk_does_not_hide_another_exception(tmp_path, disk, caplog):
    stage = tmp_path / "stage"
    with pytest.raises(KeyError, match="another reason to leave"), Checkpoints(stage) as checkpoints:
        disk.fill()
        save_too_much(checkpoints, 2)
        raise KeyError("another reason to leave")
    assert f"{stage}: step 2 could not be saved" in caplog.text


def test_a_manifest_that_cannot_be_written_is_a_step_not_saved(tmp_path):
    stage = tmp_path / "stage"
    save(stage, 1)
    (stage / "manifests/.2.json.partial").mkdir()
    with pytest.raises(OSError, match="step 2 could not be saved; last good step: 1; "):
        save(stage, 2)
    (stage / "manifests/.2.json.partial").rmdir()
    assert saved_step(stage, 1)


@pytest.mark.parametrize(("leaf", "record"), [("text", {}), (jnp.ones(2), {"a": jnp.ones(2)})])
def test_what_cannot_be_written_is_told_and_does_not_stop_the_next_save(tmp_path, leaf, record):
    with Checkpoints(tmp_path / "stage") as checkpoints:
        with pytest.raises(OSError, match="step 1 could not be saved; last good step: None; "):
            checkpoints.save(1, {"params": {"x": leaf}}, record)
            checkpoints.latest()
        checkpoints.save(1, {"params": {"x": jnp.ones(2)}}, {"step": 1})
    assert saved_step(tmp_path / "stage", 1)


def test_a_place_that_is_no_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file/stage")


# In an object store a step is written under its own name, and has a marker when it is complete.


@pytest.fixture
def object_store(monkeypatch):
    from orbax.checkpoint._src.path import atomicity, atomicity_defaults

    for function in ("get_default_temporary_path_class", "get_item_default_temporary_path_class"):
        monkeypatch.setattr(atomicity_defaults, function, lambda *_, **__: atomicity.CommitFileTemporaryPath)


def test_the_same_in_an_object_store(tmp_path, caplog, object_store):
    stage = tmp_path / "stage"
    save(stage, 1, 2)
    copy(stage / "2", stage / "3")
    (stage / "3/commit_success.txt").unlink()
    assert saved_step(stage, 2)
    assert names(stage) == ["1", "2", "manifests"]
    flip(stage / "2/record/metadata")
    assert_step_before_is_used(stage, caplog, "record/metadata")
    assert names(stage) == ["1", "2", "damaged", "manifests"]
