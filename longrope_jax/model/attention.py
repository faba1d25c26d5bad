"""Causal self-attention behind one signature: queries, keys, values, positions, segment ids -> mixed values.

A token attends to the tokens of its own segment up to its own position. Positions are explicit, so packed sequences
and any order of tokens in memory work.

* `dense` computes all [T, T] scores: short, differentiable in every mode, the reference for the others; O(T^2) memory.
* `blockwise` is JAX code for any device (`model/blockwise.py`).
* `splash` are JAX's Pallas kernels for TPUs (`model/splash.py`); `splash_interpreted` the same kernels in slow
  interpreter mode, on any device.
* `cudnn` is the fused attention of NVIDIA GPUs.
* `auto` is the fastest of them that the platform and the arguments allow.

All but `dense` recompute scores in their own backward pass, so memory is O(B T (H + K) D). `PARTIAL_BACKENDS` have two
functions, `forward` and `backward`, whose queries and keys may be different tokens: the ring (`model/ring.py`) calls
them with one shard of keys after the other.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longrope_jax.model import blockwise, splash
from longrope_jax.model.attention_parts import (
    Tokens,
    by_kv_head,
    by_token,
    correction,
    in_blocks,
    masked_scores,
    may_attend,
    saveable,
)


class Partial(NamedTuple):
    """A backend that can attend to a part of the keys.

    Attributes:
        choose_block: (tokens, runs of text that they are, head dim, dtype) -> tokens a block.
        forward: see `blockwise.forward`.
        backward: see `blockwise.backward`.
    """

    choose_block: Callable
    forward: Callable
    backward: Callable


PARTIAL_BACKENDS = {
    "blockwise": Partial(blockwise.choose_block, blockwise.forward, blockwise.backward),
    "splash": Partial(splash.choose_block, splash.forward, splash.backward),
    "splash_interpreted": Partial(
        splash.choose_block, partial(splash.forward, interpret=True), partial(splash.backward, interpret=True)
    ),
}
_CUDNN_TYPES = ("bfloat16", "float16")
BACKENDS = ("auto", "dense", *PARTIAL_BACKENDS, "cudnn")
_NEEDS = {"splash": "tpu", "cudnn": "gpu"}  # platforms of the backends that don't run everywhere


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    positions: Int[Array, "#B T"],
    segment_ids: Int[Array, "#B T"] | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H D"]:
    """Grouped-query attention: query head h uses key head h // (H / K); logits are scaled by 1 / sqrt(D).

    Scores and softmax are float32, the result has the dtype of `value`. `positions` are tokens, non-negative. Time
    O(B H D T^2 / 2) for tokens in order.

    Raises:
        ValueError: the backend can't run here, or not on these arguments.
    """
    backend = resolve(backend, running_on())
    if backend == "auto":  # on a GPU, whose fused kernel supports neither float32 nor segments
        backend = "cudnn" if cudnn_takes(query.dtype, query.shape[-1], segment_ids is not None) else "blockwise"
    if backend == "dense":
        return dense(query, key, value, positions, segment_ids)
    if backend == "cudnn":
        return _cudnn(query, key, value, positions, segment_ids)
    return whole(PARTIAL_BACKENDS[backend], query, key, value, positions, segment_ids)


def running_on() -> str:
    """The platform to trace for: that of the current mesh, which need not be of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def resolve(backend: str, platform: str) -> str:
    """The backend of a name on a platform; stays "auto" on a GPU, where it depends on the arguments.

    Raises:
        ValueError: it can't run there.
    """
    check_platform(backend, platform)
    if backend != "auto" or platform == "gpu":
        return backend
    return "splash" if platform == "tpu" else "blockwise"


def partial_backend(backend: str, platform: str) -> str:
    """The same for sequences that are sharded over devices; raises ValueError for a backend without `Partial`."""
    backend = resolve(backend, platform)
    if backend == "auto":
        return "blockwise"
    if backend not in PARTIAL_BACKENDS:
        able = [name for name in PARTIAL_BACKENDS if _NEEDS.get(name, platform) == platform]
        raise ValueError(
            f"attention = {backend!r} needs whole sequences; sharded over devices (seq > 1) they take {', '.join(able)}"
        )
    return backend


