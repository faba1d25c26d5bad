"""Attention over blocks of keys with an online softmax (FlashAttention, arXiv 2205.14135), in plain JAX.

No memory in T beyond the O(T D) of its arguments, and no work for blocks that nothing can attend to.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longrope_jax.model.attention_parts import (
    Softmax,
    Tokens,
    even_block,
    key_blocks,
    masked_scores,
    may_attend,
    product,
    query_blocks,
)

BLOCK = 256  # tokens; two cores' caches hold a block's scores, and a TPU's tiles divide it
_LARGE_BLOCK, _LARGE_FROM = 512, 4096  # of so long a sequence the diagonal is little, and larger products are faster


def choose_block(length: int, runs: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Tokens a block for arguments of `length` tokens that are `runs` runs of text, one after the other."""
    if runs > 1:
        # A block with tokens of two chunks of a zigzag would span most of the sequence, and few could be skipped.
        return even_block(-(-length // runs), BLOCK)
    return min(_LARGE_BLOCK if length >= _LARGE_FROM else BLOCK, length)


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

        def for_keys(j, seen):
            scores = masked_scores(q, _slice(key, j, block), may_attend(q_tokens, _slice_tokens(keys, j, block)))
            return seen.add(scores, _slice(value, j, block), "bkgts,bksd->bkgtd")

        mixed, total, highest = jax.lax.fori_loop(first[i], last[i], for_keys, Softmax.of_nothing(q))
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
            scores = masked_scores(q, k, may_attend(_slice_tokens(queries, i, block), k_tokens))
            weights = jnp.exp(scores - _slice(log_sum, i, block, axis=3)[..., None])
            d_weights = product("bkgtd,bksd->bkgts", d_o, v)
            d_scores = weights * (d_weights - _slice(correction, i, block, axis=3)[..., None]) * q.shape[-1] ** -0.5
            d_scores = d_scores.astype(q.dtype)
            d_v += product("bkgts,bkgtd->bksd", weights.astype(v.dtype), d_o)
            d_k += product("bkgts,bkgtd->bksd", d_scores, q)
            d_q = _slice(d_query, i, block, axis=3) + product("bkgts,bksd->bkgtd", d_scores, k)
            return jax.lax.dynamic_update_slice_in_dim(d_query, d_q, i * block, axis=3), d_k, d_v

        zeros = jnp.zeros(k.shape, jnp.float32)
        d_query, d_k, d_v = jax.lax.fori_loop(first[j], last[j], for_queries, (d_query, zeros, zeros))
        return d_query, (d_k.astype(dtype), d_v.astype(dtype))

    blocks = jnp.arange(key.shape[2] // block)
    d_query, (d_key, d_value) = jax.lax.scan(for_keys, jnp.zeros(query.shape, jnp.float32), blocks)
    return d_query.astype(dtype), _join(d_key, axis=2), _join(d_value, axis=2)


def _slice(x, index, block, axis=2):
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _slice_tokens(tokens, index, block):
    return jax.tree.map(lambda x: _slice(x, index, block, axis=1), tokens)


def _join(blocks, axis):
    """[N, ..., block at `axis`, ...] -> [..., N * block at `axis`, ...]"""
    blocks = jnp.moveaxis(blocks, 0, axis)
    return blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])
