"""The fused attention of cuDNN on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TYPES = ("bfloat16", "float16")


def takes(dtype: jnp.dtype, head_dim: int, has_segments: bool) -> bool:
    """Whether the kernel can do it: half precision, a head dim of up to 128 that is a multiple of 8, and one text a
    sequence (it would need a mask of T x T bytes).
    """
    return jnp.dtype(dtype).name in _TYPES and head_dim <= 128 and not head_dim % 8 and not has_segments


def attend(
    query: Float[Array, "B T H D"], key: Float[Array, "B T K D"], value: Float[Array, "B T K D"]
) -> Float[Array, "B T H D"]:
    """Attention of sequences whose tokens lie in their order, see `attention.attention`. Memory O(B T H D).

    Raises:
        ValueError: it is not in half precision, or heads are too wide.
    """
    if not takes(query.dtype, query.shape[-1], has_segments=False):
        raise ValueError(
            f"attention = 'cudnn' computes in {' or '.join(_TYPES)} with a head dim of 8, 16, ... 128, not in "
            f"{query.dtype} with {query.shape[-1]}"
        )
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
