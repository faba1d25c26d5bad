"""Pretrained models: a Hugging Face folder or a GGUF file -> config, parameters, tokenizer and factors by length."""

import math
import mmap
from collections.abc import Iterator
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from longrope_jax import json_files
from longrope_jax.data.tokenizer import SubwordTokenizer
from longrope_jax.errors import beginning, naming
from longrope_jax.files import cached_copy
from longrope_jax.interop.architectures import EMBEDDING, HEAD, CheckpointTensor, checkpoint_tensors, parse_config
from longrope_jax.interop.gguf import GgufTensors, gguf_tokenizer, open_gguf
from longrope_jax.interop.tensors import FolderTensors
from longrope_jax.model import LlamaConfig
from longrope_jax.model.sharding import check_mesh, tree_shardings
from longrope_jax.rope import FactorTable
from longrope_jax.runtime import processes

TensorSource = FolderTensors | GgufTensors
_FLOATS = ("float32", "bfloat16", "float16")
_BATCH = 1 << 22  # numbers to read and cast together


class Pretrained(NamedTuple):
    """A pretrained model.

    Attributes:
        config: the architecture; `original_length` is the context before any extension.
        params: for `Llama(config)`.
        tokenizer: None if the model has none.
        factors: by length, up to the longest context of the model.
    """

    config: LlamaConfig
    params: dict
    tokenizer: SubwordTokenizer | None
    factors: FactorTable


def load_pretrained(path: epath.PathLike, *, mesh: Mesh | None = None, **changes: str) -> Pretrained:
    """Loads a Hugging Face folder (config.json, .safetensors, tokenizer.json) or a .gguf file of the llama
    architecture, local or in an object store (gs://...), from which every machine makes one local copy.

    Tensors are placed on their devices one by one: beside the parameters the host holds at most one tensor. It reads
    only the parts of its own devices.

    Args:
        mesh: devices, with the axes of `model/sharding.py`; None is one device.
        changes: fields of `LlamaConfig`: dtype, param_dtype (both float32 by default), attention, remat.

    Raises:
        ValueError: lists everything that is unsupported, missing, unexpected or misshapen.
    """
    config, factors = describe_pretrained(path, **changes)
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        logging.warning("%s", error)
        tokenizer = None
    return Pretrained(config, read_params(path, config, mesh), tokenizer, factors)


def describe_pretrained(path: epath.PathLike, **changes: str) -> tuple[LlamaConfig, FactorTable]:
    """Only the architecture and the factors, without the weights. Raises ValueError as `load_pretrained` does."""
    with naming(path):
        return parse_config(read_config(path), **changes)


def read_config(path: epath.PathLike) -> dict[str, Any]:
    """The config.json of a folder, or its equivalent for a GGUF file; raises ValueError if there is none."""
    return _open(epath.Path(path))[0]


def load_tokenizer(path: epath.PathLike) -> SubwordTokenizer:
    """The tokenizer of a folder or a GGUF file; raises ValueError if there is none or it can't be read."""
    is_gguf = _is_gguf(path)
    return gguf_tokenizer(cached_copy(epath.Path(path))) if is_gguf else SubwordTokenizer.from_folder(path)


def stored_dtype(path: epath.PathLike) -> str:
    """The `param_dtype` that is exact for a checkpoint: bfloat16 if all its tensors are, else float32.

    Raises:
        ValueError: there is no checkpoint, or it can't be read.
    """
    _, make_source = _open(epath.Path(path))
    dtypes = {str(dtype) for _, dtype in make_source().shapes().values()}
    return "bfloat16" if dtypes == {"bfloat16"} else "float32"


def read_params(path: epath.PathLike, config: LlamaConfig, mesh: Mesh | None = None) -> dict:
    """Only the parameters, for the config from `describe_pretrained`.

    Raises:
        ValueError: lists all tensors that are missing, unexpected, misshapen or of an unsupported type, or says why the
            model does not fit the mesh.
    """
    path = epath.Path(path)
    content, make_source = _open(path)
    if mesh is not None:
        check_mesh(config, dict(mesh.shape), mesh.devices.flat[0].platform)
    source = make_source()
    wanted = checkpoint_tensors(config, fused=(content.get("architectures") or [""])[0] == "Phi3ForCausalLM")
    problems = _problems(config, wanted, source) or _check_tied_head(config, source)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    like = _params_like(config, wanted)
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), like)
    else:
        shardings = tree_shardings(mesh, like)
    total = sum(config.num_layers if stored.is_stacked else 1 for stored in wanted.values())
    with processes.progress_bar(total=total, desc=f"reading {path.name}", unit="tensor") as bar:

        def read(where, leaf, sharding):
            stored = wanted[jax.tree_util.keystr(where, simple=True, separator="/")]
            if not stored.is_stacked:
                bar.update()
                return _read_tensor(source, stored.tensor, stored, leaf, sharding)
            stack = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
            layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            for number in range(config.num_layers):
                part = _read_tensor(source, stored.tensor.format(number), stored, layer, _of_one_layer(sharding))
                stack = _put(stack, part, number, sharding)
                stack.block_until_ready()  # or the parts would pile up in memory
                bar.update()
            return stack

        return jax.tree_util.tree_map_with_path(read, like, shardings)


