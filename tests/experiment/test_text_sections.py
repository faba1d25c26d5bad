"""Sections of text: who names which, and that tokens are made once, of what is asked for, and again when mended."""

import json
import re
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from ml_collections import ConfigDict

from longrope_jax.data import token_files
from longrope_jax.data.corpus import DataSettings
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.experiment import text_sections
from longrope_jax.settings import section

TRAIN, SEARCH, EVALUATION = ("train",), ("search",), ("evaluation",)


def make_folder(folder, count=20, word="text"):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"{word} {i}")
    return DataSettings(folder=str(folder))


def make_records(folder, count=20):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer = ArrayRecordWriter(str(folder / f"{count}.array_record"), "group_size:1")
    for i in range(count):
        writer.write(b"record %d" % i)
    writer.close()
    return DataSettings(folder=str(folder))


def read(workdir, settings, reads=None, tokenizer=None):
    reads = reads or {"pretrain": ("data", TRAIN), "search": ("data", SEARCH)}
    return text_sections.read({"data": settings}, reads, tokenizer or ByteTokenizer(), epath.Path(workdir))


def names(documents):
    return {split: [document.name for document in some] for split, some in documents["data"].items()}


def begin(workdir, stage):
    (workdir / "stages").mkdir(exist_ok=True, parents=True)
    (workdir / "stages" / f"{stage}.started.json").write_text("{}")


def forbid_work(monkeypatch):
    monkeypatch.setattr(token_files, "write_shards", lambda *_: pytest.fail("tokens were made again"))


# --- which sections ---------------------------------------------------------------------------------------------------


def make_config(*names):
    return ConfigDict({name: section(DataSettings(folder=f"/{name}")) for name in names})


def test_sections_are_those_that_stages_name():
    reads = {"pretrain": ("data", TRAIN), "evaluate": ("data_books", EVALUATION), "retrieval": ("data_more", ())}
    found = text_sections.parse_sections(make_config("data", "data_books"), reads)
    assert {name: settings.folder for name, settings in found.items()} == {"data": "/data", "data_books": "/data_books"}
    # A section that a stage names though it happens to read none of it may be there, too.
    assert "data_more" in text_sections.parse_sections(make_config("data", "data_books", "data_more"), reads)


WRONG = {
    "absent": (
        ("data",),
        "data_books",
        "config.data_books is missing, the text that config.evaluate.data names; there are data$",
    ),
    "none at all": ((), "data_books", "config.data_books is missing, the text that config.evaluate.data names$"),
    "unread": (
        ("data", "data_books", "data_more"),
        "data_books",
        "config.data_more is read by no stage: evaluate.data = 'data_books', search.data = 'data'$",
    ),
    "no section of text": (("data",), "books", "config.evaluate.data = 'books' must be 'data' or begin with 'data_'"),
    "no name": (("data",), "data_", "config.evaluate.data = 'data_' must be 'data' or begin with 'data_'"),
}


@pytest.mark.parametrize(("sections", "named", "message"), WRONG.values(), ids=WRONG)
def test_sections_and_stages_have_to_go_together(sections, named, message):
    reads = {"evaluate": (named, EVALUATION), "search": ("data", SEARCH)}
    with pytest.raises(ValueError, match=message):
        text_sections.parse_sections(make_config(*sections), reads)


def test_two_sections_of_the_same_text_are_refused():
    config = ConfigDict({name: section(DataSettings(folder="/a")) for name in ("data", "data_a")})
    with pytest.raises(ValueError, match="config.data_a is the same text as config.data; let stages name one of them"):
        text_sections.parse_sections(config, {"search": ("data", SEARCH), "evaluate": ("data_a", EVALUATION)})


def test_a_section_is_checked():
    with pytest.raises(ValueError, match="config.data_books.foldr is not a field of DataSettings"):
        text_sections.parse_sections(
            ConfigDict({"data_books": {"foldr": ""}}), {"evaluate": ("data_books", EVALUATION)}
        )


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_only_what_stages_read_is_tokenised(tmp_path):
    settings = make_folder(tmp_path / "texts")
    documents = read(tmp_path / "run", settings)
    assert {split: len(some) for split, some in documents["data"].items()} == {"train": 14, "search": 2}
    (folder,) = (tmp_path / "run" / "tokens").iterdir()
    assert re.fullmatch(r"data-[0-9a-f]{12}", folder.name)
    kept = {"source.json", *(f"{s}.json" for s in ("train", "search"))}
    assert {path.name for path in folder.iterdir() if path.suffix == ".json"} == kept
    document = documents["data"]["train"][3]
    content = (tmp_path / "texts" / document.name).read_bytes()
    assert np.asarray(document.tokens).tolist() == [256, *content, 257] and document.size == len(content)


