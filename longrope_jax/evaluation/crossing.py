"""What it costs not to read a text again where its factors change."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longrope_jax.model import Llama
from longrope_jax.model.cache import empty_cache, slots_for
from longrope_jax.rope import RopeFactors


def nll_after_crossing(
    model: Llama,
    params: dict,
    before: RopeFactors,
    after: RopeFactors,
    tokens: Int[np.ndarray, "N T+1"],
    boundary: int,
    *,
    read_again: bool,
) -> Float[np.ndarray, "N T-boundary"]:
    """NLL (nats) of every token that follows once a growing text is longer than the boundary.

    With `read_again` everything is read with the factors of the longer text, as `model.decode.generate` does with
    switch="running". Without, keys of the first `boundary` tokens stay in the cache as the old factors rotated them,
    while new queries and keys have the new ones, as in engines that change factors under a cache.

    Args:
        before, after: unbatched factors up to the boundary, and beyond it.
        tokens: T inputs and, one further, their T targets.
        boundary: tokens, below T.

    One device, or as `params` lie. Token by token beyond the boundary: time O((T - boundary) N P D) a layer in
    attention over P tokens so far.

    Raises:
        ValueError: the boundary is not within the text.
    """
    length = tokens.shape[1] - 1
    if not 1 <= boundary < length:
        raise ValueError(f"boundary = {boundary} must lie between 1 and {length - 1}, within the text")
    first = after if read_again else before
    return np.asarray(_nll(model, boundary, params, first, after, jnp.asarray(tokens, jnp.int32)))


@partial(jax.jit, static_argnums=(0, 1))
def _nll(
    model: Llama,
    boundary: int,
    params: dict,
    first: RopeFactors,
    after: RopeFactors,
    tokens: Int[Array, "N T+1"],
) -> Float[Array, "N T-boundary"]:
    count, length = tokens.shape[0], tokens.shape[1] - 1
    read = partial(model.apply, {"params": params}, method="extend")
    positions = jnp.broadcast_to(jnp.arange(boundary), (count, boundary))
    cache = empty_cache(model.config, count, slots_for(length))
    _, cache = read(tokens[:, :boundary], first, positions, cache, jnp.full(count, boundary - 1))

    def step(cache, at):
        token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
        target = jax.lax.dynamic_slice_in_dim(tokens, at + 1, 1, axis=1)
        logits, cache = read(token, after, jnp.full((count, 1), at), cache, jnp.zeros(count, jnp.int32))
        return cache, -jnp.take_along_axis(jax.nn.log_softmax(logits), target, axis=1)[:, 0]

    return jax.lax.scan(step, cache, jnp.arange(boundary, length))[1].T
