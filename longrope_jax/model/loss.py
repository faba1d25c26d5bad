"""Next-token negative log-likelihood that never holds the logits of a whole long sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longrope_jax.model.sharding import constrain, mesh_axes, partition_spec, shards

LOGITS_AT_ONCE = 2**24  # elements of float32 on a device: 64 MiB, a bound that does not grow with T


@jax.named_scope("loss")
def token_nll(
    hidden: Float[Array, "B T E"], head: Float[Array, "E V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log p(target) of every position, in nats, float32.

    The sequence is cut into equal chunks whose [B, chunk, V] logits stay below `LOGITS_AT_ONCE` (one position where
    even that is more); the backward pass makes them again chunk by chunk. Time O(B T E V), memory O(B T E + B V +
    LOGITS_AT_ONCE). Under a mesh, where it has to be called within `jit`, this is said of one device's part of B, T
    and V.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _in_chunks(hidden, head, targets)
    tokens = partition_spec("batch", "length")
    # Every device goes through its own tokens: chunks of whole sequences would be gathered first, and the gradient of
    # the head would be summed over devices once a chunk. What is cut along the vocabulary is left to the compiler.
    return jax.shard_map(
        _in_chunks,
        in_specs=(partition_spec("batch", "length", None), partition_spec(None, None), tokens),
        out_specs=tokens,
        axis_names=mesh_axes("batch", "length"),
        check_vma=False,  # with it, the head's gradient would be summed over devices inside of the loop after all
    )(hidden, head.astype(jnp.float32), targets)  # float32, so that this sum is too


def _in_chunks(hidden: Array, head: Array, targets: Array) -> Array:
    batch, length, _ = hidden.shape
    largest = max(1, LOGITS_AT_ONCE * shards("vocab") // (batch * head.shape[1]))
    if length <= largest:
        return _nll(hidden, head, targets)
    chunk = -(-length // -(-length // largest))  # as many chunks as it takes, evenly filled: little padding
    pad = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    chunks = tuple(jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0) for x in (hidden, targets))
    nll = jax.lax.map(jax.checkpoint(lambda chunk: _nll(chunk[0], head, chunk[1])), chunks)
    return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, :length]


def _nll(hidden: Array, head: Array, targets: Array) -> Array:
    logits = constrain(project(hidden, head), None, None, "vocab")
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def project(hidden: Float[Array, "B T E"], head: Float[Array, "E V"]) -> Float[Array, "B T V"]:
    """Logits in float32; the product is in the type of `hidden`.

    The head is cast here, inside a chunk of the loss, so that its gradient is summed over the chunks in its own type.
    """
    return jnp.einsum("bte,ev->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
