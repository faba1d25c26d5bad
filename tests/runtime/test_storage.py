import jax
import pytest
from etils import epath

from longrope_jax import files
from longrope_jax.runtime import json_lines
from longrope_jax.runtime.profiling import ProfileSettings, of_stage, step
from longrope_jax.training.progress import Metrics


def test_the_store_of_these_tests_is_as_unhelpful_as_a_real_one(bucket):
    path = bucket / "some.txt"
    path.write_text("one")
    with path.open("a") as file:
        file.write("two")
    assert path.read_text() == "two"
    (bucket / "empty").mkdir()
    assert not (bucket / "empty").exists()


def test_records_are_added_and_forgotten_as_on_a_disk(bucket):
    path = bucket / "some.jsonl"
    assert json_lines.read(path) == []
    json_lines.append(path, [{"stage": "s", "step": 1}, {"stage": "s", "step": 2}])
    json_lines.append(path, [{"stage": "s", "step": 3}])
    assert json_lines.read(path) == [{"stage": "s", "step": 1}, {"stage": "s", "step": 2}, {"stage": "s", "step": 3}]
    json_lines.keep(path, lambda record: record["step"] != 2)
    json_lines.append(path, [{"stage": "s", "step": 4}])
    assert json_lines.read(path) == [{"stage": "s", "step": 1}, {"stage": "s", "step": 3}, {"stage": "s", "step": 4}]
    assert [file.name for file in bucket.iterdir()] == ["some.jsonl"]


def test_metrics_survive_a_restart(bucket):
    for start in (0, 1):
        with Metrics(bucket, "pretrain", start) as metrics:
            metrics.write(start + 1, loss=1.0)
            metrics.write(start + 2, loss=1.0)
    assert [record["step"] for record in json_lines.read(bucket / "metrics.jsonl")] == [1, 2, 3]
    assert any(file.name.startswith("events") for file in (bucket / "tensorboard" / "pretrain").iterdir())


def test_a_profile_gets_there(bucket, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: epath.Path(folder, "trace.pb").write_text("trace"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    with of_stage(ProfileSettings((1, 2)), "pretrain", bucket):
        step("train", 1, lambda: None)
    assert (bucket / "profile" / "pretrain" / "trace.pb").read_text() == "trace"


@pytest.mark.parametrize("name", ["a", "folder"])
def test_moving(bucket, tmp_path, name):
    for place in (bucket, epath.Path(tmp_path)):
        (place / "folder" / "deep").mkdir(parents=True)
        for path in (place / "a", place / "folder" / "b", place / "folder" / "deep" / "c"):
            path.write_text(path.name)
        files.move(place / name, place / "aside" / name)
        assert not (place / name).exists()
        moved = place / "aside" / name
        found = {file.name: file.read_text() for file in files.files_below(moved)} if moved.is_dir() else {}
        assert found == {"b": "b", "c": "c"} if name == "folder" else moved.read_text() == "a"


def test_file_systems_are_asked_not_to_remember_what_they_saw(monkeypatch):
    conf = {"s3": {"use_listings_cache": True}}
    monkeypatch.setattr("fsspec.config.conf", conf)
    files.see_what_others_write()
    assert conf["gcs"] == {"use_listings_cache": False}
    assert conf["s3"] == {"use_listings_cache": True}  # somebody's own wish
