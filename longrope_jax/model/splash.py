"""Attention by the Pallas kernels that JAX has for TPUs ("splash": sparse flash attention).

The kernels themselves are JAX's, called below their usual entrance: there, a mask is an object of the host that takes
O(T^2) to go through, is the same for every shard, and gives residuals forward but no backward pass that could use those
of a softmax over other keys too. What they take is put together here instead, on the device, from the tokens at hand:

* for every query, the first and the last key that it may see; from these, which blocks to skip;
* the kernels compare the last key with the numbers of the keys in a block, and the segments of both: no mask is stored.

A last key says everything where keys of one segment come in the order of their positions, as in all shards of texts
that are whole, in zigzag, or packed. For any other order `blockwise` takes over.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from longrope_jax.model import blockwise
from longrope_jax.model.attention_parts import MASKED, Tokens, even_block, may_attend

_LANES = 128  # what the kernels want blocks to be a multiple of
_COMPARED_PAIRS = 2**24  # pairs of a query and a key, to find last keys
_MASK_VALUE = kernels.DEFAULT_MASK_VALUE


class Blocks(NamedTuple):
    """Tokens a block, at most: what a step of a kernel's grid brings into the chip's fast memory.

    Attributes:
        whole: what arguments are padded to, and the blocks of the forward pass.
        scored: keys whose scores are computed together in a forward block.
        backward: queries and keys in the two kernels of the backward pass.
    """

    whole: int
    scored: int
    backward: int


# The largest that the compiler finds room for, in bfloat16, with a head dim of up to 128; by JAX's name of the chip.
# Larger blocks read keys less often: at 1024 queries a block, HBM could bring them several times as fast as needed.
_LARGEST = {"TPU v6 lite": Blocks(2048, 1024, 1024), "TPU7x": Blocks(2048, 1024, 1024)}
_DEFAULT = Blocks(1024, 512, 1024)  # v4, v5e, v5p: 16 MiB for a kernel
_WIDE = Blocks(512, 512, 512)  # float32, or a head dim above 128


def blocks_for(head_dim: int, dtype: jnp.dtype) -> Blocks:
    """For the chip that is being traced for."""
    if head_dim > 128 or jnp.dtype(dtype).itemsize > 2:
        return _WIDE
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return _LARGEST.get(device.device_kind, _DEFAULT)


def choose_block(length: int, runs: int, head_dim: int, dtype: jnp.dtype) -> int:
    """See `blockwise.choose_block`."""
    return even_block(-(-length // runs), blocks_for(head_dim, dtype).whole, _LANES)


def forward(
    block: int,
    query: Float[Array, "B K G T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S D"],
    queries: Tokens,
    keys: Tokens,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> tuple[Float[Array, "B K G T D"], Float[Array, "B K G T"]]:
    """See `blockwise.forward`. The mixed values are rounded to the type of `query` before they become `dtype`."""

    scored = _part(block, blocks_for(query.shape[-1], query.dtype).scored)

    def row(query, key, value, queries, keys):
        out, (log_sum,) = kernels._splash_attention_forward(
            _schedule(block, key.shape[1], _reach(queries, keys)),
            _scaled(query),
            key,
            value,
            _segments(queries, keys),
            sinks=None,
            mask_value=_MASK_VALUE,
            is_mqa=False,
            block_sizes=kernels.BlockSizes(block, block, scored),
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=_is_visible,
            interpret=interpret,
        )
        # Who has seen nothing has the mean of a block, or nothing divided by nothing.
        out = jnp.where((log_sum > MASKED)[..., None], out, 0).astype(dtype)
        return out.reshape(query.shape), jnp.maximum(log_sum, MASKED).reshape(query.shape[:-1])

    otherwise = partial(blockwise.forward, block, dtype=dtype)
    return jax.lax.cond(_in_text_order(keys), _by_row(row), otherwise, query, key, value, queries, keys)


def backward(
    block: int,
    query: Float[Array, "B K G T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S D"],
    queries: Tokens,
    keys: Tokens,
    log_sum: Float[Array, "B K G T"],
    correction: Float[Array, "B K G T"],
    d_out: Float[Array, "B K G T D"],
    dtype: jnp.dtype,
    interpret: bool = False,
) -> tuple[Float[Array, "B K G T D"], Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """See `blockwise.backward`. Gradients are rounded to the types of query and key before they become `dtype`."""
    size = _part(block, blocks_for(query.shape[-1], query.dtype).backward)

    def row(query, key, value, queries, keys, log_sum, correction, d_out):
        heads = query.shape[0] * query.shape[1]
        reach = _reach(queries, keys)
        arguments = (
            _scaled(query),
            key,
            value,
            _segments(queries, keys),
            None,  # sinks
            log_sum.reshape(heads, -1),
            d_out.reshape(heads, *d_out.shape[2:]),
            correction.reshape(heads, -1),
        )
        how: dict[str, Any] = dict(
            bq=size,
            bkv=size,
            is_mqa=False,
            mask_value=_MASK_VALUE,
            attn_logits_soft_cap=None,
            mask_function=_is_visible,
            interpret=interpret,
            **_LAYOUT,
        )
        by_key = _schedule(size, key.shape[1], reach, by_key=True)
        _, d_key, d_value = kernels._splash_attention_bwd_dkv(
            *arguments, bkv_compute=size, mask_info=by_key, use_fused_bwd_kernel=False, **how
        )
        by_query = _schedule(size, key.shape[1], reach)
        d_query = kernels._splash_attention_bwd_dq(*arguments, mask_info=by_query, **how)
        d_query = d_query.astype(jnp.float32) * query.shape[-1] ** -0.5  # d_key has it from the scaled queries
        return d_query.astype(dtype).reshape(query.shape), d_key.astype(dtype), d_value.astype(dtype)

    otherwise = partial(blockwise.backward, block, dtype=dtype)
    arguments = query, key, value, queries, keys, log_sum, correction, d_out
    return jax.lax.cond(_in_text_order(keys), _by_row(row), otherwise, *arguments)


_LAYOUT = {f"{name}_layout": kernels.QKVLayout.HEAD_DIM_MINOR for name in "qkv"}


def _by_row(function):
    """The kernels know no batch. Tokens that all sequences share become every sequence's."""

    def rows(query, key, value, queries, keys, *others):
        queries, keys = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(query), *x.shape[1:])), (queries, keys))
        return jax.lax.map(lambda row: function(*row), (query, key, value, queries, keys, *others))

    return rows


