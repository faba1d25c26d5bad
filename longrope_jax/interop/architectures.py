"""Supported architectures of Hugging Face: config.json -> `LlamaConfig`, and the tensor of every parameter."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from longrope_jax.json_files import POSITIVE, SIZE, field, is_number, is_size, optional, problems
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable, from_huggingface
from longrope_jax.rope.huggingface import ORIGINAL, rope_parameters
from longrope_jax.settings import Rule

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROPE_THETA = Rule(lambda value: is_number(value, 1e30) and value > 1, "must be a number above 1")
_FUSED = {
    "self_attn.qkv_proj": [f"layers/attention/{name}/kernel" for name in ("query", "key", "value")],
    "mlp.gate_up_proj": ["layers/mlp/gate/kernel", "layers/mlp/up/kernel"],
}
_MAX_HEAD_DIM = 2**16  # anything larger is a damaged file
_HEAD_DIM = Rule(
    lambda value: is_size(value) and value % 2 == 0 and value <= _MAX_HEAD_DIM,
    f"must be a positive even number (rotary embedding rotates pairs), at most {_MAX_HEAD_DIM}",
)


def only(value: Any) -> Rule:
    """The rule for a setting of which the model supports a single value, which is also the default."""
    return Rule(lambda given: given in (None, value), f"is not supported, only {value!r} is")


# Fields of `LlamaConfig`, and those of config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
# What config.json's fields may be.
_MODEL_RULES = {
    "architectures": Rule(
        lambda names: isinstance(names, list) and names[:1] != [] and names[0] in ARCHITECTURES,
        f"is not supported; known are {', '.join(ARCHITECTURES)}",
    ),
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    "mlp_bias": only(False),
    "quantization_config": Rule(lambda value: not value, "is not supported: quantised weights"),
    **dict.fromkeys(SIZES.values(), SIZE),
    "num_key_value_heads": optional(SIZE),
    "rms_norm_eps": POSITIVE,
    "tie_word_embeddings": Rule(lambda value: value in (None, True, False), "must be true or false"),
}
_ROTATION_RULES = {
    "max_position_embeddings": SIZE,
    "hidden_size": optional(SIZE),
    "num_attention_heads": optional(SIZE),
    "partial_rotary_factor": only(1.0),
}
_ROPE_RULES = {"partial_rotary_factor": only(1.0), ORIGINAL: optional(SIZE), "rope_theta": optional(_ROPE_THETA)}


class Rotation(NamedTuple):
    """The rotation of a model, as a file describes it.

    Attributes:
        table: factors by length.
        base: rope_theta; None if unknown.
        original_length: the context before any extension, tokens; None if unknown.
    """

    table: FactorTable
    base: float | None
    original_length: int | None

    def check(self) -> "Rotation":
        """Returns self; raises ValueError if a number is out of range."""
        rules = {"rope_theta": optional(_ROPE_THETA), "original_length": optional(SIZE)}
        if wrong := problems({"rope_theta": self.base, "original_length": self.original_length}, rules):
            raise ValueError("; ".join(wrong))
        return self


class CheckpointTensor(NamedTuple):
    """The tensor of a checkpoint that holds a parameter, or one layer of it.

    Attributes:
        tensor: its name; "{}" stands for the number of the layer.
        shape: of the whole tensor, [out, in] for a matrix.
        rows: those of the parameter, of which a tensor may hold several.
    """

    tensor: str
    shape: tuple[int, ...]
    rows: slice

    @property
    def is_stacked(self) -> bool:
        """Whether every layer has such a tensor; the parameter is a stack of them."""
        return "{}" in self.tensor

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter is [in, out], as all our matrices are, except the embedding."""
        return len(self.shape) == 2 and self.tensor != EMBEDDING


