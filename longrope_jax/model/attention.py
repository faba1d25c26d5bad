"""Causal self-attention behind one signature: queries, keys, values, positions, segment ids -> mixed values.

A token attends to the tokens of its own segment whose position is not beyond its own. Positions are explicit, so
packing and any order of the tokens in memory work alike.

* `dense` builds the [T, T] scores: short, differentiable in every mode, the reference for the others; O(T^2) memory.
* `blockwise` walks over blocks of keys with an online softmax (FlashAttention, arXiv 2205.14135) and recomputes the
  blocks in its own backward pass: no memory in T beyond the O(T D) of its arguments, no work for blocks that nothing
  can attend to. Its two halves, `forward` and `backward`, let queries and keys be different tokens: the ring
  (`model/ring.py`) uses them on one shard of keys after the other.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BLOCK = 256  # tokens; two cores' caches hold a block's scores, and a TPU's tiles divide it
_LARGE_BLOCK, _LARGE_FROM = 512, 4096  # of so long a sequence the diagonal is little, and larger products are faster
MASKED = -1e30  # finite: a block whose every score is masked must not make NaN
_NO_QUERY, _NO_KEY = np.int32(-1), np.int32(2**31 - 1)  # positions of padding: it sees nothing, nothing sees it


class Tokens(NamedTuple):
    """Who may see whom: the place of every token, and the segment that it belongs to where there are several."""

    positions: Int[Array, "#B T"]
    segments: Int[Array, "#B T"] | None


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
    tokens = Tokens(positions, segment_ids)
    mask = _may_attend(tokens, tokens)
    query, key, value = _by_kv_head(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = _scores(query, key, mask)
    # A row is never empty: every token sees itself.
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return by_token(jnp.einsum("bkgts,bksd->bkgtd", weights, value), query.shape[3])


def blockwise(
    query: Array,
    key: Array,
    value: Array,
    positions: Array,
    segment_ids: Array | None = None,
    block: int | None = None,
) -> Array:
    """See `attention`. Reverse-mode derivatives only. The block is chosen by the length if none is given.

    Time O(B H D T^2 / 2) for tokens in order; memory O(B H T D) forward and backward, plus a byte of bookkeeping
    for every pair of blocks, (T / block)^2. Padding to a multiple of the block is done here.
    """
    length = query.shape[1]
    block = min(block or (_LARGE_BLOCK if length >= _LARGE_FROM else BLOCK), length)
    return by_token(_blockwise(block, *in_blocks(block, query, key, value, Tokens(positions, segment_ids))), length)


BACKENDS = {"dense": dense, "blockwise": blockwise}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(block: int, query: Array, key: Array, value: Array, queries: Tokens, keys: Tokens) -> Array:
    """Arguments as `in_blocks` makes them -> as query."""
    return forward(block, query, key, value, queries, keys, value.dtype)[0]


def _blockwise_fwd(block, query, key, value, queries, keys):
    out, log_sum = forward(block, query, key, value, queries, keys, value.dtype)
    return out, (query, key, value, queries, keys, out, log_sum)


def _blockwise_bwd(block, saved, d_out):
    *arguments, out, log_sum = saved
    return *backward(block, *arguments, log_sum, correction(d_out, out), d_out, out.dtype), None, None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def in_blocks(
    block: int,
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    tokens: Tokens,
) -> tuple[Float[Array, "B K G N D"], Float[Array, "B K N D"], Float[Array, "B K N D"], Tokens, Tokens]:
    """The arguments of `forward` for tokens that attend to each other: query, key, value, queries, keys.

    Heads come first, the G query heads of a key head side by side, and T is padded to N, a multiple of the block.
    """
    pad = -query.shape[1] % block
    query, key, value = _by_kv_head(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    query, key, value = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (query, key, value))
    pad_tokens = partial(jnp.pad, pad_width=((0, 0), (0, pad)))
    segments = None if tokens.segments is None else pad_tokens(tokens.segments, mode="edge")
    queries, keys = (pad_tokens(tokens.positions, constant_values=nowhere) for nowhere in (_NO_QUERY, _NO_KEY))
    return query, key, value, Tokens(queries, segments), Tokens(keys, segments)


def forward(
    block: int,
    query: Float[Array, "B K G T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S D"],
    queries: Tokens,
    keys: Tokens,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "B K G T D"], Float[Array, "B K G T"]]:
    """T queries attend to S keys, which may be only some of all keys: T and S are multiples of the block.

    Returns the mixed values in `dtype`, and the log-sum-exp of every query's scores in float32: all that `backward`
    needs, and all that merging with the result for other keys needs. A query that sees no key has a log-sum-exp of
    about -1e30 and a finite output.
    """
    first, last = key_blocks(block, queries, keys)

    def for_queries(i):
        q, q_tokens = _slice(query, i, block, axis=3), _slice_tokens(queries, i, block)

        def for_keys(j, carry):
            mixed, total, highest = carry
            scores = _scores(q, _slice(key, j, block), _may_attend(q_tokens, _slice_tokens(keys, j, block)))
            new_highest = jnp.maximum(highest, scores.max(-1))
            weights = jnp.exp(scores - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + weights.sum(-1)
            v = _slice(value, j, block)
            mixed = mixed * shrink[..., None] + _product("bkgts,bksd->bkgtd", weights.astype(v.dtype), v)
            return mixed, total, new_highest

        rows = q.shape[:-1]
        start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.full(rows, MASKED, jnp.float32))
        mixed, total, highest = jax.lax.fori_loop(first[i], last[i], for_keys, start)
        total = jnp.maximum(total, 1e-30)  # some queries have seen nothing
        return (mixed / total[..., None]).astype(dtype), highest + jnp.log(total)

    out, log_sum = jax.lax.map(for_queries, jnp.arange(query.shape[3] // block))
    return _join(out, axis=3), _join(log_sum, axis=3)


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
) -> tuple[Float[Array, "B K G T D"], Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """What these S keys contribute to the gradients of query, key and value, in `dtype`.

    `log_sum` and `correction` (see there) are of the whole softmax, over all keys. One walk over all block pairs: the
    gradients of a key block are complete after its inner loop, the queries' are added up in place, in float32.
    """
    # Query blocks that see key block j: the transposed relation.
    first, last = query_blocks(block, queries, keys)

    def for_keys(d_query, j):
        k, v, k_tokens = _slice(key, j, block), _slice(value, j, block), _slice_tokens(keys, j, block)

        def for_queries(i, carry):
            d_query, d_k, d_v = carry
            q, d_o = _slice(query, i, block, axis=3), _slice(d_out, i, block, axis=3)
            scores = _scores(q, k, _may_attend(_slice_tokens(queries, i, block), k_tokens))
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
        return d_query, (d_k.astype(dtype), d_v.astype(dtype))

    blocks = jnp.arange(key.shape[2] // block)
    d_query, (d_key, d_value) = jax.lax.scan(for_keys, jnp.zeros(query.shape, jnp.float32), blocks)
    return d_query.astype(dtype), _join(d_key, axis=2), _join(d_value, axis=2)


PARTIAL_BACKENDS = {"blockwise": (forward, backward)}  # backends that can attend to some keys now and to others later


def correction(d_out: Float[Array, "*rows D"], out: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
    """What softmax's derivative subtracts from the gradient of every weight of a row: d_out . out, in float32."""
    return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)


