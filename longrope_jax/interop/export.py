"""Exports a model and its factors as a Hugging Face folder that Transformers reads."""

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from etils import epath
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float
from safetensors.numpy import save
from tokenizers import decoders, models, pre_tokenizers, processors
from tqdm import tqdm

from longrope_jax.data.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer
from longrope_jax.interop.architectures import ARCHITECTURES, checkpoint_tensors
from longrope_jax.model import LlamaConfig
from longrope_jax.model.sharding import constrain
from longrope_jax.rope import FactorTable, to_huggingface, two_lengths, unsupported_by_huggingface
from longrope_jax.runtime import processes

SHARD_BYTES = 2**30
"""Maximum size of a file (unless one tensor is larger). The host needs about three times as much memory."""
_BOS, _EOS = "<s>", "</s>"
_TOKENIZER_CONFIG = "tokenizer_config.json"
PARTIAL = ".partial"
"""Suffix of a folder that is being written; it is renamed when it is complete."""


class UnsupportedByFormat(ValueError):
    """The format does not support a property of the factors, and dropping it was not allowed."""


class _Tensor(NamedTuple):
    """A tensor to write: its name, its shape, and the parameters that are its rows, each with its layer."""

    name: str
    shape: tuple[int, ...]
    parts: list[tuple[str, int | None]]


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
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
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
        "use_cache": True,
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


def _tensors(config: LlamaConfig, architecture: str) -> list[_Tensor]:
    """All tensors of the folder in order: the embedding, the layers, the rest."""
    found: dict[str, _Tensor] = {}
    places: dict[str, int] = {}
    for leaf, stored in checkpoint_tensors(config, fused=architecture == "Phi3ForCausalLM").items():
        is_stacked = "{}" in stored.tensor
        for number in range(config.num_layers) if is_stacked else [None]:
            name = stored.tensor.format(number)
            tensor = found.setdefault(name, _Tensor(name, stored.shape, []))
            tensor.parts.append((leaf, number))
            places[name] = number if number is not None else (-1 if leaf.startswith("embed/") else config.num_layers)
    return sorted(found.values(), key=lambda tensor: places[tensor.name])


def _write_tensors(folder: epath.Path, tensors: list[_Tensor], params: dict, dtype: np.dtype, shard_bytes: int) -> None:
    """Writes the safetensors, and their index if there are several files."""
    leaves = flatten_dict(params, sep="/")
    shards = list(_shards(tensors, lambda tensor: int(np.prod(tensor.shape)) * dtype.itemsize, shard_bytes))
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    with tqdm(
        total=len(tensors),
        desc=f"writing {folder.name.removesuffix(PARTIAL)}",
        unit="tensor",
        dynamic_ncols=True,
        disable=not processes.is_first(),
    ) as bar:
        for name, shard in zip(names, shards, strict=True):
            arrays = {}
            for tensor in shard:
                found = _as_stored(tensor, leaves, dtype)
                if processes.is_first():
                    arrays[tensor.name] = found
                bar.update()
            if processes.is_first():
                (folder / name).write_bytes(save(arrays, metadata={"format": "pt"}))
    if len(shards) > 1 and processes.is_first():
        size = sum(int(np.prod(tensor.shape)) for tensor in tensors) * dtype.itemsize
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_bytes(_json(index))


def _shards(tensors: list[_Tensor], size: Callable[[_Tensor], int], max_bytes: int) -> Iterator[list[_Tensor]]:
    """Groups consecutive tensors into files."""
    shard: list[_Tensor] = []
    for tensor in tensors:
        if shard and sum(map(size, shard)) + size(tensor) > max_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _as_stored(tensor: _Tensor, leaves: Mapping[str, Array], dtype: np.dtype) -> Float[np.ndarray, "..."]:
    """A tensor in Hugging Face's layout: matrices are [out, in]; ours are [in, out], except the embedding."""
    parts = []
    for leaf, number in tensor.parts:
        part = np.asarray(_whole(leaves[leaf], 0 if number is None else number, is_stacked=number is not None))
        is_transposed = part.ndim == 2 and leaf != "embed/embedding"
        parts.append((part.T if is_transposed else part).astype(dtype))
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


@jax.jit(static_argnames="is_stacked")
def _whole(leaf: Array, number: int, is_stacked: bool) -> Array:
    """A parameter, or one layer of it, replicated to every device of the current mesh."""
    return constrain(leaf[number] if is_stacked else leaf)


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> dict[str, bytes]:
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


def _byte_files() -> dict[str, bytes]:
    """BPE without merges over GPT-2's characters for bytes, in the order of `ByteTokenizer`'s ids."""
    # Bytes that are printable in Latin-1 are themselves; the others are characters from U+0100 on, in order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = (character for character in alphabet if character > "\xff")
    vocab = {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}
    made = tokenizers.Tokenizer(models.BPE(vocab | {_BOS: ByteTokenizer.bos, _EOS: ByteTokenizer.eos}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([_BOS, _EOS])
    made.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS}:1 $B:1", special_tokens=[(_BOS, ByteTokenizer.bos)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": _BOS,
        "eos_token": _EOS,
    }
    return {"tokenizer.json": made.to_str().encode(), _TOKENIZER_CONFIG: _json(config)}
