"""The KV cache, and attention over it.

The token at position p of a row is in slot p. So prompts of different lengths need no padding on the left, a slot needs
no metadata, and the causal mask hides all slots that are unwritten or stale, as they are beyond every query's position.

Under `jax.set_mesh` the rows, heads and slots of the cache are sharded over the mesh (`model/sharding.py`). Blocks of
slots are distributed round-robin over the n devices of the `seq` axis, block b on device b % n, so that all have the
same work however little of the cache is used.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from longrope_jax.model.attention_parts import MASKED, Softmax, by_kv_head, by_token, product
from longrope_jax.model.config import LlamaConfig
from longrope_jax.model.sharding import constrain, partition_spec, shards

BLOCK = 256  # slots that are distributed, and read, together
READS = 8  # blocks per read where queries are few, as the loop's overhead would dominate a decoding step


class Cache(NamedTuple):
    """Keys and values of S slots in N layers; make one with `empty_cache`.

    Attributes:
        keys: rotated.
        values: not rotated.
    """

    keys: Float[Array, "N B S K D"]
    values: Float[Array, "N B S K D"]


class Memory(NamedTuple):
    """What each layer passes to the next.

    Attributes:
        cache: of all layers, updated in place.
        layer: index of the next layer.
    """

    cache: Cache
    layer: Int[Array, ""]


CACHE_AXES = ("layers", "batch", "length", "kv_heads", None)


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty_cache(config: LlamaConfig, rows: int, slots: int) -> Cache:
    """For sequences of up to `slots` tokens (see `slots_for`), in the model's dtype, on the current mesh.

    2 N B S K D elements; the time of attention does not depend on how many of the slots are unused.
    """
    shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
    return Cache(*(constrain(jnp.zeros(shape, config.dtype), *CACHE_AXES) for _ in range(2)))


def slots_for(length: int) -> int:
    """S for sequences of `length` tokens: at least two blocks on every device of the current mesh.

    Rounded up by at most an eighth beyond whole blocks, so that few shapes occur and compiled programs are reused.
    """
    whole = BLOCK * shards("length")
    step = -(-(2 ** max(0, (length - 1).bit_length() - 4)) // whole) * whole
    return max(2 * whole, -(-length // step) * step)


def attend(
    memory: Memory,
    query: Float[Array, "B C H D"],
    key: Float[Array, "B C K D"],
    value: Float[Array, "B C K D"],
    positions: Int[Array, "B C"],
) -> tuple[Float[Array, "B C H D"], Memory]:
    """Writes C new tokens of every row into the layer's slots; they attend to all slots up to their own.

    Query head h uses key head h // (H / K); scores and softmax are float32, the result has the dtype of `value`.
    Tokens with positions beyond the last slot are not written. Time O(B H C D P), P the largest position rounded up to
    a block; memory O(B H C BLOCK) besides the cache, which is not copied if the caller donates
    it. Over n devices of the `seq` axis: an n-th of the work and memory, and one sum over them of the result's size.
    """
    share = partial(_share, shards("length"))
    if not jax.sharding.get_abstract_mesh().empty:
        cut = partition_spec(*CACHE_AXES)
        rows, heads = partition_spec("batch", None), partition_spec("batch", None, "heads", None)
        kv_heads = partition_spec("batch", None, "kv_heads", None)
        memory_specs = Memory(Cache(cut, cut), partition_spec())  # type: ignore[arg-type]  # specs for arrays
        share = jax.shard_map(
            share,
            in_specs=(memory_specs, heads, kv_heads, kv_heads, rows),
            out_specs=(heads, memory_specs),
            check_vma=False,  # as in the ring: the loops' zeros would all have to be declared as differing
        )
    return share(memory, query, key, value, positions)


def _share(devices: int, memory: Memory, query: Array, key: Array, value: Array, positions: Array):
    """One device's part of `attend`, with the same arguments and results."""
    (keys, values), layer = memory
    device = jax.lax.axis_index("seq") if devices > 1 else 0
    block, within = positions // BLOCK, positions % BLOCK
    # For a token of another device the slot number is beyond the end, so the write is dropped.
    slots = jnp.where(block % devices == device, block // devices * BLOCK + within, keys.shape[2])
    rows = jnp.arange(len(positions))[:, None]
    keys, values = (held.at[layer, rows, slots].set(new, mode="drop") for held, new in ((keys, key), (values, value)))
    mixed = _mix(devices, device, keys, values, layer, query, positions)
    return mixed.astype(value.dtype), Memory(Cache(keys, values), layer + 1)


def _mix(devices: int, device, keys: Array, values: Array, layer, query: Array, positions: Array) -> Array:
    """float32[B, C, H, D] over the slots of all devices; each device reads its own, with an online softmax."""
    batch, tokens, _, dim = query.shape
    held, kv_heads = keys.shape[2] // BLOCK, keys.shape[3]
    query = by_kv_head(query, kv_heads)

    def for_slots(blocks, j, seen):
        size = (1, batch, blocks * BLOCK, kv_heads, dim)

        def read(x):
            part = jax.lax.dynamic_slice(x, (layer, 0, j * blocks * BLOCK, 0, 0), size)[0]
            # In the cache's layout: a compiler that wants heads first for the products would else transpose, and copy,
            # the whole cache in every layer.
            return with_layout_constraint(part, Layout((0, 1, 2, 3)))

        which = (j * blocks + jnp.arange(blocks)) * devices + device
        at = (which[:, None] * BLOCK + jnp.arange(BLOCK)).reshape(-1)
        scores = product("bkgcd,bskd->bkgcs", query, read(keys)) * dim**-0.5
        scores = jnp.where((at <= positions[..., None])[:, None, None], scores, MASKED)
        return seen.add(scores, read(values), "bkgcs,bskd->bkgcd")

    # Own blocks up to the one with the last query's slot.
    used = jnp.clip((positions.max() // BLOCK - device) // devices + 1, 0, held)
    # Never all blocks: XLA would hoist that read out of the loop, and copy the whole cache in every layer.
    together = min(max(1, READS // tokens), held - 1)
    many = jax.lax.fori_loop(0, used // together, partial(for_slots, together), Softmax.of_nothing(query))
    mixed, total, highest = jax.lax.fori_loop(used // together * together, used, partial(for_slots, 1), many)
    if devices > 1:
        # A device without visible slots has summed masked values; its share is zero.
        share = jnp.exp(highest - jax.lax.pmax(highest, "seq"))
        mixed, total = jax.lax.psum((mixed * share[..., None], total * share), "seq")
    return by_token(mixed / total[..., None], tokens)
