"""Exports a model and its factors as a Hugging Face folder that Transformers reads."""

import itertools
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from jaxtyping import Array, Float
from safetensors.numpy import save
from tokenizers.pre_tokenizers import ByteLevel

from longrope_jax.data.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer
from longrope_jax.interop.architectures import ARCHITECTURES, SIZES, CheckpointTensor, checkpoint_tensors
from longrope_jax.interop.gguf.tokenizer import tokenizer_of
from longrope_jax.model import LlamaConfig
from longrope_jax.model.sharding import constrain
from longrope_jax.rope import FactorTable, to_huggingface, two_lengths, unsupported_by_huggingface
from longrope_jax.runtime import processes

SHARD_BYTES = 2**30
"""Maximum size of a file (unless one tensor is larger). The host needs about three times as much memory."""
_TOKENIZER_CONFIG = "tokenizer_config.json"
PARTIAL = ".partial"
"""Suffix of a folder that is being written; it is renamed when it is complete."""


class UnsupportedByFormat(ValueError):
    """The format does not support a property of the factors, and dropping it was not allowed."""


def fit_to_format(
    table: FactorTable, original_length: int, allowed: Collection[str]
) -> tuple[FactorTable, dict[str, str]]:
    """The table in the form that `rope_parameters` supports, and what was dropped for it.

    Neighbouring boundaries with the same factors are merged. What was dropped is described in words, by the keys of
    `unsupported_by_huggingface`.

    Args:
        allowed: names in `DROPPABLE` that may be dropped.

    Raises:
        UnsupportedByFormat: lists what would be dropped without permission.
        ValueError: the factors end below the original length.
    """
    if table.boundaries[-1] < original_length:
        raise ValueError(
            f"factors that end at {table.boundaries[-1]} tokens, below the original length, {original_length}, would "
            "shorten the context; they must reach it"
        )
    table = _merged(table)
    unsupported = unsupported_by_huggingface(table)
    if refused := [key for key in unsupported if key not in allowed]:
        raise UnsupportedByFormat(
            f"Hugging Face's rope_parameters does not support {'; '.join(unsupported[key] for key in refused)}. To "
            f"drop it and measure the cost, set {', '.join(f'allow_dropping_{key}' for key in refused)}"
        )
    return (two_lengths(table, original_length) if unsupported else table), unsupported


def _merged(table: FactorTable) -> FactorTable:
    """The table without boundaries where nothing changes."""
    entries = {int(boundary): table.select(int(boundary)) for boundary in table.boundaries}
    for boundary, following in itertools.pairwise(list(entries)):
        if all(map(np.array_equal, jax.tree.leaves(entries[boundary]), jax.tree.leaves(entries[following]))):
            del entries[boundary]
    return FactorTable.of(entries)


def check_architecture(architecture: str, config: LlamaConfig) -> None:
    """Raises ValueError if Transformers' class of that name can't represent this model."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture = {architecture!r} must be one of {', '.join(ARCHITECTURES)}")
    width = config.num_heads * config.head_dim
    if architecture == "Phi3ForCausalLM" and width != config.hidden_size:
        raise ValueError(
            f"architecture = {architecture!r} needs num_heads * head_dim = hidden_size; here num_heads * head_dim = "
            f"{width} and hidden_size = {config.hidden_size}"
        )


def huggingface_config(
    config: LlamaConfig, table: FactorTable, architecture: str, dtype: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The content of config.json. `rope_scaling` and `rope_theta` repeat `rope_parameters` for Transformers before 5,
    which would otherwise ignore the extension (and refuses Phi-3 with it).

    Args:
        table: supported by the format, see `fit_to_format`.
        architecture: one of `ARCHITECTURES`. All compute the same here; llama.cpp's converter supports factors by
            length only for Phi-3.
        dtype: of the tensors.
    """
    rope = to_huggingface(table, config.original_length)
    model_type = architecture.removesuffix("ForCausalLM").lower()
    bos, eos = (None, None) if tokenizer is None else (tokenizer.bos, tokenizer.eos)
    content = {
        "architectures": [architecture],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": int(table.boundaries[-1]),
        # Transformers prefers this one to the one inside, and its class for Phi-3 has a default.
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_scaling": rope,
        "rope_theta": config.rope_theta,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return content if architecture == "LlamaForCausalLM" else {**content, "sliding_window": None}


def export_checkpoint(
    folder: epath.PathLike,
    config: LlamaConfig,
    params: dict,
    table: FactorTable,
    tokenizer: Tokenizer | None,
    card: str,
    *,
    architecture: str = "LlamaForCausalLM",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder with safetensors, config.json, tokenizer, generation_config.json and README.md.

    The folder is renamed when it is complete (an object store copies its files one by one), and replaces an older
    export. Parameters are copied from their devices tensor by tensor. All processes have to call this; the first one
    writes. The host needs O(shard_bytes) memory, a device one tensor more.

    Args:
        params: of `Llama(config)`, sharded or not.
        table: see `fit_to_format`.
        card: README.md.
        architecture: see `huggingface_config`.
        dtype: of the tensors, "float32" or "bfloat16"; None is that of the parameters.

    Raises:
        ValueError: the format does not support the factors, the architecture does not fit, or the folder exists and
            is no model's.
        OSError: the folder can't be written.
    """
    check_architecture(architecture, config)
    dtype = dtype or config.param_dtype
    content = huggingface_config(config, table, architecture, dtype, tokenizer)
    folder = epath.Path(folder)
    _check_replaceable(folder)
    partial = folder.parent / (folder.name + PARTIAL)
    files = {
        "config.json": _json(content),
        "generation_config.json": _json(_generation_config(tokenizer)),
        "README.md": card.encode(),
        **({} if tokenizer is None else tokenizer_files(tokenizer, int(table.boundaries[-1]))),
    }
    try:
        if processes.is_first():
            if partial.exists():
                partial.rmtree()
            partial.mkdir(parents=True)
            for name, data in files.items():
                (partial / name).write_bytes(data)
        _write_tensors(partial, _tensors(config, architecture), params, np.dtype(dtype), shard_bytes)
    except OSError as error:
        if processes.is_first() and partial.exists():
            partial.rmtree()
        raise OSError(f"{folder} can't be written: {error.strerror or error}") from error
    if processes.is_first():
        if folder.exists():
            folder.rmtree()
        partial.rename(folder)
    processes.wait_for_all(f"export {folder.name}")


def _check_replaceable(folder: epath.Path) -> None:
    """Raises ValueError if the folder exists and is neither empty nor a model's."""
    is_model = folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))
    if folder.exists() and not is_model:
        raise ValueError(f"{folder} exists and is no model's folder; it is not replaced")


