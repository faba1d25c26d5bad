"""Tokens in files, read where they are sliced: documents of any number and length cost no memory.

A folder holds for every split shards, `<split>-00000-of-00002.array_record`, and one index, `<split>.json`. A document
is one record after the other of as many tokens each, the last one shorter, as little-endian integers.
"""

import contextlib
import json
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, overload

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from jaxtyping import UInt
from tqdm import tqdm

from longrope_jax import json_files
from longrope_jax.data.corpus import Document
from longrope_jax.data.sources import Texts
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.errors import beginning
from longrope_jax.files import digest, local_copy, new_file, write_whole

SHARD = {"file": str, "bytes": int, "sha256": str, "names": [str], "tokens": [int], "sizes": [int]}
"""What is noted of a shard: its file's name, size and digest, and of every document name, tokens and bytes of text."""

_INDEX = {"dtype": str, "record": int, "shards": [SHARD]}
_TYPES = ("<u2", "<u4")


def read_index(folder: epath.Path, split: str) -> dict[str, Any]:
    """What `<split>.json` says; raises ValueError where it is no sound index."""
    path = folder / f"{split}.json"
    index = json_files.read_object(path, _INDEX)
    try:
        if index["dtype"] not in _TYPES:
            raise ValueError(f"dtype = {index['dtype']!r} must be one of {', '.join(_TYPES)}")
        if not 0 < index["record"] < 2**31:
            raise ValueError(f"record = {index['record']} must be a positive number of tokens")
        for shard in index["shards"]:
            _check_shard(shard)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {beginning(error)}; without its folder the same command makes it again"
        ) from None
    return index


def _check_shard(shard: dict[str, Any]) -> None:
    file = shard["file"]
    if not file.endswith(".array_record") or PurePosixPath(file).name != file or "\0" in file:
        raise ValueError(f"file = {file!r} must be the name of an array_record file in the same folder")
    if not len(shard["names"]) == len(shard["tokens"]) == len(shard["sizes"]):
        raise ValueError(f"names, tokens and sizes of {file} must be equally many")
    if not all(0 <= number < 2**48 for number in [shard["bytes"], *shard["tokens"], *shard["sizes"]]):
        raise ValueError(f"bytes, tokens and sizes of {file} must be numbers from 0 on")


