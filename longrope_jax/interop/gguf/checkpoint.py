"""GGUF files of the llama architecture as Hugging Face checkpoints: the same config, and tensors with the same names,
layout and order of rows.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, dequantize
from jaxtyping import Float32, Int64, UInt8

from longrope_jax.errors import beginning, shortened
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
# Numbers to dequantise together, so that a tensor is not in memory twice.
_CHUNK = 1 << 22
# llama.cpp's tensors of factors that divide a frequency: one set (Llama 3), or two by length (LongRoPE).
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_LONG = "rope_factors_long.weight"
_ROPE_SHORT = "rope_factors_short.weight"
_ROPE_TENSORS = (_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT)

_ROPE_TYPES = ("none", "linear", "yarn", "longrope")
# Settings of YaRN that Hugging Face's config does not have, with the values that change nothing.
_NEUTRAL = {"yarn_ext_factor": 1, "yarn_attn_factor": 1, "yarn_log_multiplier": 0}


def open_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], "GgufTensors"]:
    """A config like Hugging Face's config.json, and its tensors, without reading any weight.

    Rotary factors that the file stores as tensors (`rope_freqs` of Llama 3, `rope_factors_long` and `_short`) are in
    the config's `rope_parameters`, as type longrope, and not among the tensors.

    Raises:
        ValueError: names the file and what is wrong with it: a damaged file, another architecture than llama, missing
            or invalid metadata, experts, a partial or unknown rotary embedding, or tensors of a type that the gguf
            package can't dequantise (it lists them all).
    """
    file = read_gguf(path)
    try:
        _check_types(file.tensors)
        shapes = {name: stored.shape for name, stored in file.tensors.items()}
        config = _read_config(
            file.metadata, shapes, lambda name: _dequantize(file.tensors[name].rows, file.tensors[name])[0]
        )
    except ValueError as error:
        raise ValueError(f"{path}: {beginning(error)}") from None
    weights = {name: stored for name, stored in file.tensors.items() if name not in _ROPE_TENSORS}
    return config, GgufTensors(weights, config["num_attention_heads"], config["num_key_value_heads"])


class GgufTensors:
    """The tensors of a GGUF file as a `TensorSource`: memory-mapped, and dequantised to float32 when they are read.
    Unknown tensors keep their names in the file.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], num_heads: int, num_kv_heads: int):
        self._stored = {huggingface_name(name): tensor for name, tensor in stored.items()}
        self._heads = {"q_proj.weight": num_heads, "k_proj.weight": num_kv_heads}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape, float32) of every tensor."""
        return {name: (tensor.shape, np.dtype(np.float32)) for name, tensor in self._stored.items()}

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Float32[np.ndarray, "..."]:
        """The part of a vector or matrix in the slices, one per axis (by default all); dequantises only these rows."""
        tensor = self._stored[name]
        slices = tuple(slices) or (slice(None),) * len(tensor.shape)
        if len(tensor.shape) == 1:
            return _dequantize(tensor.rows, tensor)[0, slices[0]]
        rows, columns = slices
        if heads := self._heads.get(".".join(name.split(".")[-2:])):
            return _dequantize(tensor.rows[_row_order(tensor.shape[0], heads)[rows]], tensor, columns)
        return _dequantize(tensor.rows[rows], tensor, columns)


def huggingface_name(name: str) -> str:
    """Hugging Face's name for a tensor of llama.cpp; the same name if there is none."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    return _NAMES.get(name, name)


