import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longrope_jax.data import corpus
from longrope_jax.data.corpus import DataSettings, Document
from longrope_jax.data.tokenizer import ByteTokenizer

TEXTS = {
    "plain.txt": b"hello\n",
    "windows.txt": b"one\r\ntwo\r\n",
    "latin-1.txt": "déjà vu".encode("latin-1"),
    "utf-8.txt": "naïve 日本語 🙂".encode(),
    "every byte but zero": bytes(range(1, 256)),
    "only newlines": b"\n\n\n",
    "ünï çode/日本語.txt": b"a unicode path",
    "a b/c%20d/{e}.txt": b"special characters in the path",
    "deep/er/and/deeper/file.txt": b"x" * 20000,
    **{f"notes/{i:02}.md": f"note {i}".encode() for i in range(12)},
}
PASSED_OVER = {
    "binary.txt": b"text\0and a zero",
    "empty.txt": b"",
    ".hidden.txt": b"hidden",
    ".git/config": b"in a hidden directory",
    "notes/.cache/deep/file.txt": b"below a hidden directory",
    "__pycache__/module.txt": b"cached",
    "notes/__pycache__/module.txt": b"cached",
}


def write_files(folder: Path, files: dict[str, bytes]) -> str:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return str(folder)


def read_splits(builder):
    return {
        split: [Document(d["path"].decode(), ByteTokenizer().encode(d["text"]), len(d["text"])) for d in texts]
        for split, texts in builder.as_data_source().items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("texts"), {**TEXTS, **PASSED_OVER})


@pytest.fixture(scope="module")
def builder(folder, tmp_path_factory):
    return corpus.build(corpus.folder_config(DataSettings(folder)), tmp_path_factory.mktemp("data"))


# --- which files are documents -------------------------------------------------------------------------------------


def test_stdlib_has_hundreds_of_sources_and_none_from_an_excluded_directory():
    config = corpus.folder_config(DataSettings())
    texts = corpus.find_texts(config)
    assert len(texts) > 200
    assert {"argparse.py", "json/decoder.py"} <= set(texts)
    assert (Path(config.folder) / "encodings").is_dir()
    excluded = {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"}
    assert [path for path in texts if excluded & set(path.split("/"))] == []
    assert [path for path in texts if not path.endswith(".py")] == []


def test_folder_texts_are_all_but_binary_empty_hidden_and_cached_files(folder):
    texts = corpus.find_texts(corpus.folder_config(DataSettings(folder)))
    assert {path: file.read_bytes() for path, file in texts.items()} == TEXTS


def test_suffix_chooses_files(folder):
    texts = corpus.find_texts(corpus.folder_config(DataSettings(folder, ".md")))
    assert sorted(texts) == [f"notes/{i:02}.md" for i in range(12)]


def test_excluded_directories_are_passed_over_at_every_depth_but_files_of_that_name_are_not(tmp_path):
    kept = {"a.txt": b"a", "b.txt": b"b", "deep/skip": b"a file", "skipped/c.txt": b"c"}
    write_files(tmp_path, {**kept, "skip/d.txt": b"d", "deep/skip2/skip/e.txt": b"e"})
    config = corpus.TextFolderConfig(name="some", folder=str(tmp_path), excluded=("skip",))
    assert sorted(corpus.find_texts(config)) == sorted(kept)


def test_configs_of_different_text_have_different_names_in_the_data_directory():
    configs = [
        corpus.folder_config(DataSettings(*arguments)) for arguments in [("/a",), ("/b",), ("/a", ".py"), ("/a", ".md")]
    ]
    assert len({config.name for config in configs}) == 4
    assert corpus.folder_config(DataSettings("/a", ".py")).name == configs[2].name


FAULTY = {
    "empty folder": ({}, "holds 0 text files; the splits train, search, evaluation, test need one each"),
    "only binary": ({str(i): b"\0" for i in range(5)}, "holds 0 text files and 5 binary ones;"),
    "only empty and hidden": ({"a": b"", ".b": b"b", ".c/d": b"d"}, "holds 0 text files;"),
    "two files": ({"a": b"a", "b": b"b"}, "holds 2 text files;"),
    "two files, one binary": ({"a": b"a", "b": b"b", "c": b"\0"}, "holds 2 text files and 1 binary ones;"),
}


@pytest.mark.parametrize(("files", "message"), FAULTY.values(), ids=FAULTY)
def test_a_folder_with_too_few_texts_is_an_error(files, message, tmp_path):
    folder = write_files(tmp_path / "texts", files)
    (tmp_path / "texts").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=re.escape(f"data folder {folder!r} {message}")):
        corpus.build(corpus.folder_config(DataSettings(folder)), tmp_path / "data")


def test_too_few_files_of_a_suffix_is_an_error_that_names_it(folder):
    with pytest.raises(ValueError, match=re.escape("holds 0 text files ending in '.rst'")):
        corpus.find_texts(corpus.folder_config(DataSettings(folder, ".rst")))


@pytest.mark.parametrize("name", ["nowhere", "file.txt"])
def test_a_missing_folder_or_a_file_in_its_place_is_an_error(name, tmp_path):
    (tmp_path / "file.txt").write_text("text")
    missing = str(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(f"data folder {missing!r} is not a directory")):
        corpus.build(corpus.folder_config(DataSettings(missing)), tmp_path / "data")


def test_a_failed_build_is_not_taken_for_a_dataset(tmp_path):
    files = {"a": b"a", "b": b"b", "c": b"c", "d": b"d"}
    config = corpus.folder_config(DataSettings(write_files(tmp_path / "texts", {"a": b"a", "b": b"b"})))
    with pytest.raises(ValueError, match="holds 2 text files"):
        corpus.build(config, tmp_path / "data")
    write_files(tmp_path / "texts", files)
    splits = read_splits(corpus.build(config, tmp_path / "data"))
    assert sorted(document.name for split in splits.values() for document in split) == sorted(files)


