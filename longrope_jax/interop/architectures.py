"""Supported architectures of Hugging Face: config.json -> `LlamaConfig`, and the tensor of every parameter."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging

from longrope_jax.errors import shortened
from longrope_jax.json_files import is_number, is_size
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable, from_huggingface
from longrope_jax.rope.huggingface import rope_type

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM")
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_MAX_HEAD_DIM = 2**16  # anything larger is a damaged file
_ORIGINAL = "original_max_position_embeddings"
_WITH_ORIGINAL = ("llama3", "yarn", "longrope")


class Rotation(NamedTuple):
    """The rotation of a model.

    Attributes:
        table: factors by length.
        head_dim: D.
        base: rope_theta.
        original_length: the context before any extension, tokens.
    """

    table: FactorTable
    head_dim: int
    base: float
    original_length: int


class CheckpointTensor(NamedTuple):
    """The tensor of a checkpoint that holds a parameter, or one layer of it.

    Attributes:
        tensor: its name; "{}" stands for the number of the layer.
        rows: (start, stop) of the parameter's rows if the tensor holds several parameters; None is all rows.
        shape: of the whole tensor.
    """

    tensor: str
    rows: tuple[int, int] | None
    shape: tuple[int, ...]


def parse_config(config: Mapping[str, Any], **changes: Any) -> tuple[LlamaConfig, FactorTable]:
    """The architecture and its rotation by length.

    Args:
        config: config.json's content, with `rope_parameters` or the older `rope_theta` and `rope_scaling`.
        changes: fields of `LlamaConfig` that config.json does not have: dtype, param_dtype, attention, remat.

    Raises:
        ValueError: lists everything that is unsupported, missing or wrong.
    """
    problems: list[str] = []
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or architectures[0] not in ARCHITECTURES:
        problems.append(
            f"architectures = {shortened(architectures)} is not supported; known are {', '.join(ARCHITECTURES)}"
        )
    for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        problems += _unsupported(config, name, wanted)
    if config.get("quantization_config"):
        problems.append("quantization_config: quantised weights are not supported")
    sizes: dict[str, Any] = {ours: _size(config, theirs, problems) for ours, theirs in _SIZES.items()}
    sizes["num_kv_heads"] = _size(config, "num_key_value_heads", problems, sizes["num_heads"] or 1)
    if not is_number(eps := config.get("rms_norm_eps"), 1e30) or eps <= 0:
        problems.append(f"rms_norm_eps = {shortened(eps)} must be a positive number")
    tied = config.get("tie_word_embeddings")
    if tied not in (None, True, False):
        problems.append(f"tie_word_embeddings = {shortened(tied)} must be true or false")
    rotation = _rotation(config, problems)
    if rotation is None or problems:
        raise _error(problems)
    _warn_of_window(config.get("sliding_window"), int(rotation.table.boundaries[-1]))
    model = LlamaConfig(
        **sizes,
        head_dim=rotation.head_dim,
        original_length=rotation.original_length,
        rope_theta=rotation.base,
        norm_eps=float(config["rms_norm_eps"]),
        tie_embeddings=bool(tied),
        **changes,
    )
    return model, rotation.table


def parse_rotation(config: Mapping[str, Any]) -> Rotation:
    """Reads only the rotation from config.json, of any architecture.

    Raises:
        ValueError: lists everything that is unsupported, missing or wrong.
    """
    problems: list[str] = []
    rotation = _rotation(config, problems)
    if rotation is None:
        raise _error(problems)
    return rotation


def checkpoint_tensors(config: LlamaConfig, fused: bool) -> dict[str, CheckpointTensor]:
    """Path of a parameter -> its tensor in the checkpoint. Parameters below "layers" have one tensor per layer.

    Args:
        fused: as in Phi-3: query, key and value are one tensor, gate and up another.
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
    tensors = {"embed/embedding": CheckpointTensor("model.embed_tokens.weight", None, (vocab, hidden))}
    sizes = {"self_attn.qkv_proj": queries + 2 * keys, "mlp.gate_up_proj": 2 * inner}
    starts = dict.fromkeys(sizes, 0)
    for leaf, (separate, rows, shared) in parts.items():
        tensors[f"layers/{leaf}/kernel"] = (
            CheckpointTensor(_in_layer(shared), (starts[shared], starts[shared] + rows), (sizes[shared], hidden))
            if fused
            else CheckpointTensor(_in_layer(separate), None, (rows, hidden))
        )
        starts[shared] += rows
    tensors |= {
        "layers/attention/output/kernel": CheckpointTensor(_in_layer("self_attn.o_proj"), None, (hidden, queries)),
        "layers/mlp/down/kernel": CheckpointTensor(_in_layer("mlp.down_proj"), None, (hidden, inner)),
        "layers/attention_norm/scale": CheckpointTensor(_in_layer("input_layernorm"), None, (hidden,)),
        "layers/mlp_norm/scale": CheckpointTensor(_in_layer("post_attention_layernorm"), None, (hidden,)),
        "final_norm/scale": CheckpointTensor("model.norm.weight", None, (hidden,)),
    }
    if not config.tie_embeddings:
        tensors["lm_head"] = CheckpointTensor("lm_head.weight", None, (vocab, hidden))
    return tensors


