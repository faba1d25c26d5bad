"""Causal self-attention behind one signature: queries, keys, values, positions, segment ids -> mixed values.

A token attends to the tokens of its own segment whose position is not beyond its own. Positions are explicit, so
packing and any order of the tokens in memory work alike.

* `dense` builds the [T, T] scores: short, differentiable in every mode, the reference for the others; O(T^2) memory.
* `blockwise` walks over blocks of keys with an online softmax (FlashAttention, arXiv 2205.14135) and recomputes the
  blocks in its own backward pass: no memory in T beyond the O(T D) of its arguments, no work for blocks that nothing
  can attend to.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BLOCK = 256  # tokens; two cores' caches hold a block's scores, and a TPU's tiles divide it
_MASKED = -1e30  # finite: a block whose every score is masked must not make NaN
_NO_QUERY, _NO_KEY = np.int32(-1), np.int32(2**31 - 1)  # positions of padding: it sees nothing, nothing sees it


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    positions: Int[Array, "#B T"],
    segment_ids: Int[Array, "#B T"] | None = None,
    backend: str = "blockwise",
) -> Float[Array, "B T H D"]:
    """Grouped-query attention: query head h uses key head h // (H / K); logits are scaled by 1 / sqrt(D).

    Scores and softmax are float32, the result has the dtype of `value`. `positions` are tokens, non-negative.
    """
    return BACKENDS[backend](query, key, value, positions, segment_ids)


def dense(query: Array, key: Array, value: Array, positions: Array, segment_ids: Array | None = None) -> Array:
    """See `attention`. Time and memory O(B H T^2)."""
    mask = _may_attend(positions, positions, segment_ids, segment_ids)
    query, key, value = _by_kv_head(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = _scores(query, key, mask)
    # A row is never empty: every token sees itself.
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return _by_token(jnp.einsum("bkgts,bksd->bkgtd", weights, value))


def blockwise(
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
    segment_ids: Array | None = None,
    block: int = BLOCK,
) -> Array:
    """See `attention`. Reverse-mode derivatives only.

    Time O(B H D T^2 / 2) for tokens in order; memory O(B H T D) forward and backward, plus a byte of bookkeeping
    for every pair of blocks, (T / block)^2. Padding to a multiple of the block is done here.
    """
    length, kv_heads = query.shape[1], key.shape[2]
    block = min(block, length)
    query, key, value = _by_kv_head(query, kv_heads), key.swapaxes(1, 2), value.swapaxes(1, 2)
    pad = -length % block
    query, key, value = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (query, key, value))
    pad_tokens = partial(jnp.pad, pad_width=((0, 0), (0, pad)))
    where = (
        pad_tokens(positions, constant_values=_NO_QUERY),
        pad_tokens(positions, constant_values=_NO_KEY),
        None if segment_ids is None else pad_tokens(segment_ids, mode="edge"),
    )
    return _by_token(_blockwise(block, query, key, value, where)[..., :length, :])


BACKENDS = {"dense": dense, "blockwise": blockwise}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(block: int, query: Array, key: Array, value: Array, where: tuple) -> Array:
    """query [B, K, G, T, D], key and value [B, K, T, D], where (query positions, key positions, segments) -> as
    query.
    """
    return _forward(block, query, key, value, where)[0]


def _forward(block, query, key, value, where):
    """Returns the output, and the log-sum-exp of every query's scores f32[B, K, G, T], all that backward needs."""
    first, last = _key_blocks(block, where)

    def for_queries(i):
        q = _slice(query, i, block, axis=3)

        def for_keys(j, carry):
            mixed, total, highest = carry
            scores = _scores(q, _slice(key, j, block), _block_mask(block, where, i, j))
            new_highest = jnp.maximum(highest, scores.max(-1))
            weights = jnp.exp(scores - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + weights.sum(-1)
            v = _slice(value, j, block)
            mixed = mixed * shrink[..., None] + _product("bkgts,bksd->bkgtd", weights.astype(v.dtype), v)
            return mixed, total, new_highest

        rows = q.shape[:-1]
        start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.full(rows, _MASKED, jnp.float32))
        mixed, total, highest = jax.lax.fori_loop(first[i], last[i], for_keys, start)
        total = jnp.maximum(total, 1e-30)  # padding queries have seen nothing
        return (mixed / total[..., None]).astype(value.dtype), highest + jnp.log(total)

    out, log_sum = jax.lax.map(for_queries, jnp.arange(query.shape[3] // block))
    return _join(out, axis=3), _join(log_sum, axis=3)


def _blockwise_fwd(block, query, key, value, where):
    out, log_sum = _forward(block, query, key, value, where)
    return out, (query, key, value, where, out, log_sum)


def _blockwise_bwd(block, saved, d_out):
    """One walk over all block pairs: dk, dv of a key block are complete after its inner loop, dq is added up in
    place.
    """
    query, key, value, where, out, log_sum = saved
    # Query blocks that see key block j: the transposed relation.
    first, last = _query_blocks(block, where)
    correction = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def for_keys(d_query, j):
        k, v = _slice(key, j, block), _slice(value, j, block)

        def for_queries(i, carry):
            d_query, d_k, d_v = carry
            q, d_o = _slice(query, i, block, axis=3), _slice(d_out, i, block, axis=3)
            scores = _scores(q, k, _block_mask(block, where, i, j))
            weights = jnp.exp(scores - _slice(log_sum, i, block, axis=3)[..., None])
            d_weights = _product("bkgtd,bksd->bkgts", d_o, v)
            d_scores = weights * (d_weights - _slice(correction, i, block, axis=3)[..., None]) * q.shape[-1] ** -0.5
            d_scores = d_scores.astype(q.dtype)
            d_v += _product("bkgts,bkgtd->bksd", weights.astype(v.dtype), d_o)
            d_k += _product("bkgts,bkgtd->bksd", d_scores, q)
            d_q = _slice(d_query, i, block, axis=3) + _product("bkgts,bksd->bkgtd", d_scores, k)
            return jax.lax.dynamic_update_slice_in_dim(d_query, d_q, i * block, axis=3), d_k, d_v

        zeros = jnp.zeros(k.shape, jnp.float32)
        d_query, d_k, d_v = jax.lax.fori_loop(first[j], last[j], for_queries, (d_query, zeros, zeros))
        return d_query, (d_k.astype(key.dtype), d_v.astype(value.dtype))

    blocks = jnp.arange(key.shape[2] // block)
    d_query, (d_key, d_value) = jax.lax.scan(for_keys, jnp.zeros(query.shape, jnp.float32), blocks)
    return d_query.astype(query.dtype), _join(d_key, axis=2), _join(d_value, axis=2), None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def _visible(block: int, where: tuple) -> Array:
    """bool[query blocks, key blocks]: may anything in the pair attend? Judged by ranges, so sometimes needlessly
    true.
    """
    query_positions, key_positions, segment_ids = where
    in_blocks = lambda x: x.reshape(x.shape[0], -1, block)  # noqa: E731
    ranges = [in_blocks(query_positions).max(-1), in_blocks(key_positions).min(-1)]
    if segment_ids is not None:
        ranges += [in_blocks(segment_ids).min(-1), in_blocks(segment_ids).max(-1)]

    def in_sequence(latest, earliest, low=None, high=None):
        visible = latest[:, None] >= earliest
        if low is not None:
            visible &= (high[:, None] >= low) & (low[:, None] <= high)
        return visible

    # One sequence after the other: a table of all would be B times as large.
    nothing = jnp.zeros((ranges[0].shape[1], ranges[1].shape[1]), bool)
    return jax.lax.scan(lambda seen, row: (seen | in_sequence(*row), None), nothing, ranges)[0]


def _key_blocks(block, where):
    """For every query block the range [first, last) of key blocks that it has to look at."""
    return _range(_visible(block, where))


def _query_blocks(block, where):
    """For every key block the range [first, last) of query blocks that look at it."""
    return _range(_visible(block, where).T)


def _range(visible):
    count = visible.shape[1]
    some = visible.any(1)
    first = jnp.where(some, visible.argmax(1), 0)
    return first, jnp.where(some, count - visible[:, ::-1].argmax(1), 0)


def _block_mask(block, where, i, j):
    query_positions, key_positions, segment_ids = where
    segments = [None if segment_ids is None else _slice(segment_ids, n, block, axis=1) for n in (i, j)]
    positions = _slice(query_positions, i, block, axis=1), _slice(key_positions, j, block, axis=1)
    return _may_attend(*positions, *segments)


def _may_attend(query_positions, key_positions, query_segments, key_segments):
    """[B or 1, 1, 1, queries, keys]"""
    mask = key_positions[:, None, :] <= query_positions[:, :, None]
    if query_segments is not None:
        mask &= key_segments[:, None, :] == query_segments[:, :, None]
    return mask[:, None, None]


def _scores(query, key, mask):
    scores = _product("bkgtd,bksd->bkgts", query, key) * query.shape[-1] ** -0.5
    return jnp.where(mask, scores, _MASKED)


def _product(subscripts, left, right):
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _by_kv_head(query, kv_heads):
    """[B, T, H, D] -> [B, K, G, T, D], the G query heads of a key head side by side."""
    batch, length, heads, dim = query.shape
    return query.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def _by_token(out):
    """[B, K, G, T, D] -> [B, T, H, D]"""
    batch, kv_heads, groups, length, dim = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, dim)


def _slice(x, index, block, axis=2):
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _join(blocks, axis):
    """[N, ..., block at `axis`, ...] -> [..., N * block at `axis`, ...]"""
    blocks = jnp.moveaxis(blocks, 0, axis)
    return blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])