def _generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.stops)}
    return {name: value for name, value in ids.items() if value not in (None, [])}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


_Part = tuple[str, CheckpointTensor, int | None]
"""A parameter, where it is stored, and the layer, if every layer has such a parameter."""


def _tensors(config: LlamaConfig, architecture: str) -> dict[str, list[_Part]]:
    """The tensors of the folder in order, the layers one after the other: name -> the parameters that are its rows."""
    found: dict[str, list[_Part]] = {}
    parameters = checkpoint_tensors(config, fused=architecture == "Phi3ForCausalLM").items()
    for is_stacked, group in itertools.groupby(parameters, lambda parameter: parameter[1].is_stacked):
        for number, (leaf, stored) in itertools.product(range(config.num_layers) if is_stacked else [None], group):
            found.setdefault(stored.tensor.format(number), []).append((leaf, stored, number))
    return found


def _write_tensors(
    folder: epath.Path, tensors: dict[str, list[_Part]], params: dict, dtype: np.dtype, shard_bytes: int
) -> None:
    """Writes the safetensors, and their index if there are several files."""
    leaves, is_first = flatten_dict(params, sep="/"), processes.is_first()
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda parts: math.prod(parts[0][1].shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    what = f"writing {folder.name.removesuffix(PARTIAL)}"
    with processes.progress_bar(total=len(tensors), desc=what, unit="tensor") as bar:
        for file, names in split.filename_to_tensors.items():
            arrays = {}
            for name in names:
                found = _as_stored(tensors[name], leaves, dtype)
                if is_first:
                    arrays[name] = found
                bar.update()
            if is_first:
                (folder / file).write_bytes(save(arrays, metadata={"format": "pt"}))
    if split.is_sharded and is_first:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_bytes(_json(index))


def _as_stored(parts: list[_Part], leaves: Mapping[str, Array], dtype: np.dtype) -> Float[np.ndarray, "..."]:
    """A tensor in Hugging Face's layout: matrices are [out, in]."""
    rows = []
    for leaf, stored, number in parts:
        part = np.asarray(_whole(leaves[leaf], number))
        rows.append((part.T if stored.is_transposed else part).astype(dtype))
    return np.ascontiguousarray(rows[0] if len(rows) == 1 else np.concatenate(rows))


@jax.jit
def _whole(leaf: Array, number: int | None) -> Array:
    """A parameter, or one layer of it, replicated to every device of the current mesh."""
    return constrain(leaf if number is None else leaf[number])


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> Mapping[str, bytes]:
    """Name -> content of the files from which Transformers makes the same tokenizer: the files that it was read from,
    or for bytes a vocabulary of 256.

    Args:
        longest: tokens of the longest context; a smaller `model_max_length` is raised to it.
    """
    files = tokenizer.files if isinstance(tokenizer, SubwordTokenizer) else _byte_files()
    config = json.loads(files.get(_TOKENIZER_CONFIG, b"{}"))
    limit = config.get("model_max_length")
    if isinstance(limit, int) and limit < longest:
        files = {**files, _TOKENIZER_CONFIG: _json({**config, "model_max_length": longest})}
    return files


def _byte_files() -> Mapping[str, bytes]:
    """BPE without merges over GPT-2's characters for bytes, in the order of `ByteTokenizer`'s ids."""
    # Bytes that are printable in Latin-1 are themselves; the others are characters from U+0100 on, in order.
    alphabet = sorted(ByteLevel.alphabet())
    others = (character for character in alphabet if character > "\xff")
    characters = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*characters, "<s>", "</s>"],
        "merges": [],
        "bos_token_id": ByteTokenizer.bos,
        "eos_token_id": ByteTokenizer.eos,
        "add_bos_token": True,
    }
    return tokenizer_of({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}).files