def _in_layer(name: str) -> str:
    return f"model.layers.{{}}.{name}.weight"


def _unsupported(config: Mapping[str, Any], name: str, wanted: Any) -> list[str]:
    """A problem if a config has a value that the model does not support."""
    value = config.get(name)
    return [] if value in (None, wanted) else [f"{name} = {shortened(value)} is not supported, only {wanted!r} is"]


def _rotation(config: Mapping[str, Any], problems: list[str]) -> Rotation | None:
    """The rotation; None if there are problems, which are appended."""
    max_length = _size(config, "max_position_embeddings", problems)
    hidden, heads = (_size(config, name, problems) for name in ("hidden_size", "num_attention_heads"))
    head_dim = _size(config, "head_dim", problems, hidden // heads if hidden and heads else 2)
    if head_dim is not None and (head_dim % 2 or head_dim > _MAX_HEAD_DIM):
        problems.append(
            f"head_dim = {head_dim} must be even (rotary embedding rotates pairs) and at most {_MAX_HEAD_DIM}"
        )
    rope = _rope(config)
    if not isinstance(rope, Mapping):
        problems.append(f"rope_parameters = {shortened(rope)} must be an object")
        return None
    for place in (config, rope):
        problems += _unsupported(place, "partial_rotary_factor", 1.0)
    original = _size(rope, _ORIGINAL, problems, max_length or 1)
    base = rope.get("rope_theta", 10000.0)
    if not is_number(base, 1e30) or base <= 1:
        problems.append(f"rope_theta = {shortened(base)} must be a number above 1")
    if problems:
        return None
    try:
        return Rotation(from_huggingface(rope, head_dim, float(base), max_length), head_dim, float(base), original)
    except ValueError as error:
        problems.append(str(error))
        return None


def _rope(config: Mapping[str, Any]) -> Any:
    """All settings of the rotation as `rope_parameters` has them, including those beside the older `rope_scaling`. If a
    number is in both places, the one that Transformers takes is taken.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        return rope
    beside = {name: config[name] for name in ("rope_theta", _ORIGINAL) if config.get(name) is not None}
    rope = beside | {name: value for name, value in rope.items() if value is not None}
    if rope_type(rope) in _WITH_ORIGINAL and _ORIGINAL in beside:
        rope[_ORIGINAL] = beside[_ORIGINAL]
    return rope


def _size(config: Mapping[str, Any], name: str, problems: list[str], default: int | None = None) -> int:
    """A positive whole number of a config; else 0, and one more problem."""
    value = config.get(name)
    value = default if value is None else value
    if is_size(value):
        return value
    problems.append(f"{name} = {shortened(value)} must be a positive whole number")
    return 0


def _error(problems: list[str]) -> ValueError:
    """One error for all problems."""
    return ValueError("; ".join(dict.fromkeys(problems)))


def _warn_of_window(window: Any, max_length: int) -> None:
    if isinstance(window, int) and 0 < window < max_length:
        logging.warning(
            "sliding_window = %d of %d is ignored: full attention is the same up to %d tokens",
            window, max_length, window,
        )  # fmt: skip
