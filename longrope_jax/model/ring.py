"""Attention over sequences that are cut over devices: keys and values travel around a ring (arXiv 2310.01889).

Every device keeps the queries of its own tokens. In as many steps as there are devices it attends to one shard of
keys and values and hands it to its neighbour, so nobody ever holds a whole sequence. What the shards give is merged
by their log-sum-exps; the backward pass sends keys, values and their growing gradients around once more.

Positions and segment ids travel with the tokens, so tokens may be in any order. In their natural order the device
with the first tokens has almost nothing to do, as nothing can be seen from there; `zigzag` gives all the same work.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longrope_jax.model.attention import PARTIAL_BACKENDS, attention, partial_backend, running_on
from longrope_jax.model.attention_parts import MASKED, Tokens, by_token, correction, in_blocks, saveable
from longrope_jax.model.sharding import batch_axis, partition_spec, shards


def zigzag(length: int, shards: int) -> Int[np.ndarray, "T"]:
    """The order of tokens in memory in which every device has the same work: device r of n gets chunks r and 2n-1-r.

    `x[:, zigzag(T, n)]` is to be cut into n equal shards; `np.argsort` of the result is the way back.

    Raises:
        ValueError: the length is not a multiple of the 2n chunks.
    """
    if length % (2 * shards):
        raise ValueError(f"{length} tokens are not a multiple of {2 * shards}, two chunks for each of {shards} shards")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(-1)


def ring_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    positions: Int[Array, "#B T"],
    segment_ids: Int[Array, "#B T"] | None,
    backend: str,
) -> Float[Array, "B T H D"]:
    """`attention` over the mesh that is set, by the backend alone where none is.

    The mesh's axes must divide what they cut (see `check_mesh`). Per device of n along the sequence: time as the
    backend's over n in zigzag order; memory O(B H T D / n); it sends K heads of keys and values n - 1 times forward,
    and again backward with twice as much for their float32 gradients.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return attention(query, key, value, positions, segment_ids, backend)
    tokens = Tokens(positions, segment_ids)
    by_head = partition_spec("batch", "length", "heads", None)
    by_kv_head = partition_spec("batch", "length", "kv_heads", None)
    attend = jax.shard_map(
        partial(_attend, backend, shards("length")),
        in_specs=(
            by_head,
            by_kv_head,
            by_kv_head,
            jax.tree.map(lambda x: partition_spec(batch_axis(x), "length"), tokens),
        ),
        out_specs=by_head,
        # The check would have every zero inside of the backends declared as differing between devices. Nothing that
        # has a derivative is replicated, so there are no sums over devices that it could get right or wrong.
        check_vma=False,
    )
    return attend(query, key, value, tokens)


def _attend(backend: str, devices: int, query: Array, key: Array, value: Array, tokens: Tokens) -> Array:
    """What each device does with its shards, shaped like `ring_attention`'s arguments."""
    if devices == 1:
        return attention(query, key, value, *tokens, backend)
    backend = partial_backend(backend, running_on())
    length = query.shape[1]
    # Half a shard is cut evenly: it is as long a run of text as a zigzag has.
    block = PARTIAL_BACKENDS[backend].choose_block(length, 2, query.shape[3], query.dtype)
    return by_token(_ring(backend, devices, block, *in_blocks(block, query, key, value, tokens)), length)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(
    backend: str, devices: int, block: int, query: Array, key: Array, value: Array, queries: Tokens, keys: Tokens
) -> Array:
    """Arguments as `in_blocks` makes them, of one shard -> as query."""
    return _ring_fwd(backend, devices, block, query, key, value, queries, keys)[0]


def _ring_fwd(backend, devices, block, query, key, value, queries, keys):
    forward = PARTIAL_BACKENDS[backend].forward

    @jax.named_scope("ring_step")
    def merge_in(travelling, merged):
        return _merge(merged, forward(block, query, *travelling[:2], queries, travelling[2], jnp.float32))

    def step(_, carry):
        travelling, merged = carry
        # Sent before the work that it does not depend on, so that both can go on at the same time.
        return _pass_on(travelling, devices), merge_in(travelling, merged)

    nothing = jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:-1], MASKED, jnp.float32)
    # The last step is by itself because it has nothing to send.
    last, merged = jax.lax.fori_loop(0, devices - 1, step, ((key, value, keys), nothing))
    out, log_sum = merge_in(last, merged)
    out, log_sum = saveable(out.astype(value.dtype), log_sum)
    return out, (query, key, value, queries, keys, out, log_sum)


def _ring_bwd(backend, devices, block, saved, d_out):
    query, key, value, queries, keys, out, log_sum = saved
    backward = PARTIAL_BACKENDS[backend].backward
    softmax = log_sum, correction(d_out, out), d_out

    @jax.named_scope("ring_step")
    def add(travelling, arrived, d_query):
        """(d_key, d_value) of what travels, found by this device and all before it; d_query of all steps so far."""
        key, value, keys = travelling
        d_q, *found = backward(block, query, key, value, queries, keys, *softmax, jnp.float32)
        return jax.tree.map(jnp.add, arrived, tuple(found)), d_query + d_q

    def step(_, carry):
        travelling, found, d_query = carry
        # Gradients follow one step behind their keys, so that they too are sent while there is other work. That sends
        # zeros in the first step: cheaper than a third copy of the program.
        following, arrived = _pass_on((travelling, found), devices)
        return following, *add(travelling, arrived, d_query)

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
    start = (key, value, keys), (zeros(key), zeros(value)), zeros(query)
    last, found, d_query = jax.lax.fori_loop(0, devices - 1, step, start)
    found, d_query = add(last, _pass_on(found, devices), d_query)
    # The last shard that a device sees is its successor's: one hand further and all gradients are at home.
    d_key, d_value = _pass_on(found, devices)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None, None


_ring.defvjp(_ring_fwd, _ring_bwd)


@jax.named_scope("ring_send")
def _pass_on(tree, devices: int):
    """Everyone's to its successor."""
    return jax.lax.ppermute(tree, "seq", [(i, (i + 1) % devices) for i in range(devices)])


@jax.named_scope("ring_merge")
def _merge(one, other):
    """Results (mixed values, log-sum-exp) of the same queries for two sets of keys -> for both sets."""
    (out, log_sum), (other_out, other_log_sum) = one, other
    total = jnp.logaddexp(log_sum, other_log_sum)
    share = lambda part: jnp.exp(part - total)[..., None]  # noqa: E731
    return out * share(log_sum) + other_out * share(other_log_sum), total
