"""Generation: prefill in chunks, then one token of every row a step, with the rope factors of the sequence's length.

Cached keys are rotated by the factors at the time of writing. Other factors therefore need another cache: when a row
crosses a boundary of the factor table, its batch is prefilled again with the new factors (factor switching).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from longrope_jax.model.cache import Cache, empty_cache, slots_for
from longrope_jax.model.llama import Llama
from longrope_jax.model.sharding import constrain, shards
from longrope_jax.rope import FactorTable, RopeFactors
from longrope_jax.settings import NonNegativeFloat, NonNegativeInt, Probability, Settings

SWITCHES = ("ahead", "running")
ENDED = -1  # instead of a token, for a row that has ended


@dataclass(frozen=True)
class Sampling(Settings):
    """How a token is sampled; hashable, so it can be static under `jit`.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (greedy; the first of equals).
        top_k: samples only from the k most likely tokens; 0 means all.
        top_p: samples only from the most likely tokens that together have at least this probability (nucleus
            sampling, arXiv 1904.09751), among those of top_k, at the temperature.
    """

    temperature: NonNegativeFloat = 0.0
    top_k: NonNegativeInt = 0
    top_p: Probability = 1.0


def sample(logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling) -> Int[Array, "B"]:
    """One token per row, each with its own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, restrict(logits, sampling)).astype(jnp.int32)