def _row_order(rows: int, heads: int) -> Int64[np.ndarray, "rows"]:
    """The row in the file of every row of a query or key projection.

    llama.cpp rotates adjacent pairs, so within each head its converter moves row `half * D/2 + pair` to row
    `2 * pair + half`.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _dequantize(
    rows: UInt8[np.ndarray, "rows bytes"], tensor: StoredTensor, columns: slice = slice(None)
) -> Float32[np.ndarray, "rows columns"]:
    """Some rows of a tensor, in blocks: the gguf package holds its input in memory twice."""
    width = tensor.shape[-1]
    out = np.empty((len(rows), len(range(*columns.indices(width)))), np.float32)
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, len(rows), step):
        out[start : start + step] = dequantize(rows[start : start + step], tensor.type)[:, columns]
    return out


def _check_types(tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ValueError if a type can't be dequantised, by trying one block of each."""
    unknown = set()
    for kind in {tensor.type for tensor in tensors.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            unknown.add(kind)
    named = [f"{name!r} ({tensor.type.name})" for name, tensor in tensors.items() if tensor.type in unknown]
    if named:
        raise ValueError(f"tensors of types that the gguf package can't dequantise: {', '.join(named)}")


def _read_config(metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], read: Callable[[str], Any]) -> dict:
    """The config of a model.

    Args:
        metadata: of the file.
        shapes: of its tensors, by their llama.cpp names.
        read: returns a tensor's numbers; called only for those in `_ROPE_TENSORS`.

    Raises:
        ValueError: another architecture, experts, a partial rotary embedding, anything else that the model does not
            support, or a number that is missing or out of range.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"general.architecture = {shortened(architecture)} is not supported; GGUF files of 'llama' are"
        )
    if metadata.get("llama.expert_count", 0) or any("_exps" in name for name in shapes):
        raise ValueError(
            f"llama.expert_count = {shortened(metadata.get('llama.expert_count'))}: experts are not supported"
        )
    if not metadata.get("llama.attention.causal", True):
        raise ValueError("llama.attention.causal = False is not supported: tokens attend only to earlier ones")
    if "token_embd.weight" not in shapes:
        raise ValueError("tensor 'token_embd.weight' is missing: no model, or only a part of one")
    hidden_size = _size(metadata, "llama.embedding_length")
    num_heads = _size(metadata, "llama.attention.head_count")
    context_length = _size(metadata, "llama.context_length")
    head_dim = _read_head_dim(metadata, hidden_size, num_heads)
    factors = {name: read(name) for name in _ROPE_TENSORS if name in shapes}
    for name, factor in factors.items():
        if factor.shape != (head_dim // 2,):
            raise ValueError(
                f"tensor {name!r} of {factor.size}: a head dimension of {head_dim} needs {head_dim // 2} factors"
            )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden_size,
        "intermediate_size": _size(metadata, "llama.feed_forward_length"),
        "num_hidden_layers": _size(metadata, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _size(metadata, "llama.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "rms_norm_eps": _number(metadata, "llama.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _read_rope(metadata, context_length, factors),
    }
    optional = {
        "sliding_window": metadata.get("llama.attention.sliding_window") or None,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    return config | {key: value for key, value in optional.items() if value is not None}


def _read_head_dim(metadata: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    head_dim = _size(metadata, "llama.attention.key_length", hidden_size // num_heads)
    rotated = _size(metadata, "llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"llama.rope.dimension_count = {rotated} of a head dimension of {head_dim}: only embeddings that rotate "
            "the whole head are supported"
        )
    value_dim = _size(metadata, "llama.attention.value_length", head_dim)
    if value_dim != head_dim:
        raise ValueError(f"llama.attention.value_length = {value_dim} must be the key length, {head_dim}")
    return head_dim


def _read_rope(metadata: Mapping[str, Any], context_length: int, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`rope_parameters`. llama.cpp divides a frequency by its factor, as LongRoPE does, so its factors are lambda."""
    prefix = "llama.rope.scaling."
    for key, neutral in _NEUTRAL.items():
        if metadata.get(prefix + key, neutral) != neutral:
            raise ValueError(f"{prefix}{key} = {shortened(metadata[prefix + key])} is not supported, only {neutral} is")
    # A scale of 0 means none. Old files have another key for it.
    scale = _number(metadata, prefix + "factor", _number(metadata, "llama.rope.scale_linear", 0.0)) or 1.0
    kind = metadata.get(prefix + "type", "linear" if scale != 1 else "none")
    if kind not in _ROPE_TYPES:
        raise ValueError(f"{prefix}type = {shortened(kind)} must be one of {_ROPE_TYPES}")
    original = _size(metadata, prefix + "original_context_length", context_length)
    temperature = _number(metadata, prefix + "attn_factor", 1.0)
    rope = {"rope_theta": _number(metadata, "llama.rope.freq_base", 10000.0)}
    if (_ROPE_LONG in factors) != (_ROPE_SHORT in factors) or (kind == "longrope" and _ROPE_LONG not in factors):
        raise ValueError(f"tensors {_ROPE_LONG!r} and {_ROPE_SHORT!r} belong together, found {sorted(factors)}")
    if factors:
        if kind in ("linear", "yarn") and scale != 1:
            raise ValueError(f"{prefix}type = {kind!r} on top of the factors in {sorted(factors)} is not supported")
        short = factors[_ROPE_SHORT if _ROPE_SHORT in factors else _ROPE_FREQS]
        return rope | {
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": factors.get(_ROPE_LONG, short).tolist(),
            "original_max_position_embeddings": original,
            "factor": context_length / original,
            "attention_factor": temperature,
        }
    if kind == "yarn":
        betas = {key: f"{prefix}yarn_{key}" for key in ("beta_fast", "beta_slow")}
        return rope | {
            "rope_type": "yarn",
            "factor": scale,
            "original_max_position_embeddings": original,
            "attention_factor": temperature * (0.1 * math.log(scale) + 1 if scale > 1 else 1.0),
            **{key: _number(metadata, beta) for key, beta in betas.items() if beta in metadata},
        }
    if temperature != 1:
        raise ValueError(f"{prefix}attn_factor = {temperature} is supported with 'yarn' or 'longrope' only")
    if kind == "linear" and scale != 1:
        return rope | {"rope_type": "linear", "factor": scale}
    return rope | {"rope_type": "default"}


def _size(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]  # one number per layer
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(
            f"{key} = {value} must be one whole number, at least 1" if key in metadata else f"{key} is missing"
        )
    return value


def _number(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{key} = {value} must be a number, not negative" if key in metadata else f"{key} is missing")
    return float(str(np.float32(value)))  # 1e-05 without the extra digits of float32
