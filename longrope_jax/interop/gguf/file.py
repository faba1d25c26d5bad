"""Reads the header of a GGUF file: its metadata, and the positions of its tensors.

`gguf.GGUFReader` is not used, because it trusts every length in the file (a damaged one keeps it busy for hours, or
until memory runs out), and needs 9.2 s for Llama 3's vocabulary and merges where this reader needs 0.5 s. The layout is
that of the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from jaxtyping import UInt8

from longrope_jax.errors import beginning, shortened

_VERSIONS = (2, 3)
_NUMBERS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
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
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file on a local disk")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file: it does not begin with the letters GGUF")
    try:
        return _read(np.memmap(path, mode="r"))
    except RecursionError:
        raise ValueError(f"{path}: damaged: lists in lists in the header, too deep to read") from None
    except ValueError as error:
        raise ValueError(f"{path}: {beginning(error)}") from None


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

    def numbers(self, code: str, count: int = 1) -> tuple:
        form = f"<{count}{code}"
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form[:1] + code) * count))

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def string(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        try:
            return str(self.data[start : start + size], "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"damaged: the text at byte {start} of the header is no UTF-8") from None

    def value(self, kind: int) -> Any:
        """A value of metadata: a number, a string, or a list."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != GGUFValueType.ARRAY:
            raise ValueError(f"damaged: {kind} at byte {self.at} of the header is no type of a value")
        item, count = self.number("I"), self.number("Q")
        if count > _MAX_LIST:
            raise ValueError(f"damaged: a list of {count} values before byte {self.at} of the header")
        if item in _NUMBERS:
            return list(self.numbers(_NUMBERS[item], count))
        return [self.value(item) for _ in range(count)]


def _read(mapped: np.ndarray) -> GgufFile:
    data = np.asarray(mapped)  # its slices are several times as fast as those of np.memmap
    cursor = _Cursor(data.data, at=4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        # The version is a small number; in the wrong byte order its lower half is 0.
        why = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
        raise ValueError(f"this GGUF file is {why}; little-endian files of versions {_VERSIONS} are read")
    tensor_count, metadata_count = cursor.numbers("Q", 2)
    metadata = _unique("the key", ((cursor.string(), cursor.value(cursor.number("I"))) for _ in range(metadata_count)))
    if metadata.get("split.count", 1) != 1:
        raise ValueError(
            f"one of {shortened(metadata['split.count'])} parts of a model; join them first (llama-gguf-split --merge)"
        )
    described = _unique("the tensor", _describe_tensors(cursor, tensor_count))
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment = {shortened(alignment)} must be a positive number of bytes")
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
        name, axes = cursor.string(), cursor.number("I")
        if axes > _MAX_AXES:
            raise ValueError(f"damaged: tensor {name!r} has {axes} axes, {_MAX_AXES} at most are possible")
        yield name, (cursor.numbers("Q", axes)[::-1], cursor.number("I"), cursor.number("Q"))


def _map(data: np.ndarray, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    if 0 in shape:
        raise ValueError(f"damaged: tensor {name!r} has shape {shape}")
    if kind not in set(GGMLQuantizationType):
        raise ValueError(f"tensor {name!r} is of type {kind}, which the installed gguf package does not know")
    kind = GGMLQuantizationType(kind)
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