def by_token(out: Float[Array, "B K G N D"], length: int) -> Float[Array, "B T H D"]:
    """Undoes what `in_blocks` does to queries."""
    batch, kv_heads, groups, _, dim = out.shape
    return out[..., :length, :].transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, dim)


def key_blocks(block: int, queries: Tokens, keys: Tokens) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """For every query block the range [first, last) of key blocks that it has to look at."""
    return _range(_visible(block, queries, keys))


def query_blocks(block: int, queries: Tokens, keys: Tokens) -> tuple[Int[Array, "M"], Int[Array, "M"]]:
    """For every key block the range [first, last) of query blocks that look at it."""
    return _range(_visible(block, queries, keys).T)


def _visible(block: int, queries: Tokens, keys: Tokens) -> Array:
    """bool[query blocks, key blocks]: may anything in the pair attend? Judged by ranges, so sometimes needlessly
    true.
    """
    split = lambda x: x.reshape(x.shape[0], -1, block)  # noqa: E731
    ranges = [split(queries.positions).max(-1), split(keys.positions).min(-1)]
    if queries.segments is not None:
        ranges += [reduce(split(x.segments), -1) for x in (queries, keys) for reduce in (jnp.min, jnp.max)]
    batch = max(x.shape[0] for x in ranges)
    ranges = [jnp.broadcast_to(x, (batch, x.shape[1])) for x in ranges]

    def in_sequence(latest, earliest, *segments):
        visible = latest[:, None] >= earliest
        if segments:
            query_low, query_high, key_low, key_high = segments
            visible &= (query_high[:, None] >= key_low) & (query_low[:, None] <= key_high)
        return visible

    # One sequence after the other: a table of all would be B times as large.
    nothing = jnp.zeros((ranges[0].shape[1], ranges[1].shape[1]), bool)
    return jax.lax.scan(lambda seen, row: (seen | in_sequence(*row), None), nothing, ranges)[0]


def _range(visible):
    count = visible.shape[1]
    some = visible.any(1)
    first = jnp.where(some, visible.argmax(1), 0)
    return first, jnp.where(some, count - visible[:, ::-1].argmax(1), 0)


def _may_attend(queries: Tokens, keys: Tokens) -> Array:
    """[B or 1, 1, 1, queries, keys]"""
    mask = keys.positions[:, None, :] <= queries.positions[:, :, None]
    if queries.segments is not None:
        mask = mask & (keys.segments[:, None, :] == queries.segments[:, :, None])
    return mask[:, None, None]


def _scores(query, key, mask):
    scores = _product("bkgtd,bksd->bkgts", query, key) * query.shape[-1] ** -0.5
    return jnp.where(mask, scores, MASKED)


def _product(subscripts, left, right):
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _by_kv_head(query, kv_heads):
    """[B, T, H, D] -> [B, K, G, T, D], the G query heads of a key head side by side."""
    batch, length, heads, dim = query.shape
    return query.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def _slice(x, index, block, axis=2):
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _slice_tokens(tokens, index, block):
    return jax.tree.map(lambda x: _slice(x, index, block, axis=1), tokens)


def _join(blocks, axis):
    """[N, ..., block at `axis`, ...] -> [..., N * block at `axis`, ...]"""
    blocks = jnp.moveaxis(blocks, 0, axis)
    return blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])
