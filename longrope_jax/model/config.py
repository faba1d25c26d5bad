"""The architecture of a LLaMA, and presets of well-known models."""

from dataclasses import dataclass
from typing import Annotated

from longrope_jax.model.attention import BACKENDS
from longrope_jax.settings import PositiveFloat, PositiveInt, Rule, Settings, one_of

FLOAT_TYPES = ("float32", "bfloat16")
REMAT_POLICIES = (
    "none",
    "nothing_saveable",
    "attention_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
)


@dataclass(frozen=True)
class LlamaConfig(Settings):
    """Sizes and numerics of a LLaMA; hashable, so it can be static under `jit`. Named presets: `LlamaConfig.preset`.

    Attributes:
        vocab_size: V.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU layer.
        num_layers: how many blocks (compile time does not depend on it).
        num_heads: H, query heads.
        num_kv_heads: K, key and value heads; H must be a multiple (grouped-query attention).
        head_dim: D, even.
        original_length: L, the context that the model was pretrained for (tokens).
        rope_theta: RoPE base.
        norm_eps: epsilon of RMSNorm.
        tie_embeddings: the output head is the embedding, transposed.
        dtype: of activations and matrix products; norms, softmax, logits and losses are float32 regardless.
        param_dtype: of parameters.
        attention: backend, see `model/attention.py`.
        remat: what a block saves for the backward pass: "none" saves all, "nothing_saveable" recomputes all,
            "attention_saveable" recomputes all but the attention itself, which is most of the work at long T; the
            others are policies of `jax.checkpoint_policies`.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    original_length: PositiveInt
    rope_theta: Annotated[float, Rule(lambda theta: theta > 1, "must be above 1")] = 10000.0
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    dtype: Annotated[str, one_of(FLOAT_TYPES)] = "float32"
    param_dtype: Annotated[str, one_of(FLOAT_TYPES)] = "float32"
    attention: Annotated[str, one_of(BACKENDS)] = "auto"
    remat: Annotated[str, one_of(REMAT_POLICIES)] = "none"

    def __post_init__(self):
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: rotary embedding turns pairs")

    @classmethod
    def preset(cls, name: str, **changes) -> "LlamaConfig":
        """A model by name, with some fields changed: `LlamaConfig.preset("llama2_7b", dtype="bfloat16")`.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; known are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


_SEVEN_B = dict(hidden_size=4096, num_layers=32, num_heads=32, head_dim=128)

PRESETS: dict[str, dict] = {
    # A byte-level model that learns real text on a laptop in minutes: 0.57M parameters.
    "tiny": dict(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=352,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        original_length=128,
    ),
    "llama2_7b": dict(_SEVEN_B, vocab_size=32000, intermediate_size=11008, num_kv_heads=32, original_length=4096),
    "llama3_8b": dict(
        _SEVEN_B,
        vocab_size=128256,
        intermediate_size=14336,
        num_kv_heads=8,
        original_length=8192,
        rope_theta=500000.0,
    ),
    # v0.1 without its 4k sliding window: LongRoPE extends full attention.
    "mistral_7b": dict(_SEVEN_B, vocab_size=32000, intermediate_size=14336, num_kv_heads=8, original_length=8192),
    "phi3_mini": dict(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        original_length=4096,
    ),
    "smollm2_135m": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        original_length=8192,
        rope_theta=100000.0,
        tie_embeddings=True,
    ),
}
