"""A model and its factors -> a Hugging Face folder, which Transformers reads as it is."""

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from etils import epath
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
"""A file's size at most, but for a tensor that is larger. Some three times as much is in the host's memory."""
PARTIAL = ".partial"
"""Ending of a folder that is being written: it gets its name when it is whole."""


class UnsupportedByFormat(ValueError):
    """The format has no place for something of the factors, and nobody has allowed it to be dropped."""


class _Tensor(NamedTuple):
    """A tensor to be written: its name, shape, and the leaves that are its rows, with the layer of each."""

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
        allowed: names in `DROPPABLE`, of what may be dropped.

    Raises:
        UnsupportedByFormat: lists what else would be dropped.
        ValueError: the factors end below the original length.
    """
    if table.boundaries[-1] < original_length:
        raise ValueError(
            f"factors that end at {table.boundaries[-1]} tokens, below the original length, {original_length}, would "
            "make the context shorter; they must reach it"
        )
    table = _merged(table)
    lost = unsupported_by_huggingface(table)
    refused = [key for key in lost if key not in allowed]
    if refused:
        raise UnsupportedByFormat(
            f"Hugging Face's rope_parameters can't carry {'; '.join(lost[key] for key in refused)}. Allow it to be "
            f"dropped, at a cost that is then measured, with {', '.join(f'allow_dropping_{key}' for key in refused)}"
        )
    return (two_lengths(table, original_length) if lost else table), lost


def _merged(table: FactorTable) -> FactorTable:
    """Without boundaries at which nothing changes."""
    entries = {int(boundary): table.select(int(boundary)) for boundary in table.boundaries}
    for boundary, following in itertools.pairwise(list(entries)):
        if all(map(np.array_equal, jax.tree.leaves(entries[boundary]), jax.tree.leaves(entries[following]))):
            del entries[boundary]
    return FactorTable.of(entries)


def check_architecture(architecture: str, config: LlamaConfig) -> None:
    """Raises ValueError if Transformers' class of that name can't be this model."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture = {architecture!r} must be one of {', '.join(ARCHITECTURES)}")
    width = config.num_heads * config.head_dim
    if architecture == "Phi3ForCausalLM" and width != config.hidden_size:
        raise ValueError(
            f"architecture = {architecture!r} has heads as wide as the model, together; here num_heads * head_dim = "
            f"{width} and hidden_size = {config.hidden_size}"
        )


def huggingface_config(
    config: LlamaConfig, table: FactorTable, architecture: str, dtype: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """config.json's content. `rope_scaling` and `rope_theta` say the same as `rope_parameters` once more, to readers
    older than Transformers 5, which would take the model for one without an extension (those refuse Phi-3 with it).

    Args:
        table: of factors that the format can carry, see `fit_to_format`.
        architecture: one of `ARCHITECTURES`. All are the same computation here; the converter of llama.cpp knows
            factors by length of Phi-3 only.
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
        # Transformers takes this one before the one inside, and its class for Phi-3 has a default.
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

    It appears under its name when it is whole (on an object store, as whole as copying one by one can be); an older
    export that was there is replaced. Parameters are fetched from their
    devices tensor by tensor; of several processes, all have to call this, and the first writes. Memory of the host
    O(shard_bytes), of a device one tensor more.

    Args:
        params: of `Llama(config)`, sharded or not.
        table: see `fit_to_format`.
        card: README.md.
        architecture: see `huggingface_config`.
        dtype: of the tensors, "float32" or "bfloat16"; None keeps that of the parameters, so that nothing is lost.

    Raises:
        ValueError: the factors can't be carried whole, the architecture does not fit, or the folder is there and is no
            model's.
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
    """Raises ValueError if something is there that is neither empty nor a model's folder."""
    is_model = folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))
    if folder.exists() and not is_model:
        raise ValueError(f"{folder} is there, and is no model's folder that could be replaced")


def _generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.stops)}
    return {name: value for name, value in ids.items() if value not in (None, [])}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _tensors(config: LlamaConfig, architecture: str) -> list[_Tensor]:
    """All tensors of the folder: the embedding, layer by layer, what comes after the layers."""
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
    """safetensors, and their index where they are several files."""
    leaves = {
        jax.tree_util.keystr(where, simple=True, separator="/"): leaf
        for where, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
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


def _shards(tensors: list[_Tensor], size: Callable[[_Tensor], int], most: int) -> Iterator[list[_Tensor]]:
    """Neighbouring tensors, as many as fit into a file."""
    shard: list[_Tensor] = []
    for tensor in tensors:
        if shard and sum(map(size, shard)) + size(tensor) > most:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _as_stored(tensor: _Tensor, leaves: Mapping[str, Array], dtype: np.dtype) -> Float[np.ndarray, "..."]:
    """A tensor in Hugging Face's layout, matrices [out, in]; ours are [in, out] but for the embedding."""
    parts = []
    for leaf, number in tensor.parts:
        part = np.asarray(_whole(leaves[leaf], 0 if number is None else number, is_stacked=number is not None))
        is_transposed = part.ndim == 2 and leaf != "embed/embedding"
        parts.append((part.T if is_transposed else part).astype(dtype))
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


@jax.jit(static_argnames="is_stacked")
def _whole(leaf: Array, number: int, is_stacked: bool) -> Array:
    """A leaf, or one layer of it, on every device of the mesh that is set."""
    return constrain(leaf[number] if is_stacked else leaf)


_BOS, _EOS = "<s>", "</s>"
_CONFIG = "tokenizer_config.json"


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> dict[str, bytes]:
    """Name -> content of what Transformers needs to make the same tokens: those that a tokenizer was read from, or
    for bytes a vocabulary of all of them.

    Args:
        longest: tokens of the longest context. Where the files say that texts are cut at less, they say this.
    """
    files = tokenizer.files if isinstance(tokenizer, SubwordTokenizer) else _byte_files()
    config = json.loads(files.get(_CONFIG, b"{}"))
    limit = config.get("model_max_length")
    if isinstance(limit, int) and limit < longest:
        files = {**files, _CONFIG: _tokenizer_json({**config, "model_max_length": longest})}
    return files


def _byte_files() -> dict[str, bytes]:
    """BPE without merges over the characters that GPT-2 spells bytes with, in the order of `ByteTokenizer`'s ids."""
    vocab = {character: byte for byte, character in enumerate(_spelling())}
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
    return {"tokenizer.json": made.to_str().encode(), _CONFIG: _tokenizer_json(config)}


def _tokenizer_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _spelling() -> list[str]:
    """One character for every byte: itself where it can be printed in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
