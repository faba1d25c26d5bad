"""A damaged step is noticed, kept aside, and the one before it is used."""

import pathlib
import subprocess

import jax.numpy as jnp
import pytest
from saved_steps import names, save, saved_step

from longrope_jax.runtime.checkpoints import Checkpoints


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
