"""Logits -> the next token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; hashable, so it can be static under `jit`.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (the first of equals).
        top_k: only the k most likely tokens are drawn from; 0 is all.
        top_p: only the most likely tokens that together have at least this probability (nucleus sampling, arXiv
            1904.09751), of those that top_k leaves, at the temperature.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature!r} must be 0 (greedy) or above")
        if not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise ValueError(f"top_k = {self.top_k!r} must be a whole number of tokens, 0 (all) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p!r} must be above 0 and at most 1 (all)")


def sample(logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling) -> Int[Array, "B"]:
    """One token a row, each drawn with its own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, restrict(logits, sampling)).astype(jnp.int32)


def restrict(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits at the temperature (above 0), -inf for tokens that top_k or top_p exclude; equals stay or go together."""
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature  # no overflow when that is tiny
    if not sampling.top_k and sampling.top_p == 1:
        return logits
    highest, _ = jax.lax.top_k(logits, min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    probabilities = jax.nn.softmax(highest, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The most likely token always stays, as nothing comes before it.
    lowest = jnp.where(before < sampling.top_p, highest, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
