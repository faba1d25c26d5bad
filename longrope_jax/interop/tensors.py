"""Reads tensors of a Hugging Face folder in parts."""

import re

import numpy as np
from etils import epath
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from longrope_jax import json_files
from longrope_jax.errors import beginning, shortened
from longrope_jax.files import cached_copy

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BUFFER = "rotary_emb.inv_freq"  # in old files; it is computed, not learned
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INDEX = "model.safetensors.index.json"


class FolderTensors:
    """The .safetensors files of a Hugging Face folder (local copies if it is remote), memory-mapped: only the requested
    parts are read.
    """

    def __init__(self, folder: epath.Path):
        index = _read_index(folder)
        files = sorted(folder.glob("*.safetensors") if index is None else {folder / name for name in index.values()})
        if not files:
            pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
            also = f", only pickled weights ({', '.join(pickles)}), which can run code and are not read" * bool(pickles)
            raise ValueError(f"{folder} holds no .safetensors file{also}")
        self._handles = {file: _open(file) for file in files}
        self._files: dict[str, epath.Path] = {}
        for file, opened in self._handles.items():
            for name in opened.keys():  # noqa: SIM118
                if index is None and name in self._files:
                    raise ValueError(
                        f"{beginning(name)} is in {self._files[name].name} and in {file.name}, and there is no {_INDEX}"
                    )
                if index is None or index.get(name) == file.name:
                    self._files[name] = file
        if absent := sorted((index or {}).keys() - self._files.keys()):
            raise ValueError(
                f"{folder / _INDEX}: {len(absent)} tensors are not in the files it names, first {shortened(absent[0])}"
            )

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of every tensor but buffers; other dtypes than floats of 16 or 32 bits as stored."""
        found = {}
        for name, file in self._files.items():
            part = self._handles[file].get_slice(name)
            if not name.endswith(_BUFFER):
                found[name] = tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype())
        return found

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Float[np.ndarray, "..."]:
        """The part of a tensor in the slices, one per axis (by default all)."""
        part = self._handles[self._files[name]].get_slice(name)
        return part[tuple(slices) or (slice(None),) * len(part.get_shape())]


def _read_index(folder: epath.Path) -> dict[str, str] | None:
    """Name of a tensor -> name of its file; None if the folder has no index."""
    index = folder / _INDEX
    if not index.exists():
        return None
    try:
        files = json_files.read_object(index, {"weight_map": {str: str}})["weight_map"]
    except ValueError as error:
        raise ValueError(f"{error}: not an index of safetensors") from None
    listed = sorted(set(files.values()))
    if wrong := [name for name in listed if not re.fullmatch(r"[^/\0]+\.safetensors", name)]:
        raise ValueError(f"{index} may only name .safetensors files of its folder, not {beginning(wrong)}")
    if missing := [name for name in listed if not (folder / name).exists()]:
        raise ValueError(f"{folder} lacks {beginning(', '.join(missing))}, which its index names")
    return files


def _open(file: epath.Path):
    try:
        return safe_open(str(cached_copy(file)), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no sound safetensors file: {beginning(error)}") from None
