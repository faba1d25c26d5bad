"""Writing tokens: stopped anywhere, by any number of processes, on a file system of any kind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from longrope_jax.data import token_files
from longrope_jax.data.sources import Texts
from longrope_jax.data.token_files import stored_documents
from longrope_jax.data.tokenizer import ByteTokenizer

SIZES = np.random.default_rng(0).integers(1, 400, 23)


def make_texts(sizes=SIZES):
    def fetch(numbers):
        for number in numbers:
            yield f"text {number}", b"%d " % number * sizes[number]

    return Texts(range(len(sizes)), int(sum(sizes)), fetch)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(token_files, "_SHARD_BYTES", 600)
    monkeypatch.setattr(token_files, "RECORD", 100)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_all(folder, texts=None, tokenizer=None, count=1):
    texts = make_texts() if texts is None else texts
    tokenizer = tokenizer or ByteTokenizer()
    for index in range(count):
        token_files.write_shards(epath.Path(folder), "train", texts, tokenizer, (index, count))
    token_files.finish(epath.Path(folder), "train", texts, tokenizer, {"source": {"folder": "here"}})


@pytest.fixture
def whole(tmp_path):
    """What a run that nothing stops leaves."""
    write_all(tmp_path / "whole")
    return contents(tmp_path / "whole")


def test_there_are_shards_and_one_index(whole):
    shards = sorted(name for name in whole if name.endswith(".array_record"))
    assert len(shards) == -(-int(sum(SIZES)) // 600) > 4
    assert shards[3] == f"train-00003-of-{len(shards):05d}.array_record"
    assert set(whole) == {*shards, "train.json"}
    assert json.loads(whole["train.json"])["source"] == {"folder": "here"}


@pytest.mark.parametrize("count", [2, 3, 40])
def test_any_number_of_processes_writes_the_same_files(whole, tmp_path, count):
    write_all(tmp_path / "shared", count=count)
    assert contents(tmp_path / "shared") == whole


def test_processes_share_the_shards(tmp_path):
    folders = [epath.Path(tmp_path / str(index)) for index in range(2)]
    for index, folder in enumerate(folders):
        token_files.write_shards(folder, "train", make_texts(), ByteTokenizer(), (index, 2))
    numbers = [[int(path.name[6:11]) for path in folder.glob("*.array_record")] for folder in folders]
    assert [{number % 2 for number in some} for some in numbers] == [{0}, {1}]


class Stopped(Exception):
    """Stands for whatever ends a process early."""


class Counting(ByteTokenizer):
    """Stops at its k-th text."""

    def __init__(self, stop=None):
        self.texts, self.stop = 0, stop

    def encode(self, text, **kwargs):
        if self.texts == self.stop:
            raise Stopped
        self.texts += 1
        return super().encode(text, **kwargs)


@pytest.mark.parametrize("stop", [0, 1, 7, 15, 22])
def test_stopped_at_any_document_it_goes_on_with_the_shard_at_hand(whole, tmp_path, stop):
    folder = epath.Path(tmp_path / "stopped")
    with pytest.raises(Stopped):
        token_files.write_shards(folder, "train", make_texts(), Counting(stop))
    assert not token_files.is_finished(folder, "train")
    written = [path for path in folder.iterdir() if path.name in whole]
    before = {path.name: path.stat().mtime for path in written}
    tokenizer = Counting()
    write_all(folder, tokenizer=tokenizer)
    assert contents(folder) == whole
    assert {name: (folder / name).stat().mtime for name in before} == before
    count = len(whole) - 1
    assert tokenizer.texts == len(SIZES) - len(before) * len(SIZES) // count
    assert token_files.is_finished(folder, "train")


STUCK = """
import sys, time
sys.path[:0] = sys.argv[2:]
import test_tokens
from longrope_jax.data import token_files

class Stuck(test_tokens.Counting):
    def encode(self, text, **kwargs):
        if self.texts == 12:
            time.sleep(1000)
        return super().encode(text, **kwargs)

token_files._SHARD_BYTES, token_files.RECORD = 600, 100
test_tokens.write_all(sys.argv[1], tokenizer=Stuck())
"""


def test_killed_it_goes_on_and_leaves_the_same_bytes(whole, tmp_path):
    folder, here = tmp_path / "killed", Path(__file__).parent
    line = [sys.executable, "-c", STUCK, str(folder), str(here), str(here.parent)]
    child = subprocess.Popen(line, cwd=here.parents[1])
    while not folder.exists() or len(list(folder.glob("*.array_record.json"))) < 2:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not token_files.is_finished(epath.Path(folder), "train")
    write_all(folder)
    assert contents(folder) == whole


@pytest.mark.parametrize("lost", ["train.json", "train-00001-of-00009.array_record"])
def test_what_is_lost_is_written_again(whole, tmp_path, lost):
    folder = epath.Path(tmp_path / "lost")
    write_all(folder)
    assert token_files.is_finished(folder, "train") and lost in whole
    (folder / lost).unlink()
    assert not token_files.is_finished(folder, "train")
    write_all(folder)
    assert contents(folder) == whole


def test_splits_may_be_empty(tmp_path):
    write_all(tmp_path, Texts([], 0, lambda numbers: iter(())))
    assert len(stored_documents(epath.Path(tmp_path), "train")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_object_stores_are_written_to_and_read_through_a_local_copy(whole, tmp_path, monkeypatch, bucket):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = bucket / "tokens"
    with pytest.raises(Stopped):
        token_files.write_shards(folder, "train", make_texts(), Counting(9))
    write_all(folder)
    assert contents(folder) == whole
    held = [ByteTokenizer().encode(text) for _, text in make_texts().read(0, len(SIZES))]
    for _ in range(2):  # copied, and found again
        documents = stored_documents(folder, "train")
        for mine, other in zip(documents, held, strict=True):
            np.testing.assert_array_equal(mine.tokens[3:250], other[3:250])
        cached = list((tmp_path / "cache" / "longrope_jax").iterdir())
        assert len(cached) == len(whole) - 1
        assert all(path.read_bytes() == whole[path.name.split("-", 1)[1]] for path in cached)
        dates = {path: os.stat(path).st_mtime_ns for path in cached}
    cached[0].write_bytes(b"cut off")
    for document in stored_documents(folder, "train"):
        document.tokens[:1]
    assert cached[0].read_bytes() == whole[cached[0].name.split("-", 1)[1]]
    assert {path: os.stat(path).st_mtime_ns for path in cached[1:]} == {path: dates[path] for path in cached[1:]}


def test_other_tokens_at_the_same_address_are_not_mistaken_for_those_in_the_cache(tmp_path, monkeypatch, bucket):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = bucket / "tokens"
    for word in (b"one", b"two"):
        texts = Texts([0], 3, lambda numbers, word=word: iter([("text", word)]))
        write_all(folder, texts)
        assert stored_documents(folder, "train")[0].tokens[1:4].tolist() == list(word)
        (folder / "train.json").unlink()
    write_all(folder, texts)
    (shard,) = folder.glob("*.array_record")
    shard.write_bytes(b"x" * shard.stat().length)
    for file in (tmp_path / "cache" / "longrope_jax").iterdir():
        file.unlink()
    for _ in range(2):
        with pytest.raises(OSError, match="array_record is not what was written there: it is damaged"):
            stored_documents(folder, "train")[0].tokens[:1]
