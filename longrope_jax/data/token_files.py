"""Tokens in files: written once, and read only where they are sliced, so that documents of any size need no memory.

A folder holds the shards of every split, `<split>-00000-of-00002.array_record`, and one index, `<split>.json`. A
document is a run of records. Each record has the same number of tokens, except the last one, as little-endian integers.
"""

import json
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from jaxtyping import UInt
from tqdm import tqdm

from longrope_jax import json_files
from longrope_jax.data.corpus import Document, writing
from longrope_jax.data.sources import Texts
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.errors import beginning
from longrope_jax.files import digest, local_copy, new_file, write_whole

RECORD = 16384  # tokens of a record: the smallest part that can be read
SHARD = {"file": str, "bytes": int, "sha256": str, "names": [str], "tokens": [int], "sizes": [int]}
"""The metadata of a shard: name, size and digest of its file; and of every document the name, tokens and text bytes."""

_INDEX = {"dtype": str, "record": int, "shards": [SHARD]}
_DTYPES = ("<u2", "<u4")
_SHARD_BYTES = 1 << 26  # of text; a tokenizer needs a minute or two for it
_THREADS = os.cpu_count() or 1


def read_index(folder: epath.Path, split: str) -> dict[str, Any]:
    """The content of `<split>.json`; raises ValueError if it is damaged."""
    path = folder / f"{split}.json"
    index = json_files.read_object(path, _INDEX)
    try:
        if index["dtype"] not in _DTYPES:
            raise ValueError(f"dtype = {index['dtype']!r} must be one of {', '.join(_DTYPES)}")
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
    """The smaller of the two integer types that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of records; it is opened at the first read. Threads may share it.

    Attributes:
        file: the array_record file.
        size: its bytes.
        sha256: their digest, in hex.
        dtype: of the tokens.
        record: tokens of a record.
    """

    file: epath.Path
    size: int
    sha256: str
    dtype: np.dtype
    record: int
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @cached_property
    def _reader(self) -> ArrayRecordReader:
        path = local_copy(self.file, self.size, self.sha256)
        return ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)

    def records(self, first: int, stop: int) -> UInt[np.ndarray, "tokens"]:
        """The tokens of records first..stop-1; raises OSError if the file is damaged."""
        with self._lock:  # one thread copies a remote file
            reader = self._reader
        try:
            data = b"".join(reader.read(first, stop))
        except (RuntimeError, IndexError) as error:  # a hash does not match, or records are missing
            raise self.damaged(error) from None
        if len(data) % self.dtype.itemsize:
            raise self.damaged(f"{len(data)} bytes are no whole number of tokens")
        return np.frombuffer(data, self.dtype)

    def damaged(self, reason: Any) -> OSError:
        """The error to raise if the file is damaged."""
        return OSError(
            f"{self.file} is damaged; without {self.file.parent} the same command makes its tokens again: {reason}"
        )