def _open(path: epath.Path) -> tuple[dict[str, Any], Any]:
    """The config (see `read_config`), and a function that opens the tensors."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a Hugging Face folder or a .gguf file")
    if _is_gguf(path):
        config, tensors = open_gguf(cached_copy(path))
        return config, lambda: tensors
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder nor a .gguf file; pickled weights are not read")
    try:
        config = json_files.read_object(path / "config.json")
    except OSError as error:
        raise ValueError(f"{path / 'config.json'} can't be read: {error}") from None
    return config, lambda: FolderTensors(path)


def _is_gguf(path: epath.PathLike) -> bool:
    return PurePath(path).suffix == ".gguf"


def _problems(config: LlamaConfig, wanted: dict[str, CheckpointTensor], source: TensorSource) -> list[str]:
    """Everything that is wrong with the tensors of a checkpoint."""
    present = source.shapes()
    if config.num_layers > len(present):
        return [f"{config.num_layers} layers are more than the {len(present)} tensors"]
    expected = {
        stored.tensor.format(number): stored.shape
        for stored in wanted.values()
        for number in range(config.num_layers if stored.is_stacked else 1)
    }
    unexpected = sorted(present.keys() - expected.keys())
    if config.tie_embeddings and HEAD in unexpected:
        unexpected.remove(HEAD)  # some files store the tied embedding twice
    differences = {"missing": sorted(expected.keys() - present.keys()), "unexpected": unexpected}
    problems = [
        f"{len(names)} {kind} tensors: {beginning(', '.join(names))}" for kind, names in differences.items() if names
    ]
    for name in sorted(expected.keys() & present.keys()):
        shape, dtype = present[name]
        if tuple(shape) != expected[name]:
            problems.append(f"{name} has shape {tuple(shape)}, not {expected[name]}")
        if str(dtype) not in _FLOATS:
            problems.append(f"{name} has dtype {dtype}, not one of {', '.join(_FLOATS)}")
    return problems


def _check_tied_head(config: LlamaConfig, source: TensorSource) -> list[str]:
    """A problem if the model is tied but its checkpoint has a head that differs from the embedding."""
    shapes = source.shapes()
    if not config.tie_embeddings or HEAD not in shapes:
        return []
    whole = tuple(slice(0, size) for size in shapes[EMBEDDING][0])
    if shapes[HEAD] == shapes[EMBEDDING] and all(
        np.array_equal(source.read(HEAD, rows), source.read(EMBEDDING, rows)) for rows in _row_blocks(whole)
    ):
        return []
    return [f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings = True; with false, both are used"]


def _params_like(config: LlamaConfig, wanted: dict[str, CheckpointTensor]) -> dict:
    """Shape and dtype of every parameter, from those of its tensor: tracing the model would take much longer."""
    like: dict = {}
    for leaf, stored in wanted.items():
        shape = (stored.rows.stop - stored.rows.start, *stored.shape[1:])
        shape = shape[::-1] if stored.is_transposed else shape
        layers = (config.num_layers,) if stored.is_stacked else ()
        like[leaf] = jax.ShapeDtypeStruct(layers + shape, jnp.dtype(config.param_dtype))
    return unflatten_dict(like, sep="/")


def _read_tensor(
    source: TensorSource, name: str, stored: CheckpointTensor, like: jax.ShapeDtypeStruct, sharding: Sharding
) -> Array:
    """A tensor on its devices; each device reads only its part."""

    def part(index):
        where = [slice(*axis.indices(size)) for axis, size in zip(index, like.shape, strict=True)]
        found = _allocate(tuple(axis.stop - axis.start for axis in where), like.dtype)
        as_stored, (rows, *columns) = (found.T, where[::-1]) if stored.is_transposed else (found, where)
        start = stored.rows.start + rows.start
        # Casts and transposes a few rows at a time: a whole tensor would be in memory twice.
        for block, *rest in _row_blocks((slice(start, stored.rows.start + rows.stop), *columns)):
            as_stored[block.start - start : block.stop - start] = source.read(name, (block, *rest))
        return found

    return jax.make_array_from_callback(like.shape, sharding, part)


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in its own memory pages: the system gets them back at once (malloc would keep tens of MB), and a CPU
    device uses them without a copy.
    """
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)


def _row_blocks(slices: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    """Splits a part of a tensor into blocks of a few rows."""
    rows, *rest = slices
    step = max(1, _BATCH // math.prod(axis.stop - axis.start for axis in rest))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop)), *rest


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(stack: Array, part: Array, number: Array, sharding: Sharding) -> Array:
    """Writes one layer into the stack, in place."""
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(stack, part, number, 0), sharding)


def _of_one_layer(sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