def _scaled(query: Float[Array, "K G T D"]) -> Float[Array, "H T D"]:
    """The kernels don't scale. Exact for D a power of four, else it rounds queries once more."""
    query = query.reshape(-1, *query.shape[2:])
    return (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)


def _is_visible(last_key: Int[Array, "T S"], key: Int[Array, "T S"]) -> Bool[Array, "T S"]:
    """The kernels' mask: of the last key that a query may see, and the number of a key."""
    return last_key >= key


def _segments(queries: Tokens, keys: Tokens) -> kernels.SegmentIds | None:
    if queries.segments is None or keys.segments is None:
        return None
    return kernels.SegmentIds(queries.segments, keys.segments)


def _reach(queries: Tokens, keys: Tokens) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
    """For every query of a row the numbers of the first and the last key that it may see; S and -1 if there is none.

    Time O(T S), a few operations for every pair, which the kernels spend a hundred times as many on.
    """
    count = len(keys.positions)
    numbers = jnp.arange(count, dtype=jnp.int32)

    def ends(query):
        seen = may_attend(*jax.tree.map(lambda x: x[None], (query, keys))).reshape(-1)
        return jnp.min(jnp.where(seen, numbers, count)), jnp.max(jnp.where(seen, numbers, -1))

    return jax.lax.map(ends, jax.tree.map(lambda x: x[:, None], queries), batch_size=_COMPARED_PAIRS // count)


def _schedule(block: int, count: int, reach: tuple[Int[Array, "T"], Int[Array, "T"]], by_key: bool = False) -> MaskInfo:
    """Which pairs of blocks of T queries and `count` keys the kernels compute, and what to fetch next meanwhile.

    Args:
        by_key: for the kernel that goes through all queries for a block of keys, not the other way round.
    """
    first, last = (x.reshape(-1, block) for x in reach)
    starts = jnp.arange(0, count, block)
    visible = (starts <= last.max(1)[:, None]) & (starts + block > first.min(1)[:, None])
    axis = 0 if by_key else 1
    numbers = jax.lax.broadcasted_iota(jnp.int32, visible.shape, axis)
    following = jax.lax.cummin(jnp.where(visible, numbers, visible.shape[axis]), axis, reverse=True)
    preceding = jax.lax.cummax(jnp.where(visible, numbers, 0), axis)
    # After the last one nothing is fetched.
    fetched = jnp.where(following < visible.shape[axis], following, preceding)
    # Small types: they are in the chip's scalar memory, which is small.
    sizes = fetched.astype(jnp.int16)[None], visible.astype(jnp.int8)[None]
    return MaskInfo(sizes[0], None, sizes[1], None, reach[1])  # type: ignore[arg-type]  # traced, where it has NumPy's


def _part(block: int, largest: int) -> int:
    """The largest part of a block, of at most so many tokens, into which it can be cut evenly."""
    return next(size for size in range(min(block, largest), 0, -_LANES) if block % size == 0)


def _in_text_order(keys: Tokens) -> Bool[Array, ""]:
    """Whether positions never fall within a segment, for sure: segments have to be numbered as they come, with at most
    those of padding, 0, at the end.
    """
    rises = keys.positions[:, 1:] >= keys.positions[:, :-1]
    if keys.segments is None:
        return rises.all()

    def rising(segments):
        same = segments[:, 1:] == segments[:, :-1]
        return jnp.all(jnp.where(same, rises, segments[:, 1:] > segments[:, :-1]))

    return rising(keys.segments) | rising(jnp.where(keys.segments == 0, jnp.iinfo(jnp.int32).max, keys.segments))