class StoredTokens:
    """The tokens of one document. `tokens[3:7]` reads only the records it needs, `np.asarray(tokens)` reads all."""

    def __init__(self, shard: Shard, first: int, length: int):
        """Args: the shard, the document's first record in it, the document's number of tokens."""
        self._shard, self._first, self._length = shard, first, length

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids."""
        return self._shard.dtype

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: int | slice) -> Any:
        if not isinstance(where, slice):
            index = range(self._length)[where]  # handles negative indices and raises IndexError
            return self[index : index + 1][0]
        start, stop, step = where.indices(self._length)
        if step != 1:
            return np.asarray(self)[where]
        if stop <= start:
            return np.zeros(0, self.dtype)
        size = self._shard.record
        first = start // size
        records = self._shard.records(self._first + first, self._first + -(-stop // size))
        tokens = records[start - first * size : stop - first * size]
        if len(tokens) < stop - start:
            raise self._shard.damaged(f"{stop - start - len(tokens)} of {stop - start} tokens are missing")
        return tokens

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def stored_documents(folder: epath.Path, split: str) -> list[Document]:
    """The documents of a finished split, whose tokens stay in the files; raises ValueError if its index is damaged.

    Repeated names get a number, because windows of one name count as one document's.
    """
    index = read_index(folder, split)
    dtype, record = np.dtype(index["dtype"]), index["record"]
    documents: list[Document] = []
    seen: Counter[str] = Counter()
    for entry in index["shards"]:
        shard, first = Shard(folder / entry["file"], entry["bytes"], entry["sha256"], dtype, record), 0
        for name, length, size in zip(entry["names"], entry["tokens"], entry["sizes"], strict=True):
            seen[name] += 1
            unique = name if seen[name] == 1 else f"{name} ({seen[name]})"
            tokens: Any = StoredTokens(shard, first, length)
            documents.append(Document(unique, tokens, size))
            first += -(-length // record)
    return documents


def is_finished(folder: epath.Path, split: str) -> bool:
    """Whether all tokens of a split are written."""
    if not (folder / f"{split}.json").exists():
        return False
    files = {path.name for path in folder.iterdir()}
    return {shard["file"] for shard in read_index(folder, split)["shards"]} <= files


def write_shards(
    folder: epath.Path, split: str, texts: Texts, tokenizer: Tokenizer, process: tuple[int, int] = (0, 1)
) -> None:
    """Writes this process's shards of a split, except those that exist already.

    Args:
        folder: of the tokens; all processes have to see the same files in it.
        process: (index, count).

    Raises:
        OSError: names the shard that can't be written.
    """
    index, count = process
    folder.mkdir(parents=True, exist_ok=True)
    missing = [
        (folder / name, start, stop)
        for name, start, stop in _shards(split, texts)[index::count]
        if not (_metadata_file(folder, name).exists() and (folder / name).exists())
    ]
    total = sum(stop - start for _, start, stop in missing)
    with tqdm(
        total=total, desc=f"tokens for {split}", unit="document", dynamic_ncols=True, disable=index > 0 or not total
    ) as bar:
        for file, start, stop in missing:
            _write(file, texts.read(start, stop), tokenizer, bar)


def finish(folder: epath.Path, split: str, texts: Texts, tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Writes the index of a split. One process calls it, after every process has written its shards.

    Args:
        metadata: is added to the index, JSON-able.
    """
    files = [_metadata_file(folder, name) for name, *_ in _shards(split, texts)]
    shards = [json_files.read_object(file, SHARD) for file in files]
    index = {
        **metadata,
        "tokenizer": tokenizer.fingerprint,
        "dtype": token_type(tokenizer.vocab_size).str,
        "record": RECORD,
        "documents": sum(len(shard["names"]) for shard in shards),
        "tokens": sum(sum(shard["tokens"]) for shard in shards),
        "text_bytes": sum(sum(shard["sizes"]) for shard in shards),
        "shards": shards,
    }
    write_whole(folder / f"{split}.json", json.dumps(index).encode())
    for file in files:
        file.unlink()


def _shards(split: str, texts: Texts) -> list[tuple[str, int, int]]:
    """File name, first document and end of every shard."""
    count = min(len(texts), max(1, -(-texts.size // _SHARD_BYTES)))
    return [
        (f"{split}-{n:05d}-of-{count:05d}.array_record", n * len(texts) // count, (n + 1) * len(texts) // count)
        for n in range(count)
    ]


def _metadata_file(folder: epath.Path, shard: str) -> epath.Path:
    """Where a finished shard's metadata are until the index is written."""
    return folder / f"{shard}.json"


def _write(file: epath.Path, documents: Iterator[tuple[str, bytes]], tokenizer: Tokenizer, bar: tqdm) -> None:
    dtype = token_type(tokenizer.vocab_size)
    shard = {"file": file.name, "names": [], "tokens": [], "sizes": []}
    with new_file(file) as local, writing(file):
        # One record per group, so that each can be read alone. Compression would save little and cost reading time.
        writer = ArrayRecordWriter(local, "group_size:1,uncompressed")
        for name, tokens, size in _encoded(documents, tokenizer):
            for start in range(0, len(tokens), RECORD):
                writer.write(tokens[start : start + RECORD].astype(dtype).tobytes())
            shard["names"].append(name)
            shard["tokens"].append(len(tokens))
            shard["sizes"].append(size)
            bar.update()
        writer.close()
        shard |= {"bytes": os.path.getsize(local), "sha256": digest(local)}
    write_whole(_metadata_file(file.parent, file.name), json.dumps(shard).encode())


def _encoded(documents: Iterator[tuple[str, bytes]], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray, int]]:
    """(name, tokens, bytes of text), in order. Threads encode a few documents at a time: tokenizers release the GIL."""
    waiting: deque[tuple[str, Future, int]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, text in documents:
            waiting.append((name, pool.submit(tokenizer.encode, text), len(text)))
            if len(waiting) > 2 * _THREADS:
                first, tokens, size = waiting.popleft()
                yield first, tokens.result(), size
        for first, tokens, size in waiting:
            yield first, tokens.result(), size
