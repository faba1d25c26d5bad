"""Parts that all attention backends and the cache share: arrays by head, blocks of tokens, and the causal mask."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a block with all scores masked gives no NaN
_NO_QUERY, _NO_KEY = np.int32(-1), np.int32(2**31 - 1)  # positions of padding: sees nothing, is never seen

SAVED = "attention"
"""Checkpoint name of the results of attention, which `attention_saveable` saves for the backward pass."""


def saveable(out: Float[Array, "*rows D"], log_sum: Float[Array, "*rows"]) -> tuple[Array, Array]:
    """The two results of `forward`, [..., D] and [...], named so that a remat policy can save them."""
    return checkpoint_name(out, SAVED), checkpoint_name(log_sum, SAVED)


class Tokens(NamedTuple):
    """What the attention mask depends on.

    Attributes:
        positions: of every token in its text.
        segments: number of its text; None if there is only one.
    """

    positions: Int[Array, "#B T"]
    segments: Int[Array, "#B T"] | None


def in_blocks(
    block: int,
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    tokens: Tokens,
) -> tuple[Float[Array, "B K G N D"], Float[Array, "B K N D"], Float[Array, "B K N D"], Tokens, Tokens]:
    """The arguments of `forward` for tokens that attend to each other: query, key, value, queries, keys.

    Heads come first, the G query heads of a key head together, and T is padded to N, a multiple of the block.
    """
    pad = -query.shape[1] % block
    query, key, value = by_kv_head(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    query, key, value = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (query, key, value))
    pad_tokens = partial(jnp.pad, pad_width=((0, 0), (0, pad)))
    segments = None if tokens.segments is None else pad_tokens(tokens.segments, mode="edge")
    queries, keys = (pad_tokens(tokens.positions, constant_values=nowhere) for nowhere in (_NO_QUERY, _NO_KEY))
    return query, key, value, Tokens(queries, segments), Tokens(keys, segments)


def correction(d_out: Float[Array, "*rows D"], out: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
    """What softmax's derivative subtracts from the gradient of every weight of a row: d_out . out, in float32."""
    return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)


def by_token(out: Float[Array, "B K G N D"], length: int) -> Float[Array, "B T H D"]:
    """The inverse of `in_blocks` and `by_kv_head` for queries of `length` tokens."""
    batch, kv_heads, groups, _, dim = out.shape
    return out[..., :length, :].transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, dim)


def key_blocks(block: int, queries: Tokens, keys: Tokens) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """For every query block the range [first, last) of key blocks that it may attend to."""
    return _range(_visible(block, queries, keys))


def query_blocks(block: int, queries: Tokens, keys: Tokens) -> tuple[Int[Array, "M"], Int[Array, "M"]]:
    """For every key block the range [first, last) of query blocks that may attend to it."""
    return _range(_visible(block, queries, keys).T)


def _visible(block: int, queries: Tokens, keys: Tokens) -> Bool[Array, "N M"]:
    """Whether any query of a block may attend to any key of another; decided by ranges, so sometimes true in vain."""
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

    # One sequence after the other: a table for all would be B times as large.
    nothing = jnp.zeros((ranges[0].shape[1], ranges[1].shape[1]), bool)
    return jax.lax.scan(lambda seen, row: (seen | in_sequence(*row), None), nothing, ranges)[0]


def _range(visible):
    count = visible.shape[1]
    some = visible.any(1)
    first = jnp.where(some, visible.argmax(1), 0)
    return first, jnp.where(some, count - visible[:, ::-1].argmax(1), 0)


def even_block(length: int, largest: int, granule: int = 1) -> int:
    """The block size that splits a length into the fewest blocks of at most `largest`, all about equally full.

    A multiple of `granule`, as `largest` must be.
    """
    count = -(-length // largest)
    return -(-length // (count * granule)) * granule


def may_attend(queries: Tokens, keys: Tokens) -> Bool[Array, "#B 1 1 T S"]:
    """The mask of every pair."""
    mask = keys.positions[:, None, :] <= queries.positions[:, :, None]
    if queries.segments is not None and keys.segments is not None:
        mask = mask & (keys.segments[:, None, :] == queries.segments[:, :, None])
    return mask[:, None, None]


def masked_scores(
    query: Float[Array, "B K G T D"], key: Float[Array, "B K S D"], mask: Bool[Array, "#B 1 1 T S"]
) -> Float[Array, "B K G T S"]:
    """Scaled by 1 / sqrt(D), in float32; `MASKED` where the mask is false."""
    scores = product("bkgtd,bksd->bkgts", query, key) * query.shape[-1] ** -0.5
    return jnp.where(mask, scores, MASKED)


class Softmax(NamedTuple):
    """An online softmax (arXiv 1805.02867): attention of rows of queries to the keys that came so far, in float32.

    Attributes:
        mixed: values, summed with the weights exp(score - highest).
        total: sum of these weights.
        highest: score.
    """

    mixed: Float[Array, "*rows D"]
    total: Float[Array, "*rows"]
    highest: Float[Array, "*rows"]

    @classmethod
    def of_nothing(cls, query: Float[Array, "*rows D"]) -> "Softmax":
        """Of queries that have seen no key."""
        rows = query.shape[:-1]
        return cls(
            jnp.zeros(query.shape, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.full(rows, MASKED, jnp.float32)
        )

    def add(self, scores: Float[Array, "*rows S"], value: Array, subscripts: str) -> "Softmax":
        """With S more keys; `subscripts` mix their values into rows, as "bkgts,bksd->bkgtd" mixes [B, K, S, D]."""
        highest = jnp.maximum(self.highest, scores.max(-1))
        weights = jnp.exp(scores - highest[..., None])
        shrink = jnp.exp(self.highest - highest)
        total = self.total * shrink + weights.sum(-1)
        part = product(subscripts, weights.astype(value.dtype), value)
        return Softmax(self.mixed * shrink[..., None] + part, total, highest)


def product(subscripts: str, left: Array, right: Array) -> Array:
    """An einsum that accumulates in float32; subscripts give the shapes, "bkgtd,bksd->bkgts" makes [B, K, G, T, S]."""
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def by_kv_head(query: Float[Array, "B T H D"], kv_heads: int) -> Float[Array, "B K G T D"]:
    """[B, T, H, D] -> [B, K, G, T, D], the G query heads of a key head together."""
    batch, length, heads, dim = query.shape
    return query.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
