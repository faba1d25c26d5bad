"""Where text comes from: folders of files and records, TFDS datasets; who gets what, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from longrope_jax.data import corpus
from longrope_jax.data.corpus import DataSettings
from longrope_jax.data.sources import folder_fingerprint, open_source

SPLITS = ("train", "search", "evaluation", "test")


def read(settings, data_dir="/nonexistent"):
    """Split -> documents, after checking that they may be read from any one on."""
    splits = open_source(settings, data_dir)
    assert tuple(splits) == SPLITS
    found = {}
    for split, texts in splits.items():
        found[split] = list(texts.read(0, len(texts)))
        assert list(texts.read(len(texts) // 2, len(texts))) == found[split][len(texts) // 2 :]
        assert len(found[split]) == len(texts) and (texts.size > 0) == (len(texts) > 0)
    return found


def everything(found):
    return sorted(document for documents in found.values() for document in documents)


def test_files_may_belong_to_nobody_that_this_machine_knows(tmp_path, monkeypatch):
    """As in a container that runs under a number without a name."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("Some text.")
    assert len(corpus.find_texts(corpus.folder_config(DataSettings(str(tmp_path))))) == 4
    assert folder_fingerprint(str(tmp_path))


# --- array_record files ----------------------------------------------------------------------------------------------


def write_records(folder, count=40, files=3, options="group_size:1"):
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"Text {i}, naïve.".encode() for i in range(count)]
    for k in range(files):
        writer = ArrayRecordWriter(str(folder / f"books-{k:05d}-of-{files:05d}.array_record"), options)
        for text in texts[k::files]:
            writer.write(text)
        writer.close()
    return texts


@pytest.mark.parametrize("options", ["group_size:1", "group_size:8"])
def test_every_record_is_a_document_of_one_split(tmp_path, options):
    texts = write_records(tmp_path / "books", options=options)
    found = read(DataSettings(folder=str(tmp_path / "books")))
    assert sorted(text for _, text in everything(found)) == sorted(texts)
    assert {split: len(documents) for split, documents in found.items()} == dict(
        train=28, search=4, evaluation=4, test=4
    )
    assert dict(everything(found))["books-00001-of-00003.array_record/2"] == texts[7]
    again = read(DataSettings(folder=str(tmp_path / "books")))
    assert again == found


def test_shares_say_who_gets_what(tmp_path):
    texts = write_records(tmp_path / "books")
    only = read(DataSettings(folder=str(tmp_path / "books"), shares=(0.0, 0.0, 1.0, 0.0)))
    assert (only["train"], only["search"], len(only["evaluation"])) == ([], [], len(texts))
    half = read(DataSettings(folder=str(tmp_path / "books"), shares=(0.5, 0.5, 0.0, 0.0)))
    assert (len(half["train"]), len(half["search"]), half["evaluation"]) == (20, 20, [])


@pytest.mark.parametrize(
    "shares",
    [(0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.5, 0.0, 0.5), (0.9, 0.1, 0.0, 0.0)],
)
def test_shares_of_text_files(tmp_path, shares):
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i}")
    found = read(DataSettings(folder=str(tmp_path / "texts"), shares=shares), tmp_path / "data")
    assert [len(found[split]) for split in SPLITS] == [round(20 * share) for share in shares]
    assert len(everything(found)) == 20
    # Another cut of the same folder is another dataset, beside it.
    whole = read(DataSettings(folder=str(tmp_path / "texts")), tmp_path / "data")
    assert [len(whole[split]) for split in SPLITS] == [14, 2, 2, 2]


def test_one_file_is_enough_where_one_split_has_a_share(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "only.txt").write_text("text")
    found = read(DataSettings(folder=str(tmp_path / "texts"), shares=(0.0, 0.0, 1.0, 0.0)), tmp_path / "data")
    assert found["evaluation"] == [("only.txt", b"text")]


def test_records_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "books").mkdir()
    writer = ArrayRecordWriter(str(tmp_path / "books" / "a.array_record"), "group_size:1")
    writer.write(b"\x0a\xff\x01")
    writer.close()
    with pytest.raises(ValueError, match=r"a.array_record/0: the record is no text in UTF-8; .* features.json"):
        open_source(DataSettings(folder=str(tmp_path / "books")), tmp_path)


def test_a_file_that_is_no_array_record_is_named(tmp_path):
    write_records(tmp_path / "books")
    (tmp_path / "books" / "notes.array_record").write_text("no such thing")
    with pytest.raises(ValueError, match=r"notes.array_record can't be read as array_record"):
        open_source(DataSettings(folder=str(tmp_path / "books")), tmp_path)


# --- TFDS ------------------------------------------------------------------------------------------------------------


