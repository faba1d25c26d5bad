"""Texts -> tokens in files, once: by any number of processes, and wherever they were stopped it goes on.

Which documents make which shard depends on the text alone; process i of n writes the shards i, i + n, ... Each becomes
visible whole, and after it `<shard>.json`, which says what is in it; a stopped process loses the shard at hand. When
all are there, `<split>.json` takes the place of those.
"""

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tqdm import tqdm

from longrope_jax import json_files
from longrope_jax.data.files import digest, new_file
from longrope_jax.data.sources import Texts
from longrope_jax.data.stored import SHARD, read_index, token_type
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.whole_files import write_whole

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
    form = {"tokenizer": tokenizer.identity, "dtype": token_type(tokenizer.vocab_size).str, "record": RECORD}
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
