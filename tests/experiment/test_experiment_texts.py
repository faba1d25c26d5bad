"""Which text the stages of an experiment read, and when it may still change."""

import copy
import json

import pytest
from tiny_experiment import change, forbid_work

from longrope_jax import experiment
from longrope_jax.data.corpus import DataSettings
from longrope_jax.settings import section


def test_a_mended_folder_is_looked_at_again(config, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for k in range(6):
        (texts / f"short{k}.txt").write_text("too short")
    config = change(config, "data.folder", str(texts))
    with pytest.raises(ValueError, match="documents"):
        experiment.run(config, tmp_path / "run")
    for k in range(30):
        (texts / f"long{k}.txt").write_text("long enough " * 30)
    experiment.prepare(config, tmp_path / "run")


@pytest.fixture(scope="module")
def two_texts(config, folder, tmp_path_factory):
    """The same with documents of another folder to search and judge on, and a finished run of it."""
    books, workdir = tmp_path_factory.mktemp("books"), tmp_path_factory.mktemp("two_texts")
    for k in range(5):
        (books / f"book {k}.txt").write_text((folder / f"{k}.txt").read_text().upper())
    config = copy.deepcopy(config)
    with config.unlocked():
        config.data_books = section(DataSettings(folder=str(books), shares=(0.0, 0.4, 0.6, 0.0)))
        config.search.data = config.evaluate.data = "data_books"
    experiment.run(config, workdir)
    return config, workdir


def test_stages_read_the_text_that_they_name(two_texts):
    _, workdir = two_texts
    content = json.loads((workdir / "report.json").read_text())
    documents = [*content["evaluations"]["evaluate"]["documents"], *content["search"][0]["documents"]]
    assert len(set(documents)) == 5 and all(name.startswith("book ") for name in documents)
    made = {path.name[:-13]: {file.stem for file in path.glob("*.json")} for path in (workdir / "tokens").iterdir()}
    assert made == {"data": {"train", "source"}, "data_books": {"search", "evaluation", "source"}}


def test_a_text_that_changes_is_named_with_its_section(two_texts, folder, monkeypatch):
    config, workdir = two_texts
    forbid_work(monkeypatch)
    with pytest.raises(ValueError) as caught:
        experiment.prepare(change(config, "data_books.suffix", ".txt"), workdir)
    assert str(caught.value).endswith("differing: data_books.suffix ('' there, '.txt' now)")
    with pytest.raises(ValueError) as caught:
        experiment.prepare(change(config, "evaluate.data", "data"), workdir)
    assert "evaluate.data ('data_books' there, 'data' now)" in str(caught.value)
    with pytest.raises(
        ValueError, match=r"^config.data_books is read by no stage: pretrain.data = 'data', search.data"
    ):
        experiment.prepare(change(change(config, "evaluate.data", "data"), "search.data", "data"), workdir)
    with pytest.raises(ValueError, match="^config.data_more is missing, the text that config.evaluate.data names"):
        experiment.prepare(change(config, "evaluate.data", "data_more"), workdir)
    # A stage that reads none of it is not bound by it.
    fingerprint = json.loads((workdir / "stages" / "pretrain.started.json").read_text())
    assert set(fingerprint) == {"format", "model", "data", "pretrain", "stages before pretrain"}