def check_platform(backend: str, platform: str) -> None:
    """Raises ValueError if a backend can't run on a platform ("cpu", "gpu" or "tpu")."""
    if _NEEDS.get(backend, platform) != platform:
        able = [name for name in BACKENDS if _NEEDS.get(name, platform) == platform]
        raise ValueError(f"attention = {backend!r} does not run on a {platform}; here run {', '.join(able)}")


def dense(query: Array, key: Array, value: Array, positions: Array, segment_ids: Array | None = None) -> Array:
    """See `attention` for the shapes: query [B, T, H, D]. Time and memory O(B H T^2)."""
    tokens = Tokens(positions, segment_ids)
    mask = may_attend(tokens, tokens)
    query, key, value = by_kv_head(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = masked_scores(query, key, mask)
    # No row is empty: every token attends to itself.
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return by_token(jnp.einsum("bkgts,bksd->bkgtd", weights, value), query.shape[3])


def _cudnn(query: Array, key: Array, value: Array, positions: Array, segment_ids: Array | None) -> Array:
    if segment_ids is not None:
        raise ValueError("attention = 'cudnn' can't keep the segments of a packed sequence apart; take 'blockwise'")
    # The kernel ignores positions. Tokens in another order are rare, but must be right.
    in_order = jnp.all(positions[:, 1:] > positions[:, :-1])
    otherwise = partial(whole, PARTIAL_BACKENDS["blockwise"], positions=positions)
    return jax.lax.cond(in_order, cudnn_attention, otherwise, query, key, value)


def whole(
    backend: Partial,
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
    segment_ids: Array | None = None,
    block: int | None = None,
) -> Array:
    """See `attention` (query [B, T, H, D]), by one of the `PARTIAL_BACKENDS`. Reverse-mode derivatives only.

    Memory O(B H T D) forward and backward, plus a few bytes of bookkeeping for every pair of blocks, (T / block)^2.
    Pads to a multiple of the block, which depends on the length if it is None.
    """
    length = query.shape[1]
    block = block or backend.choose_block(length, 1, query.shape[3], query.dtype)
    return by_token(
        _whole(backend, block, *in_blocks(block, query, key, value, Tokens(positions, segment_ids))), length
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(backend: Partial, block: int, query: Array, key: Array, value: Array, queries: Tokens, keys: Tokens):
    """Arguments as `in_blocks` makes them -> as query."""
    return backend.forward(block, query, key, value, queries, keys, value.dtype)[0]


def _whole_fwd(backend, block, query, key, value, queries, keys):
    out, log_sum = saveable(*backend.forward(block, query, key, value, queries, keys, value.dtype))
    return out, (query, key, value, queries, keys, out, log_sum)


def _whole_bwd(backend, block, saved, d_out):
    *arguments, out, log_sum = saved
    return *backend.backward(block, *arguments, log_sum, correction(d_out, out), d_out, out.dtype), None, None


_whole.defvjp(_whole_fwd, _whole_bwd)


def cudnn_takes(dtype: jnp.dtype, head_dim: int, has_segments: bool) -> bool:
    """Whether the kernel supports it: half precision, a head dim of up to 128 that is a multiple of 8, and one text per
    sequence (segments would need a mask of T x T bytes).
    """
    return jnp.dtype(dtype).name in _CUDNN_TYPES and head_dim <= 128 and not head_dim % 8 and not has_segments


def cudnn_attention(
    query: Float[Array, "B T H D"], key: Float[Array, "B T K D"], value: Float[Array, "B T K D"]
) -> Float[Array, "B T H D"]:
    """Attention of sequences whose tokens are in order, see `attention`. Memory O(B T H D).

    Raises:
        ValueError: no half precision, or heads are too wide.
    """
    if not cudnn_takes(query.dtype, query.shape[-1], has_segments=False):
        raise ValueError(
            f"attention = 'cudnn' computes in {' or '.join(_CUDNN_TYPES)} with a head dim of 8, 16, ... 128, not in "
            f"{query.dtype} with {query.shape[-1]}"
        )
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
