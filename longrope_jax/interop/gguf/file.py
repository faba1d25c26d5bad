"""Reads the header of a GGUF file: its metadata, and the positions of its tensors.

`gguf.GGUFReader` is not used, because it trusts every length in the file (a damaged one keeps it busy for hours, or
until memory runs out), and needs 9.2 s for Llama 3's vocabulary and merges where this reader needs 0.5 s. The layout is
that of the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from jaxtyping import UInt8

from longrope_jax.errors import naming
from longrope_jax.json_files import SIZE, field, problems
from longrope_jax.settings import Rule

_VERSIONS = (2, 3)
_UINT32, _UINT64 = np.dtype("<u4"), np.dtype("<u8")
_NUMBERS: dict[int, np.dtype] = {
    kind: np.dtype(kind.name.lower()).newbyteorder("<")
    for kind in GGUFValueType
    if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY)
}
_ONE_FILE = Rule(lambda count: count in (None, 1), "parts of a model; join them first (llama-gguf-split --merge)")
# ggml has tensors of at most four axes. The longest lists are a tokenizer's, well below a million strings.
_MAX_AXES = 4
_MAX_LIST = 2**24


class StoredTensor(NamedTuple):
    """One tensor of the file.

    Attributes:
        shape: the last axis is contiguous.
        type: of its numbers, maybe quantised.
        rows: its bytes, memory-mapped, one row per row of the last axis.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    rows: UInt8[np.ndarray, "rows bytes"]


class GgufFile(NamedTuple):
    """The content of a file.

    Attributes:
        metadata: by key; numbers, strings, lists of them.
        tensors: by their llama.cpp names.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_gguf(path: str | os.PathLike) -> GgufFile:
    """Reads the header of a GGUF file and memory-maps its tensors. Large tensors take no more time than small ones.

    Raises:
        ValueError: names the file and what is wrong with it: not GGUF, truncated, damaged, an unsupported version or
            byte order, or one part of a split file.
    """
    path = Path(path)
    with naming(path):
        if not path.is_file():
            raise ValueError("there is no such file on a local disk")
        # Slices of an array are several times as fast as those of np.memmap.
        return _read(np.asarray(np.memmap(path, mode="r")))


class _Cursor:
    """Reads the header value by value; raises ValueError beyond the end of the file."""

    def __init__(self, data: memoryview, at: int = 0):
        self.data, self.at = data, at

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes and returns where they start."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(
                f"cut off or damaged: byte {start} of the header calls for {size} bytes more, "
                f"but the file has {len(self.data)} in all"
            )
        return start

    def numbers(self, dtype: np.dtype, count: int = 1) -> list:
        return np.frombuffer(self.data, dtype, count, self.skip(dtype.itemsize * count)).tolist()

    def number(self, dtype: np.dtype) -> Any:
        return self.numbers(dtype)[0]

    def string(self) -> str:
        size = self.number(_UINT64)
        start = self.skip(size)
        return str(self.data[start : start + size], "utf-8")

    def value(self, kind: int) -> Any:
        """A value of metadata: a number, a string, or a list."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != GGUFValueType.ARRAY:
            raise ValueError(f"damaged: {kind} at byte {self.at} of the header is no type of a value")
        item, count = self.number(_UINT32), self.number(_UINT64)
        if count > _MAX_LIST:
            raise ValueError(f"damaged: a list of {count} values before byte {self.at} of the header")
        if item in _NUMBERS:
            return self.numbers(_NUMBERS[item], count)
        return [self.value(item) for _ in range(count)]


def _read(data: np.ndarray) -> GgufFile:
    if data[:4].tobytes() != b"GGUF":
        raise ValueError("not a GGUF file: it does not begin with the letters GGUF")
    cursor = _Cursor(data.data, at=4)
    version = cursor.number(_UINT32)
    if version not in _VERSIONS:
        # The version is a small number; in the wrong byte order its lower half is 0.
        why = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
        raise ValueError(f"this GGUF file is {why}; little-endian files of versions {_VERSIONS} are read")
    tensor_count, metadata_count = cursor.numbers(_UINT64, 2)
    pairs = ((cursor.string(), cursor.value(cursor.number(_UINT32))) for _ in range(metadata_count))
    metadata = _unique("the key", pairs)
    if wrong := problems(metadata, {"split.count": _ONE_FILE}):
        raise ValueError(wrong[0])
    described = _unique("the tensor", _describe_tensors(cursor, tensor_count))
    alignment = field(metadata, "general.alignment", SIZE, GGUF_DEFAULT_ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(metadata, {name: _map(data, name, start, *about) for name, about in described.items()})


def _unique(what: str, pairs: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"damaged: {what} {name!r} occurs twice")
        found[name] = value
    return found


def _describe_tensors(cursor: _Cursor, count: int) -> Iterator[tuple[str, tuple[tuple[int, ...], int, int]]]:
    """Name and (shape, type, offset) of every tensor."""
    for _ in range(count):
        name, axes = cursor.string(), cursor.number(_UINT32)
        if axes > _MAX_AXES:
            raise ValueError(f"damaged: tensor {name!r} has {axes} axes, {_MAX_AXES} at most are possible")
        yield name, (tuple(cursor.numbers(_UINT64, axes)[::-1]), cursor.number(_UINT32), cursor.number(_UINT64))


def _map(data: np.ndarray, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    if 0 in shape:
        raise ValueError(f"damaged: tensor {name!r} has shape {shape}")
    kind = GGMLQuantizationType(kind)  # a ValueError if the installed gguf package does not know it
    block, block_bytes = GGML_QUANT_SIZES[kind]
    *leading, width = shape or (1,)
    if width % block:
        raise ValueError(
            f"damaged: rows of {width} in tensor {name!r} are no multiple of the {block} of a {kind.name} block"
        )
    rows, row_bytes = math.prod(leading), width // block * block_bytes
    begin, end = start + offset, start + offset + rows * row_bytes
    if end > len(data):
        raise ValueError(f"cut off or damaged: tensor {name!r} ends at byte {end}, but the file has {len(data)} in all")
    return StoredTensor(shape, kind, data[begin:end].reshape(rows, row_bytes))
