"""GGUF files of the llama architecture as Hugging Face checkpoints: the same config, and tensors with the same names,
layout and order of rows.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, dequantize
from jaxtyping import Float32, Int64

from longrope_jax.errors import naming
from longrope_jax.interop.architectures import only, parse_rotation
from longrope_jax.interop.gguf.file import StoredTensor, read_gguf
from longrope_jax.json_files import POSITIVE, field, problems
from longrope_jax.rope.huggingface import ORIGINAL
from longrope_jax.settings import Rule

# llama.cpp's names of tensors, without "blk.N." and ".weight", and Hugging Face's.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
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
# Fields of config.json, and llama.cpp's metadata.
_FIELDS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "sliding_window": "llama.attention.sliding_window",
}
_SCALING = "llama.rope.scaling."
_RULES = {
    "general.architecture": Rule(lambda name: name == "llama", "is not supported; GGUF files of 'llama' are"),
    "llama.expert_count": Rule(lambda count: not count, "is not supported: experts"),
    "llama.attention.causal": only(True),
    # Settings of YaRN that Hugging Face's config does not have, with the values that change nothing.
    f"{_SCALING}yarn_ext_factor": only(1),
    f"{_SCALING}yarn_attn_factor": only(1),
    f"{_SCALING}yarn_log_multiplier": only(0),
}
# llama.cpp's tensors of factors that divide a frequency: one set (Llama 3), or two by length (LongRoPE).
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_LONG = "rope_factors_long.weight"
_ROPE_SHORT = "rope_factors_short.weight"


def open_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], "GgufTensors"]:
    """A config like Hugging Face's config.json, and its tensors, without reading any weight.

    Rotary factors that the file stores as tensors (`rope_freqs` of Llama 3, `rope_factors_long` and `_short`) are in
    the config's `rope_parameters`, as type longrope, and not among the tensors.

    Raises:
        ValueError: names the file and what is wrong with it: a damaged file, another architecture than llama, experts,
            a partial or unknown rotary embedding, or tensors of a type that the gguf package can't dequantise. The
            rest of the config is checked by `parse_config`.
    """
    file = read_gguf(path)
    with naming(path):
        if wrong := problems(file.metadata, _RULES):
            raise ValueError("; ".join(wrong))
        _check_types(file.tensors)
        weights = dict(file.tensors)
        factors = {
            name: dequantize(stored.rows[:1], stored.type)[0].tolist()
            for name in (_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT)
            if (stored := weights.pop(name, None))
        }
        config = _read_config(file.metadata, weights, factors)
        config["head_dim"] = head_dim = 2 * parse_rotation(config).table.factors.lam.shape[-1]
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            field(file.metadata, key, Rule(lambda size: size == head_dim, f"must be {head_dim}: whole heads"), head_dim)
        return config, GgufTensors(weights, head_dim)


class GgufTensors:
    """The tensors of a GGUF file, with the methods of `FolderTensors`: memory-mapped, and dequantised to float32 when
    they are read. Unknown tensors keep their names in the file.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], head_dim: int):
        self._stored = {huggingface_name(name): tensor for name, tensor in stored.items()}
        self._head_dim = head_dim

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape, float32) of every tensor."""
        return {name: (tensor.shape, np.dtype(np.float32)) for name, tensor in self._stored.items()}

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Float32[np.ndarray, "..."]:
        """The part of a vector or matrix in the slices, one per axis (by default all); dequantises only these rows."""
        tensor = self._stored[name]
        slices = tuple(slices) or (slice(None),) * len(tensor.shape)
        if len(tensor.shape) == 1:
            return dequantize(tensor.rows, tensor.type)[0, slices[0]]
        rows: Any = slices[0]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = _row_order(tensor.shape[0], self._head_dim)[rows]
        return dequantize(tensor.rows[rows], tensor.type)[:, slices[1]]


def huggingface_name(name: str) -> str:
    """Hugging Face's name for a tensor of llama.cpp; the same name if there is none."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)(\.weight|\.bias)", name)
    if not found or found[2] not in _NAMES:
        return name
    return (f"model.layers.{found[1]}." if found[1] else "") + _NAMES[found[2]] + found[3]


def _row_order(rows: int, head_dim: int) -> Int64[np.ndarray, "rows"]:
    """The row in the file of every row of a query or key projection.

    llama.cpp rotates adjacent pairs, so within each head its converter moves row `half * D/2 + pair` to row
    `2 * pair + half`.
    """
    return np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _check_types(tensors: Mapping[str, StoredTensor]) -> None:
    """Raises ValueError if a type can't be dequantised, by trying one block of each."""
    for kind in {tensor.type for tensor in tensors.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            names = ", ".join(name for name, tensor in tensors.items() if tensor.type == kind)
            raise ValueError(f"tensors of type {kind.name}, which can't be dequantised: {names}") from None


def _read_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor], factors: Mapping[str, list[float]]
) -> dict[str, Any]:
    """The config of a model; only its rotation is checked."""
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor 'token_embd.weight' is missing: no model, or only a part of one")
    metadata = {key: _plain(value) for key, value in metadata.items() if key.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"].rows.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _read_rope(metadata, factors),
        **{name: metadata[key] for name, key in _FIELDS.items() if key in metadata},
    }


def _read_rope(metadata: Mapping[str, Any], factors: Mapping[str, list[float]]) -> dict[str, Any]:
    """`rope_parameters`. llama.cpp divides a frequency by its factor, as LongRoPE does, so its factors are lambda."""
    factor = metadata.get(f"{_SCALING}factor", metadata.get("llama.rope.scale_linear"))  # the latter in old files
    scale = field({f"{_SCALING}factor": factor or None}, f"{_SCALING}factor", POSITIVE, 1.0)  # a scale of 0 means none
    temperature = field(metadata, f"{_SCALING}attn_factor", POSITIVE, 1.0)
    kind = metadata.get(f"{_SCALING}type", "none" if scale == 1 else "linear")
    rope = {
        "rope_type": "default" if kind == "none" else kind,
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "factor": scale,
    }
    extended = rope | {
        ORIGINAL: metadata.get(f"{_SCALING}original_context_length", metadata.get("llama.context_length")),
        "attention_factor": temperature,
    }
    if factors:
        if kind in ("linear", "yarn") and scale != 1:
            raise ValueError(f"{_SCALING}type = {kind!r} on top of the factors in {sorted(factors)} is not supported")
        short, long = (factors.get(name, factors.get(_ROPE_FREQS)) for name in (_ROPE_SHORT, _ROPE_LONG))
        return extended | {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    if kind == "yarn":
        extended["attention_factor"] *= 0.1 * math.log(scale) + 1 if scale > 1 else 1.0
        return extended | {name: metadata.get(f"{_SCALING}yarn_{name}") for name in ("beta_fast", "beta_slow")}
    if temperature != 1:
        raise ValueError(f"{_SCALING}attn_factor = {temperature} is supported with 'yarn' or 'longrope' only")
    return rope


def _plain(value: Any) -> Any:
    """A number as config.json has it: not once for every layer, and without the extra digits of float32."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    return float(str(np.float32(value))) if isinstance(value, float) else value