def test_tokens_are_made_once(tmp_path, monkeypatch):
    settings = make_folder(tmp_path / "texts")
    first = names(read(tmp_path / "run", settings))
    forbid_work(monkeypatch)
    assert names(read(tmp_path / "run", settings)) == first
    # What a stage that has begun reads stays what it was, even where the folder is gone.
    begin(tmp_path / "run", "pretrain")
    make_folder(tmp_path / "texts", count=30)
    assert names(read(tmp_path / "run", settings)) == first
    shutil.rmtree(tmp_path / "texts")
    assert names(read(tmp_path / "run", settings)) == first


def test_a_folder_that_is_away_before_any_stage_has_begun_costs_no_tokens(tmp_path, monkeypatch):
    settings = make_folder(tmp_path / "texts")
    first = names(read(tmp_path / "run", settings))
    (tmp_path / "texts").rename(tmp_path / "away")
    forbid_work(monkeypatch)
    assert names(read(tmp_path / "run", settings)) == first


@pytest.mark.parametrize("make", [make_folder, make_records])
def test_a_mended_folder_is_read_again_until_a_stage_has_begun(tmp_path, make):
    settings = make(tmp_path / "texts")
    assert sum(map(len, names(read(tmp_path / "run", settings)).values())) == 16
    make(tmp_path / "texts", count=40)
    assert sum(map(len, names(read(tmp_path / "run", settings)).values())) == 32


def test_splits_that_are_asked_for_later_are_cut_from_the_same_documents(tmp_path):
    one, both = {"pretrain": ("data", TRAIN)}, {"pretrain": ("data", TRAIN), "evaluate": ("data", EVALUATION)}
    for make, run in [(make_folder, tmp_path / "a"), (make_records, tmp_path / "b")]:
        settings = make(tmp_path / make.__name__)
        first = names(read(run, settings, one))["train"]
        begin(run, "pretrain")
        make(tmp_path / make.__name__, count=33)
        if make is make_records:
            with pytest.raises(ValueError, match="config.data: the files of .* are not those that a stage started"):
                read(run, settings, both)
            continue
        found = names(read(run, settings, both))
        assert found["train"] == first and len(found["evaluation"]) == 2
        assert not set(first) & set(found["evaluation"])


def test_another_tokenizer_has_tokens_of_its_own(tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "other"

    settings = make_folder(tmp_path / "texts")
    for tokenizer in (ByteTokenizer(), Other(), ByteTokenizer()):
        read(tmp_path / "run", settings, tokenizer=tokenizer)
    folders = list((tmp_path / "run" / "tokens").iterdir())
    assert len(folders) == 2
    made = {json.loads((folder / "train.json").read_text())["tokenizer"] for folder in folders}
    assert made == {"bytes", "other"}


def test_sections_have_tokens_of_their_own(tmp_path):
    settings = {name: make_folder(tmp_path / name, word=name) for name in ("data", "data_books")}
    reads = {"pretrain": ("data", TRAIN), "search": ("data", SEARCH), "evaluate": ("data_books", EVALUATION)}
    found = text_sections.read(settings, reads, ByteTokenizer(), epath.Path(tmp_path / "run"))
    assert {name: set(some) for name, some in found.items()} == {
        "data": {"train", "search"},
        "data_books": {"evaluation"},
    }
    assert found["data_books"]["evaluation"][0].tokens[1:11].tobytes().decode("utf-16le") == "data_books"
    assert sorted(path.name[:-13] for path in (tmp_path / "run" / "tokens").iterdir()) == ["data", "data_books"]


def test_a_split_without_documents_is_refused_before_anything_is_tokenised(tmp_path, monkeypatch):
    forbid_work(monkeypatch)
    settings = DataSettings(folder=make_folder(tmp_path / "texts").folder, shares=(0.0, 0.0, 1.0, 0.0))
    message = r"^config.data: no document is for search, which search would read; shares = \(0.0, 0.0, 1.0, 0.0\)"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "run", settings, {"evaluate": ("data", EVALUATION), "search": ("data", SEARCH)})


def test_a_source_that_can_not_be_read_names_its_section(tmp_path):
    with pytest.raises(ValueError, match="^config.data: data folder '/nonexistent' is not a directory"):
        read(tmp_path, DataSettings(folder="/nonexistent"))