def restrict(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits at the temperature (above 0), -inf where top_k or top_p exclude a token; equal logits are alike."""
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature  # no overflow at a tiny temperature
    if not sampling.top_k and sampling.top_p == 1:
        return logits
    highest, _ = jax.lax.top_k(logits, min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    probabilities = jax.nn.softmax(highest, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The most likely token always remains, as nothing precedes it.
    lowest = jnp.where(before < sampling.top_p, highest, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


GREEDY = Sampling()


def complete(
    model: Llama, params: dict, table: FactorTable, prompts: Sequence[np.ndarray], max_new_tokens: int, **options
) -> list[Int[np.ndarray, "tokens"]]:
    """All new tokens of every prompt, i32[tokens] each, without the stop token; else as `generate`, errors too."""
    steps = list(generate(model, params, table, prompts, max_new_tokens, **options))
    rows = np.reshape(steps, (len(steps), len(prompts))).astype(np.int32).T
    return [row[row != ENDED] for row in rows]


def generate(
    model: Llama,
    params: dict,
    table: FactorTable,
    prompts: Sequence[Int[np.ndarray, "tokens"]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stops: Sequence[int] = (),
    seed: int = 0,
    switch: str = "ahead",
    chunk: int = 512,
) -> Iterator[Int[np.ndarray, "B"]]:
    """Continues B prompts of any lengths together; yields i32[B], one token per row, step by step.

    Under a mesh call it, and iterate, within `jax.set_mesh`. Rows are independent up to rounding: a row's tokens depend
    on the seed, its index in the batch, and its own tokens.

    Args:
        params: of the model, on their mesh.
        table: factors by length, in tokens.
        prompts: token ids, at least one each.
        max_new_tokens: of every row.
        stops: a row ends at one of these tokens; from there on, stop token included, it yields -1. The iterator ends
            when all rows have ended.
        seed: of sampling.
        switch: the length that selects a row's factors. "ahead": prompt and max_new_tokens together, once. "running":
            the tokens so far; every token is then that of a forward pass over all tokens before it, with the factors
            of their number. Crossing a boundary of the table costs a prefill of the batch.
        chunk: tokens per prefill call.

    Time: prefill as a forward pass over B times the longest prompt; a step as one token's, and O(B H D P) a layer for
    attention over P tokens so far. Memory: the cache (see `empty_cache`) and O(B chunk) activations. Compiled twice,
    for a chunk and for a step, for every B, `chunk`, number of slots (see `slots_for`) and `sampling`.

    Raises:
        ValueError: before any computation; names the wrong argument.
    """
    prompts = [np.asarray(prompt) for prompt in prompts]
    _check(model, table, prompts, max_new_tokens, switch, chunk)
    return _steps(model, params, table, prompts, max_new_tokens, sampling, stops, seed, switch, chunk)


def _check(model, table, prompts, max_new_tokens, switch, chunk) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} = {value} must be 1 or more")
    if switch not in SWITCHES:
        raise ValueError(f"switch = {switch!r} must be one of {', '.join(SWITCHES)}")
    if not prompts:
        raise ValueError("prompts = [] must have one prompt at least")
    vocabulary = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        if prompt.ndim != 1 or not prompt.size or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"prompts[{row}] must be one token id or more, not {prompt.dtype}{list(prompt.shape)}")
        outside = prompt[(prompt < 0) | (prompt >= vocabulary)]
        if outside.size:
            raise ValueError(f"prompts[{row}] has token id {outside[0]}, outside of 0..{vocabulary - 1}")
    longest, last = max(map(len, prompts)), int(table.boundaries[-1])
    if longest + max_new_tokens > last:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} make {longest + max_new_tokens}; the "
            f"table of factors ends at {last}"
        )


def _steps(model, params, table, prompts, max_new_tokens, sampling, stops, seed, switch, chunk):
    # Rows that only pad the batch to the mesh have ended at the start.
    rows = -(-len(prompts) // shards("batch")) * shards("batch")
    lengths = np.array([*map(len, prompts)] + [1] * (rows - len(prompts)), np.int32)
    ended = np.arange(rows) >= len(prompts)
    longest = int(lengths.max())
    slots = slots_for(longest + max_new_tokens)
    chunk = chunk_for(longest, chunk)
    sequences = np.zeros((rows, slots), np.int32)
    for row, prompt in enumerate(prompts):
        sequences[row, : len(prompt)] = prompt

    ahead = max_new_tokens if switch == "ahead" else 0
    read = partial(advance, model, sampling, params, np.uint32(seed % 2**32))
    picked = np.searchsorted(table.boundaries, lengths + ahead)
    factors = table.select(lengths + ahead)
    cache = empty_cache(model.config, rows, slots)
    chosen, cache = _prefill(read, chunk, factors, cache, sequences, lengths)
    for remaining in reversed(range(max_new_tokens)):
        ended |= np.isin(chosen, stops)
        if ended.all():
            return
        yield np.where(ended, ENDED, chosen)[: len(prompts)]
        if not remaining:
            return
        growing = np.flatnonzero(~ended)
        sequences[growing, lengths[growing]] = chosen[growing]
        lengths[growing] += 1
        now = np.searchsorted(table.boundaries, lengths) if switch == "running" else picked
        if (now != picked).any():
            picked, factors = now, table.select(lengths)
            # The old cache is invisible: each chunk overwrites it before attention, and the mask hides what follows.
            chosen, cache = _prefill(read, chunk, factors, cache, sequences, lengths)
        else:
            newest = lengths - 1
            tokens = sequences[np.arange(rows), newest]
            chosen, cache = read(factors, cache, tokens[:, None], newest, np.zeros_like(newest))
            chosen = np.asarray(chosen)


def chunk_for(longest: int, chunk: int) -> int:
    """Tokens per prefill call: short prompts need no padding to a long chunk, and few sizes occur."""
    return min(chunk, 2 ** (longest - 1).bit_length())


def _prefill(read, chunk: int, factors: RopeFactors, cache: Cache, sequences, lengths):
    """Reads all sequences from the first token on -> the token that follows each, and the cache.

    Shorter rows write padding beyond their end, into slots that stay invisible until their own tokens are written.
    """
    found = []
    for start in range(0, lengths.max(), chunk):
        tokens = sequences[:, start : start + chunk]
        tokens = np.pad(tokens, ((0, 0), (0, chunk - tokens.shape[1])))
        last = np.clip(lengths - 1 - start, 0, chunk - 1)
        follows, cache = read(factors, cache, tokens, np.full_like(lengths, start), last)
        found.append(follows)
    return np.stack(found)[(lengths - 1) // chunk, np.arange(len(lengths))], cache


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def advance(
    model: Llama,
    sampling: Sampling,
    params: dict,
    seed: Int[Array, ""],
    factors: RopeFactors,
    cache: Cache,
    tokens: Int[Array, "B C"],
    start: Int[Array, "B"],
    last: Int[Array, "B"],
) -> tuple[Int[Array, "B"], Cache]:
    """Reads C tokens of every row, the first at position `start`; samples the token after number `last` of them.

    The cache is donated, not copied.
    """
    positions = start[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
    made: Any = model.apply({"params": params}, tokens, factors, positions, cache, last, method="extend")
    logits, cache = made
    key = jax.random.key(seed)
    rows = np.arange(len(tokens), dtype=np.uint32)
    keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(rows, start + last)
    return constrain(sample(constrain(logits, "batch", None), keys, sampling)), cache
