"""GGUF files of the llama architecture, seen as if they were Hugging Face checkpoints: the same config, and a source of
tensors with the same names, layout and order of rows.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, dequantize
from jaxtyping import Float32, Int64, UInt8

from longrope_jax.errors import beginning
from longrope_jax.interop.gguf.config import ROPE_TENSORS, read_config
from longrope_jax.interop.gguf.file import StoredTensor, read_gguf

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Numbers that are dequantised at a time, so that a tensor is in memory once and not twice.
_CHUNK = 1 << 22


def open_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], "GgufTensors"]:
    """A config like Hugging Face's config.json, and the tensors it belongs to, without reading any weight.

    Rotary factors that the file keeps as tensors (`rope_freqs` of Llama 3, `rope_factors_long` and `_short`) are in the
    config's `rope_parameters`, as type longrope, and not among the tensors.

    Raises:
        ValueError: names the file and what is wrong with it: no sound GGUF file, not of the llama architecture,
            missing or nonsensical metadata, experts, a partial or unknown rotary embedding, or tensors of a type that
            the gguf package can't dequantise (all of them).
    """
    file = read_gguf(path)
    try:
        _check_types(file.tensors)
        shapes = {name: stored.shape for name, stored in file.tensors.items()}
        config = read_config(
            file.metadata, shapes, lambda name: _dequantize(file.tensors[name].rows, file.tensors[name])[0]
        )
    except ValueError as error:
        raise ValueError(f"{path}: {beginning(error)}") from None
    weights = {name: stored for name, stored in file.tensors.items() if name not in ROPE_TENSORS}
    return config, GgufTensors(weights, config["num_attention_heads"], config["num_key_value_heads"])


class GgufTensors:
    """A source of tensors (see `interop/tensors.py`) over those of a GGUF file: memory-mapped, dequantised to float32
    as they are read. A tensor that no LLaMA has keeps the name it has in the file.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], num_heads: int, num_kv_heads: int):
        self._stored = {huggingface_name(name): tensor for name, tensor in stored.items()}
        self._heads = {"q_proj.weight": num_heads, "k_proj.weight": num_kv_heads}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape, float32), of every tensor."""
        return {name: (tensor.shape, np.dtype(np.float32)) for name, tensor in self._stored.items()}

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Float32[np.ndarray, "..."]:
        """The part of a vector or matrix that the slices, one an axis, ask for (all of it without any). Only the rows
        asked for are dequantised.
        """
        tensor = self._stored[name]
        slices = tuple(slices) or (slice(None),) * len(tensor.shape)
        if len(tensor.shape) == 1:
            return _dequantize(tensor.rows, tensor)[0, slices[0]]
        rows, columns = slices
        if heads := self._heads.get(".".join(name.split(".")[-2:])):
            return _dequantize(tensor.rows[_order_of_rows(tensor.shape[0], heads)[rows]], tensor, columns)
        return _dequantize(tensor.rows[rows], tensor, columns)


def huggingface_name(name: str) -> str:
    """The name that Hugging Face has for a tensor of llama.cpp; the same name where it has none."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    return _NAMES.get(name, name)


def _order_of_rows(rows: int, heads: int) -> Int64[np.ndarray, "rows"]:
    """Where llama.cpp's converter has put every row of a query or key projection.

    It rotates neighbouring pairs, so within each head it moves row `half * D/2 + pair` to row `2 * pair + half`.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _dequantize(
    rows: UInt8[np.ndarray, "rows bytes"], tensor: StoredTensor, columns: slice = slice(None)
) -> Float32[np.ndarray, "rows columns"]:
    """Some rows of a tensor, some at a time: the gguf package has what it works on in memory twice."""
    width = tensor.shape[-1]
    out = np.empty((len(rows), len(range(*columns.indices(width)))), np.float32)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, len(rows), step):
        out[start : start + step] = dequantize(rows[start : start + step], tensor.type)[:, columns]
    return out


def _check_types(tensors: Mapping[str, StoredTensor]) -> None:
    """Tries every type that occurs on one block."""
    unknown = set()
    for kind in {tensor.type for tensor in tensors.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            unknown.add(kind)
    named = [f"{name!r} ({tensor.type.name})" for name, tensor in tensors.items() if tensor.type in unknown]
    if named:
        raise ValueError(f"tensors of types that the gguf package can't dequantise: {', '.join(named)}")