class Toy(tfds.core.GeneratorBasedBuilder):
    """A dataset like pg19, made here."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("own", "single", "wiki", "unclear")]
    SIZES = {"train": 12, "validation": 3, "test": 5}

    def _info(self):
        text, string = tfds.features.Text(), np.str_
        features = {
            "own": {"book_text": text, "book_title": string, "book_id": np.int32},
            "single": {"text": text},
            "wiki": {"text": text, "version": tfds.features.Text(), "nested": {"text": text}},
            "unclear": {"summary": text, "article": text, "year": np.int32},
        }[self.builder_config.name]
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        sizes = {"train": 30} if self.builder_config.name == "single" else self.SIZES
        return {split: self._generate_examples(split, count) for split, count in sizes.items()}

    def _generate_examples(self, split, count):
        values = {"book_id": 7, "year": 1900, "nested": {"text": "no"}}
        for i in range(count):
            text = f"{split} {i} naïve"
            yield i, {name: values.get(name, f"{name}: {text}") for name in self.info.features}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir."""
    path = tmp_path_factory.mktemp("tfds")
    for config in Toy.BUILDER_CONFIGS:
        Toy(config=config.name, data_dir=str(path), file_format="array_record").download_and_prepare()
    return path


def test_a_dataset_by_its_name_has_splits_of_its_own(prepared):
    for name in ("toy/own", "toy/own:1.2.0"):
        found = read(DataSettings(tfds=name, tfds_dir=str(prepared)))
        assert abs(len(found["search"]) - len(found["evaluation"])) <= 1  # they share validation
        found["validation"] = found.pop("search") + found.pop("evaluation")
        for own, size in Toy.SIZES.items():
            texts = [f"{own} {i} naïve" for i in range(size)]
            assert sorted(found[own]) == sorted((f"book_title: {t}", f"book_text: {t}".encode()) for t in texts)


def test_the_directory_of_a_dataset_is_a_folder(prepared):
    by_name = read(DataSettings(tfds="toy/own", tfds_dir=str(prepared)))
    assert read(DataSettings(folder=str(prepared / "toy" / "own" / "1.2.0"))) == by_name


def test_a_feature_that_is_in_no_example_is_no_text(prepared, tmp_path):
    folder = shutil.copytree(prepared / "toy" / "single" / "1.2.0", tmp_path / "single")
    features = (folder / "features.json").read_text()
    (folder / "features.json").write_text(
        features.replace('"text": {\n                "python', '"other": {\n                "python')
    )
    with pytest.raises(ValueError, match="'train/0' has no text: None"):
        read(DataSettings(folder=str(folder)))


def test_what_tfds_says_of_damaged_features_is_reported_by_its_beginning(prepared, tmp_path):
    folder = shutil.copytree(prepared / "toy" / "single" / "1.2.0", tmp_path / "single")
    (folder / "features.json").write_text(json.dumps({"featuresDict": [2**60] * 2000, "pythonClassName": "x"}))
    with pytest.raises(ValueError, match=f"data folder '{folder}'") as caught:
        read(DataSettings(folder=str(folder)))
    assert len(str(caught.value)) < 2000


def test_a_dataset_with_one_split_is_cut_by_shares(prepared):
    found = read(DataSettings(tfds="toy/single", tfds_dir=str(prepared), shares=(0.5, 0.2, 0.1, 0.2)))
    assert [len(found[split]) for split in SPLITS] == [15, 6, 3, 6]
    assert sorted(text for _, text in everything(found)) == sorted(f"text: train {i} naïve".encode() for i in range(30))
    assert {name for name, _ in everything(found)} == {f"train/{i}" for i in range(30)}


def test_the_text_among_several_features(prepared):
    found = read(DataSettings(tfds="toy/wiki", tfds_dir=str(prepared)))
    assert all(text.startswith(b"text: ") for _, text in everything(found))
    for feature in ("article", "summary"):
        found = read(DataSettings(tfds="toy/unclear", tfds_dir=str(prepared), text_feature=feature))
        assert all(text.startswith(feature.encode()) for _, text in everything(found))