# --- splits --------------------------------------------------------------------------------------------------------


def make_paths(count):
    return [f"package{i % 7}/module {i}.py" for i in range(count)]


@pytest.mark.parametrize("count", [4, 5, 6, 7, 10, 33, 100, 1000])
def test_every_file_is_in_exactly_one_split_and_no_split_is_empty(count):
    splits = corpus.split_by_file(make_paths(count))
    assert list(splits) == ["train", "search", "evaluation", "test"]
    assert sorted(path for paths in splits.values() for path in paths) == sorted(make_paths(count))
    assert min(len(paths) for paths in splits.values()) >= 1


@pytest.mark.parametrize("count", [100, 1000])
def test_splits_have_their_shares(count):
    sizes = {name: len(paths) for name, paths in corpus.split_by_file(make_paths(count)).items()}
    assert sizes == {"train": 0.7 * count, "search": 0.1 * count, "evaluation": 0.1 * count, "test": 0.1 * count}


def test_splits_do_not_depend_on_the_order_in_which_files_are_found():
    paths = make_paths(50)
    shuffled = random.Random(0).sample(paths, len(paths))
    assert corpus.split_by_file(shuffled) == corpus.split_by_file(paths)


def test_splits_are_the_same_in_every_process_and_version():
    """Written down, because a checkpoint has been trained on one of them."""
    assert corpus.split_by_file([f"file {i}.txt" for i in range(10)]) == {
        "train": [f"file {i}.txt" for i in (8, 6, 0, 4, 3, 1, 7)],
        "search": ["file 2.txt"],
        "evaluation": ["file 9.txt"],
        "test": ["file 5.txt"],
    }


def test_splits_mix_files_of_one_directory():
    splits = corpus.split_by_file(make_paths(700))
    assert {name: len({path.split("/")[0] for path in paths}) for name, paths in splits.items()} == dict.fromkeys(
        splits, 7
    )


@pytest.mark.parametrize("count", [50, 203])
def test_one_more_file_moves_at_most_the_files_next_to_the_cuts(count):
    def where(paths):
        return {path: name for name, members in corpus.split_by_file(paths).items() for path in members}

    paths = make_paths(count)
    before = where(paths)
    moved = []
    for i in range(40):
        after = where([*paths, f"new/{i}.py"])
        moved.append(sum(after[path] != before[path] for path in paths))
    # Each of the three cuts may shift by the new file itself and by the rounding of the shares.
    assert max(moved) <= 5


# --- the built dataset ---------------------------------------------------------------------------------------------


def test_documents_are_the_files_byte_for_byte(builder):
    documents = [document for split in read_splits(builder).values() for document in split]
    assert sorted(document.name for document in documents) == sorted(TEXTS)
    for document in documents:
        data = TEXTS[document.name]
        assert document.size == len(data)
        assert document.tokens.dtype == np.uint16
        assert document.tokens.tolist() == [ByteTokenizer.bos, *data, ByteTokenizer.eos]


def test_documents_are_split_as_the_metadata_says(builder):
    names = {split: sorted(d.name for d in documents) for split, documents in read_splits(builder).items()}
    recorded = builder.info.metadata["files"]
    assert names == {split: sorted(paths) for split, paths in recorded.items()}
    assert recorded == corpus.split_by_file(sorted(TEXTS))


def test_metadata_names_the_folder(builder, folder):
    assert builder.info.metadata["folder"] == folder


def test_another_build_has_the_documents_in_the_same_order(builder, folder, tmp_path):
    again = read_splits(corpus.build(corpus.folder_config(DataSettings(folder)), tmp_path))
    names = {split: [d.name for d in documents] for split, documents in read_splits(builder).items()}
    assert {split: [d.name for d in documents] for split, documents in again.items()} == names


def test_second_build_does_not_look_at_the_folder_again(tmp_path):
    config = corpus.folder_config(DataSettings(write_files(tmp_path / "texts", TEXTS)))
    first = corpus.build(config, tmp_path / "data")
    shutil.rmtree(tmp_path / "texts")
    second = corpus.build(corpus.folder_config(DataSettings(config.folder)), tmp_path / "data")
    assert second.info.metadata["files"] == first.info.metadata["files"]
    for split, documents in read_splits(first).items():
        found = read_splits(second)[split]
        assert [(d.name, d.tokens.tobytes()) for d in found] == [(d.name, d.tokens.tobytes()) for d in documents]


BUILD_AND_READ = """
import importlib.util, sys
from longrope_jax.data import batches, corpus, sources

folder, data_dir = sys.argv[1:]
assert importlib.util.find_spec("tensorflow") is not None  # it is there to be imported
documents = sources.read_documents(corpus.DataSettings(folder), data_dir)
next(batches.pretraining_batches(documents["train"], length=4, batch=2, seed=0))
print("documents:", sum(map(len, documents.values())))
print("tensorflow:", "tensorflow" in sys.modules)
"""


def test_building_and_reading_never_import_tensorflow(folder, tmp_path):
    stub = write_files(tmp_path / "stub", {"tensorflow/__init__.py": b"# importable, wherever it is not installed\n"})
    child = subprocess.run(
        [sys.executable, "-c", BUILD_AND_READ, folder, str(tmp_path / "data")],
        env={**os.environ, "PYTHONPATH": stub},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-2:] == [f"documents: {len(TEXTS)}", "tensorflow: False"]
