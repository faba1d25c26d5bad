"""The fused attention of cuDNN on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TYPES = ("bfloat16", "float16")


def takes(dtype: jnp.dtype, has_segments: bool) -> bool:
    """Whether the kernel can do it: half precision, and one text a sequence (it would need a mask of T x T bytes)."""
    return jnp.dtype(dtype).name in _TYPES and not has_segments


def attend(
    query: Float[Array, "B T H D"], key: Float[Array, "B T K D"], value: Float[Array, "B T K D"]
) -> Float[Array, "B T H D"]:
    """Attention of sequences whose tokens lie in their order, see `attention.attention`. Memory O(B T H D).

    Raises:
        ValueError: it is not in half precision.
    """
    if not takes(query.dtype, has_segments=False):
        raise ValueError(f"attention = 'cudnn' computes in {' or '.join(_TYPES)}, not in {query.dtype}")
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
