"""Hugging Face's config.json of a supported architecture -> ours; and which tensors make which leaf."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging

from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable, from_huggingface

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM")
# What the model can't do otherwise, with the one value (or nothing) that a config may have.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}


class Origin(NamedTuple):
    """Where a leaf of the parameters, or one layer of it, comes from.

    Attributes:
        tensor: its name; "{}" stands for the number of the layer.
        rows: (first, last) of its rows, where it is several leaves in one; None for all.
        shape: of the whole tensor.
    """

    tensor: str
    rows: tuple[int, int] | None
    shape: tuple[int, ...]


def parse_config(config: Mapping[str, Any], **changes: str) -> tuple[LlamaConfig, FactorTable]:
    """The architecture and its rotation by length.

    Args:
        config: config.json's content, with `rope_parameters` or the older `rope_theta` and `rope_scaling`.
        changes: fields of `LlamaConfig` that no config.json knows: dtype, param_dtype, attention, remat.

    Raises:
        ValueError: lists all that is unsupported, missing or makes no sense.
    """
    problems = []
    architectures = config.get("architectures") or [None]
    if architectures[0] not in ARCHITECTURES:
        problems.append(f"architectures = {architectures} is not supported; known are {', '.join(ARCHITECTURES)}")
    rope = _rope(config)
    for name, wanted in _FIXED.items():
        value = config.get(name, rope.get(name))
        if value is not None and value != wanted:
            problems.append(f"{name} = {value!r} is not supported, only {wanted!r} is")
    if config.get("quantization_config"):
        problems.append("quantization_config: quantised weights are not supported")
    sizes = {}
    for ours, theirs in {**_SIZES, "original_length": "max_position_embeddings"}.items():
        sizes[ours] = config.get(theirs)
        if not isinstance(sizes[ours], int) or isinstance(sizes[ours], bool) or sizes[ours] < 1:
            problems.append(f"{theirs} = {sizes[ours]!r} must be a positive whole number")
    if problems:
        raise ValueError("; ".join(problems))
    max_length = sizes.pop("original_length")
    head_dim = config.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"]
    base = float(rope.get("rope_theta", 10000.0))
    table = from_huggingface(rope, head_dim, base, max_length)
    _tell_of_window(config.get("sliding_window"), max_length)
    model = LlamaConfig(
        **sizes,
        num_kv_heads=config.get("num_key_value_heads") or sizes["num_heads"],
        head_dim=head_dim,
        original_length=int(rope.get("original_max_position_embeddings") or max_length),
        rope_theta=base,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        **changes,
    )
    return model, table


def origins(config: LlamaConfig, fused: bool) -> dict[str, Origin]:
    """Leaf of the parameters, as a path -> the tensor it comes from. Leaves below "layers" have one a layer.

    Args:
        fused: Phi-3's way: query, key and value are one tensor, gate and up another.
    """
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    parts = {
        "attention/query": ("self_attn.q_proj", queries, "self_attn.qkv_proj"),
        "attention/key": ("self_attn.k_proj", keys, "self_attn.qkv_proj"),
        "attention/value": ("self_attn.v_proj", keys, "self_attn.qkv_proj"),
        "mlp/gate": ("mlp.gate_proj", inner, "mlp.gate_up_proj"),
        "mlp/up": ("mlp.up_proj", inner, "mlp.gate_up_proj"),
    }
    found = {"embed/embedding": Origin("model.embed_tokens.weight", None, (vocab, hidden))}
    starts: dict[str, int] = {}
    totals = {"self_attn.qkv_proj": queries + 2 * keys, "mlp.gate_up_proj": 2 * inner}
    for leaf, (alone, rows, together) in parts.items():
        if fused:
            start = starts.get(together, 0)
            starts[together] = start + rows
            origin = Origin(_in_layer(together), (start, start + rows), (totals[together], hidden))
        else:
            origin = Origin(_in_layer(alone), None, (rows, hidden))
        found[f"layers/{leaf}/kernel"] = origin
    found |= {
        "layers/attention/output/kernel": Origin(_in_layer("self_attn.o_proj"), None, (hidden, queries)),
        "layers/mlp/down/kernel": Origin(_in_layer("mlp.down_proj"), None, (hidden, inner)),
        "layers/attention_norm/scale": Origin(_in_layer("input_layernorm"), None, (hidden,)),
        "layers/mlp_norm/scale": Origin(_in_layer("post_attention_layernorm"), None, (hidden,)),
        "final_norm/scale": Origin("model.norm.weight", None, (hidden,)),
    }
    if not config.tie_embeddings:
        found["lm_head"] = Origin("lm_head.weight", None, (vocab, hidden))
    return found


def _in_layer(name: str) -> str:
    return f"model.layers.{{}}.{name}.weight"


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about the rotation in the new spelling: what was beside `rope_scaling` is inside."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    for name in ("rope_theta", "original_max_position_embeddings"):
        if rope.get(name) is None and config.get(name) is not None:
            rope[name] = config[name]
    return rope


def _tell_of_window(window: int | None, max_length: int) -> None:
    if window and window < max_length:
        logging.warning(
            "sliding_window = %d of %d: attention is full here; up to %d tokens that is the same", window, max_length,
            window,
        )  # fmt: skip
