"""Tokens in files, read where they are sliced: documents of any number and length cost no memory.

A folder holds for every split shards, `<split>-00000-of-00002.array_record`, and one index, `<split>.json`. A document
is one record after the other of as many tokens each, the last one shorter, as little-endian integers.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, overload

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from jaxtyping import UInt

from longrope_jax import json_files
from longrope_jax.data.corpus import Document
from longrope_jax.data.files import local_copy
from longrope_jax.messages import beginning

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