def parse_config(config: Mapping[str, Any], **changes: Any) -> tuple[LlamaConfig, FactorTable]:
    """The architecture and its rotation by length.

    Args:
        config: config.json's content, with `rope_parameters` or the older `rope_theta` and `rope_scaling`.
        changes: fields of `LlamaConfig` that config.json does not have: dtype, param_dtype, attention, remat.

    Raises:
        ValueError: lists everything that is unsupported, missing or wrong.
    """
    rotation = parse_rotation(config, problems(config, _MODEL_RULES))
    longest, window = int(rotation.table.boundaries[-1]), config.get("sliding_window")
    if isinstance(window, int) and 0 < window < longest:
        logging.warning(
            "sliding_window = %d of %d is ignored: full attention is the same up to %d tokens", window, longest, window
        )
    known: dict[str, Any] = {"rope_theta": rotation.base, "original_length": rotation.original_length}
    model = LlamaConfig(
        **known,
        **{ours: config[theirs] for ours, theirs in SIZES.items()},
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=2 * rotation.table.factors.lam.shape[-1],
        norm_eps=float(config["rms_norm_eps"]),
        tie_embeddings=bool(config.get("tie_word_embeddings")),
        **changes,
    )
    return model, rotation.table


def parse_rotation(config: Mapping[str, Any], wrong: Sequence[str] = ()) -> Rotation:
    """Reads only the rotation from config.json, of any architecture.

    Args:
        config: config.json's content.
        wrong: what else is wrong with it.

    Raises:
        ValueError: lists everything that is unsupported, missing or wrong.
    """
    rope = rope_parameters(config)
    wrong = [*wrong, *problems(config, _ROTATION_RULES), *problems(rope, _ROPE_RULES)]
    if wrong:
        raise ValueError("; ".join(dict.fromkeys(wrong)))
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    head_dim = field(config, "head_dim", _HEAD_DIM, hidden // heads if hidden and heads else None)
    base, longest = float(rope.get("rope_theta", 10000.0)), config["max_position_embeddings"]
    return Rotation(from_huggingface(rope, head_dim, base, longest), base, rope.get(ORIGINAL) or longest)


def checkpoint_tensors(config: LlamaConfig, fused: bool) -> dict[str, CheckpointTensor]:
    """Path of a parameter -> its tensor in the checkpoint: first the embedding, then all parameters below "layers",
    which have one tensor per layer, then the rest.

    Args:
        fused: as in Phi-3: query, key and value are one tensor, gate and up another.
    """
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    tensors = {
        "embed/embedding": _whole(EMBEDDING, vocab, hidden),
        "layers/attention/query/kernel": _whole(_in_layer("self_attn.q_proj"), queries, hidden),
        "layers/attention/key/kernel": _whole(_in_layer("self_attn.k_proj"), keys, hidden),
        "layers/attention/value/kernel": _whole(_in_layer("self_attn.v_proj"), keys, hidden),
        "layers/attention/output/kernel": _whole(_in_layer("self_attn.o_proj"), hidden, queries),
        "layers/mlp/gate/kernel": _whole(_in_layer("mlp.gate_proj"), inner, hidden),
        "layers/mlp/up/kernel": _whole(_in_layer("mlp.up_proj"), inner, hidden),
        "layers/mlp/down/kernel": _whole(_in_layer("mlp.down_proj"), hidden, inner),
        "layers/attention_norm/scale": _whole(_in_layer("input_layernorm"), hidden),
        "layers/mlp_norm/scale": _whole(_in_layer("post_attention_layernorm"), hidden),
        "final_norm/scale": _whole("model.norm.weight", hidden),
    }
    for name, parts in _FUSED.items() if fused else ():
        ends = list(itertools.accumulate(tensors[part].rows.stop for part in parts))
        for part, end in zip(parts, ends, strict=True):
            rows = slice(end - tensors[part].rows.stop, end)
            tensors[part] = CheckpointTensor(_in_layer(name), (ends[-1], hidden), rows)
    return tensors if config.tie_embeddings else tensors | {"lm_head": _whole(HEAD, vocab, hidden)}


def _in_layer(name: str) -> str:
    return f"model.layers.{{}}.{name}.weight"


def _whole(tensor: str, *shape: int) -> CheckpointTensor:
    return CheckpointTensor(tensor, shape, slice(0, shape[0]))