REFUSED = {
    "unknown": (dict(tfds="toy_of_none"), r"tfds = 'toy_of_none': not found in .*tfds"),
    "unclear": (dict(tfds="toy/unclear"), r"^text_feature must name the text feature, one of article, summary$"),
    "no text": (
        dict(tfds="toy/unclear", text_feature="year"),
        r"text_feature = 'year' is no text of the dataset; those are article, summary",
    ),
    "shares": (
        dict(tfds="toy/own", shares=(0.0, 0.0, 1.0, 0.0)),
        r"shares = \(0.0, 0.0, 1.0, 0.0\): the dataset has its own splits, train, validation, test",
    ),
    "not prepared": (
        dict(tfds="pg19"),
        r"tfds = 'pg19' is not prepared in .*requirements-tensorflow.txt.*tfds.builder\('pg19', data_dir='.*', "
        r"file_format='array_record'\).download_and_prepare\(\)",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_tfds_does_not_have_is_one_line(prepared, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_source(DataSettings(**fields, tfds_dir=str(prepared)), prepared)
    assert "\n" not in str(caught.value)


def test_a_dataset_for_tensorflow_says_what_is_missing(prepared, tmp_path, monkeypatch):
    import importlib.util

    directory = shutil.copytree(prepared / "toy" / "own" / "1.2.0", tmp_path / "toy" / "own" / "1.2.0")
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name))
    message = r"toy/own/1.2.0 was prepared as tfrecord.*pip install -r requirements-tensorflow.txt"
    for settings in (DataSettings(folder=str(directory)), DataSettings(tfds="toy/own", tfds_dir=str(tmp_path))):
        with pytest.raises(ValueError, match=message):
            open_source(settings, tmp_path)


# --- settings --------------------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "two sources": (dict(folder="/a", tfds="pg19"), "folder = '/a' and tfds = 'pg19' are two sources"),
    "no dataset": (dict(tfds_dir="/a"), "tfds_dir = '/a' needs tfds"),
    "no source": (dict(text_feature="a"), "text_feature = 'a' needs tfds or a folder"),
    "suffix": (dict(suffix=".md"), "suffix = '.md' needs a folder"),
    "two shares": (dict(shares=(0.5, 0.5)), r"shares = \(0.5, 0.5\) must be four numbers"),
    "negative share": (dict(shares=(-0.5, 0.5, 1.0, 0.0)), "shares = .* must be four numbers from 0 to 1"),
    "sum": (dict(shares=(0.5, 0.2, 0.1, 0.1)), "shares = .* must add up to 1, not 0.9"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        DataSettings(**fields)


def test_settings_for_another_kind_of_folder(tmp_path, prepared):
    write_records(tmp_path / "books")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a")
    for fields, message in [
        (
            dict(folder=str(tmp_path / "books"), suffix=".txt"),
            "suffix = '.txt' is for text files; .* array_record files",
        ),
        (dict(folder=str(prepared / "toy/own/1.2.0"), suffix=".txt"), "suffix = '.txt' is .* holds a TFDS dataset"),
        (dict(folder=str(texts), text_feature="text"), "text_feature = 'text' is for TFDS; .* holds texts"),
        (dict(folder=str(tmp_path / "books"), text_feature="text"), "text_feature = 'text' is for TFDS"),
        (dict(folder=str(tmp_path / "none")), "is not a directory"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(DataSettings(**fields), tmp_path)


def test_a_record_of_settings_has_what_was_given_only():
    assert DataSettings().to_record() == {}
    shares = (0.0, 0.0, 1.0, 0.0)
    assert DataSettings(tfds="pg19", shares=shares).to_record() == {"tfds": "pg19", "shares": list(shares)}


# --- folders of text files -------------------------------------------------------------------------------------------


def test_the_names_of_datasets_in_old_work_directories():
    """Written down: another name would be another dataset."""
    assert corpus.folder_config(DataSettings()).name == "stdlib"
    assert corpus.folder_config(DataSettings("/texts", ".md")).name == "folder-111a45f7c361"


def test_texts_of_a_folder_are_in_the_order_of_its_dataset(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i}")
    found = read(DataSettings(folder=str(tmp_path / "texts")), tmp_path / "data")
    builder = corpus.build(corpus.folder_config(DataSettings(str(tmp_path / "texts"))), tmp_path / "data")
    for split, documents in found.items():
        assert [name for name, _ in documents] == [held["path"].decode() for held in builder.as_data_source(split)]


def test_a_dataset_is_built_on_an_object_store(tmp_path, bucket):
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i}")
    config = corpus.folder_config(DataSettings(str(tmp_path / "texts")))
    local = corpus.build(config, tmp_path / "data")
    remote = corpus.build(config, bucket / "data")
    assert remote.info.metadata["files"] == local.info.metadata["files"]
    names = {path.name for path in local.data_path.iterdir()}
    assert {path.name for path in remote.data_path.iterdir()} == names
    for name in names:
        if name.endswith("array_record-00000-of-00001"):
            assert (remote.data_path / name).read_bytes() == (local.data_path / name).read_bytes()
    shutil.rmtree(tmp_path / "texts")
    assert corpus.build(config, bucket / "data").info.splits["train"].num_examples == 14


def test_a_folder_fingerprint_notices_what_was_mended(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("text")
    (tmp_path / ".hidden").mkdir()
    first = folder_fingerprint(str(tmp_path))
    (tmp_path / ".hidden" / "b.txt").write_text("hidden")
    assert folder_fingerprint(str(tmp_path)) == first
    (tmp_path / "sub" / "a.txt").write_text("texts")
    second = folder_fingerprint(str(tmp_path))
    (tmp_path / "sub" / "b.txt").write_text("more")
    assert len({first, second, folder_fingerprint(str(tmp_path)), folder_fingerprint(str(tmp_path / "none"))}) == 4
