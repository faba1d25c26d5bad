"""Next-token negative log-likelihood that never holds the logits of a whole long sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOGITS_AT_ONCE = 2**24  # elements of float32: 64 MiB, a bound that does not grow with T


def token_nll(
    hidden: Float[Array, "B T E"], head: Float[Array, "E V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log p(target) of every position, in nats, float32.

    The sequence is cut into equal chunks whose [B, chunk, V] logits stay below `LOGITS_AT_ONCE` (one position where
    even that is more); the backward pass makes them again chunk by chunk. Time O(B T E V), memory O(B T E + B V +
    LOGITS_AT_ONCE).
    """
    batch, length, _ = hidden.shape
    largest = max(1, LOGITS_AT_ONCE // (batch * head.shape[1]))
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
    logits = project(hidden, head)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def project(hidden: Float[Array, "B T E"], head: Float[Array, "E V"]) -> Float[Array, "B T V"]:
    """Logits in float32; the product is in the type of `hidden`.

    The head is cast here, inside a chunk of the loss, so that its gradient is summed over the chunks in its own type.
    """
    return jnp.einsum("bte,ev->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