def token_type(vocab_size: int) -> np.dtype:
    """The smaller of two types that hold every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Shard:
    """A file of records, opened when one is asked for. Threads may share it."""

    def __init__(self, file: epath.Path, size: int, sha256: str, dtype: np.dtype, record: int):
        """Args: the file, its bytes and their digest, the type of its tokens and how many of them are a record."""
        self.dtype, self.record = dtype, record
        self._file, self._size, self._sha256 = file, size, sha256
        self._reader: ArrayRecordReader | None = None
        self._lock = threading.Lock()

    def records(self, first: int, stop: int) -> UInt[np.ndarray, "tokens"]:
        """The tokens of records first..stop-1, one after the other; raises OSError where the file is damaged."""
        with self._lock:
            if self._reader is None:
                path = local_copy(self._file, self._size, self._sha256)
                self._reader = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
            reader = self._reader
        try:
            found = b"".join(reader.read(first, stop))
        except (RuntimeError, IndexError) as error:  # records have hashes; there may be fewer of them
            raise self.damaged(error) from None
        if len(found) % self.dtype.itemsize:
            raise self.damaged(f"{len(found)} bytes are no whole number of tokens")
        return np.frombuffer(found, self.dtype)

    def damaged(self, why: Any) -> OSError:
        """What to raise where the file is not what was written."""
        return OSError(
            f"{self._file} is damaged; without {self._file.parent} the same command makes its tokens again: {why}"
        )


class StoredTokens:
    """The tokens of one document. `tokens[3:7]` reads the records that it touches, `np.asarray` all of them."""

    def __init__(self, shard: Shard, first: int, length: int):
        """Args: the shard, the first of the document's records in it, its number of tokens."""
        self._shard, self._first, self._length = shard, first, length

    @property
    def dtype(self) -> np.dtype:
        """That of the ids."""
        return self._shard.dtype

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, where: int) -> np.integer: ...
    @overload
    def __getitem__(self, where: slice) -> UInt[np.ndarray, "tokens"]: ...
    def __getitem__(self, where):
        if not isinstance(where, slice):
            index = range(self._length)[where]  # which counts from the end too, and knows what is out of range
            return self[index : index + 1][0]
        start, stop, step = where.indices(self._length)
        if step != 1:
            return np.asarray(self)[where]
        if stop <= start:
            return np.zeros(0, self.dtype)
        size = self._shard.record
        first = start // size
        records = self._shard.records(self._first + first, self._first + -(-stop // size))
        found = records[start - first * size : stop - first * size]
        if len(found) < stop - start:
            raise self._shard.damaged(f"{stop - start - len(found)} of {stop - start} tokens are missing")
        return found

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class StoredDocuments(Sequence[Document]):
    """The documents of a split, made when they are asked for; names, lengths and sizes are in memory."""

    def __init__(self, folder: epath.Path, split: str):
        """Reads the index of a split that is finished; raises ValueError where it is damaged."""
        index = read_index(folder, split)
        dtype, record, shards = np.dtype(index["dtype"]), index["record"], index["shards"]
        self._shards = [Shard(folder / s["file"], s["bytes"], s["sha256"], dtype, record) for s in shards]
        self._names = _distinct([name for shard in shards for name in shard["names"]])
        self._lengths = _joined([shard["tokens"] for shard in shards])
        self._sizes = _joined([shard["sizes"] for shard in shards])
        self._ends = np.cumsum([len(shard["names"]) for shard in shards])
        records = [np.cumsum([0, *(-(-np.asarray(shard["tokens"], int) // record))])[:-1] for shard in shards]
        self._first_records = _joined(records)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        shard = self._shards[int(np.searchsorted(self._ends, index, side="right"))]
        tokens: Any = StoredTokens(shard, int(self._first_records[index]), int(self._lengths[index]))
        return Document(self._names[index], tokens, int(self._sizes[index]))

    def __repr__(self) -> str:
        return f"<{len(self)} stored documents>"


def _joined(parts: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(part, np.int64) for part in parts)])


def _distinct(names: list[str]) -> list[str]:
    """The same names; one that occurs again gets a number: windows of one name count as one document's."""
    seen: Counter[str] = Counter()
    made = []
    for name in names:
        seen[name] += 1
        made.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return made


RECORD = 16384  # tokens: what is read to get at any one of them
_SHARD_BYTES = 1 << 26  # of text: a minute or two of a tokenizer's time
_THREADS = os.cpu_count() or 1


def is_finished(folder: epath.Path, split: str) -> bool:
    """Whether all tokens of a split are there."""
    if not (folder / f"{split}.json").exists():
        return False
    there = {path.name for path in folder.iterdir()}
    return {shard["file"] for shard in read_index(folder, split)["shards"]} <= there


def write_shards(
    folder: epath.Path, split: str, texts: Texts, tokenizer: Tokenizer, process: tuple[int, int] = (0, 1)
) -> None:
    """Writes those shards of a split that this process is to write and that are not there yet.

    Args:
        folder: of the tokens; all processes have to see the same files in it.
        process: (index, count).

    Raises:
        OSError: names the shard that can't be written.
    """
    index, count = process
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(enumerate(_shards(split, texts)))[index::count]
    missing = [(number, name) for number, name in shards if not _is_written(folder, name)]
    spans = {name: _span(number, len(_shards(split, texts)), len(texts)) for number, name in missing}
    total = sum(stop - start for start, stop in spans.values())
    with tqdm(
        total=total, desc=f"tokens for {split}", unit="document", dynamic_ncols=True, disable=index > 0 or not total
    ) as bar:
        for name, (start, stop) in spans.items():
            _write(folder / name, texts.read(start, stop), tokenizer, bar)


def finish(folder: epath.Path, split: str, texts: Texts, tokenizer: Tokenizer, about: dict[str, Any]) -> None:
    """Says that all is there, once every process has written its shards; one process does it.

    Args:
        about: what is noted beside it, JSON-able.
    """
    notes = [_note(folder, name) for name in _shards(split, texts)]
    shards = [json_files.read_object(note, SHARD) for note in notes]
    totals = {
        "documents": sum(len(shard["names"]) for shard in shards),
        "tokens": sum(sum(shard["tokens"]) for shard in shards),
        "text_bytes": sum(sum(shard["sizes"]) for shard in shards),
    }
    form = {"tokenizer": tokenizer.fingerprint, "dtype": token_type(tokenizer.vocab_size).str, "record": RECORD}
    _write_json(folder / f"{split}.json", {**about, **form, **totals, "shards": shards})
    for note in notes:
        note.unlink()


def _shards(split: str, texts: Texts) -> list[str]:
    count = min(len(texts), max(1, -(-texts.size // _SHARD_BYTES)))
    return [f"{split}-{number:05d}-of-{count:05d}.array_record" for number in range(count)]


def _span(number: int, count: int, documents: int) -> tuple[int, int]:
    return number * documents // count, (number + 1) * documents // count


def _note(folder: epath.Path, name: str) -> epath.Path:
    return folder / f"{name}.json"


def _is_written(folder: epath.Path, name: str) -> bool:
    return _note(folder, name).exists() and (folder / name).exists()


def _write(file: epath.Path, documents: Iterator[tuple[str, bytes]], tokenizer: Tokenizer, bar: tqdm) -> None:
    dtype = token_type(tokenizer.vocab_size)
    note = {"file": file.name, "names": [], "tokens": [], "sizes": []}
    with new_file(file) as local:
        with _telling(file):
            # Every record by itself, so that it is read by itself; tokens hardly shrink, and would be read more slowly.
            writer = ArrayRecordWriter(local, "group_size:1,uncompressed")
        for name, tokens, size in _encoded(documents, tokenizer):
            with _telling(file):
                for start in range(0, len(tokens), RECORD):
                    writer.write(tokens[start : start + RECORD].astype(dtype).tobytes())
            note["names"].append(name)
            note["tokens"].append(len(tokens))
            note["sizes"].append(size)
            bar.update()
        with _telling(file):
            writer.close()
        note |= {"bytes": os.path.getsize(local), "sha256": digest(local)}
    _write_json(_note(file.parent, file.name), note)


@contextlib.contextmanager
def _telling(file: epath.Path) -> Iterator[None]:
    """What array_record's writer has to say, as of a full disk, becomes an OSError that names the file."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{file} can't be written: {error}") from None


def _encoded(documents: Iterator[tuple[str, bytes]], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray, int]]:
    """(name, tokens, bytes of text), in order; a few documents at a time, as tokenizers leave Python's lock alone."""
    waiting: deque[tuple[str, Future, int]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, text in documents:
            waiting.append((name, pool.submit(tokenizer.encode, text), len(text)))
            if len(waiting) > 2 * _THREADS:
                first, tokens, size = waiting.popleft()
                yield first, tokens.result(), size
        for first, tokens, size in waiting:
            yield first, tokens.result(), size


def _write_json(file: epath.Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content).encode())
