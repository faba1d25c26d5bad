"""Log-likelihood of continuations, in bulk: which of several answers a model finds most likely, and whether it would
have given it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from longrope_jax.model import Llama
from longrope_jax.model.llama import MAX_LOGITS, project
from longrope_jax.model.sharding import constrain, shards
from longrope_jax.rope import FactorTable, RopeFactors
from longrope_jax.runtime.mesh import Layout

_SHORTEST = 16  # tokens; rows are filled up to it at least, so that few shapes occur


class LogLikelihood(NamedTuple):
    """Of one continuation.

    Attributes:
        log_probability: nats.
        is_greedy: whether every token of it is the most likely one.
    """

    log_probability: float
    is_greedy: bool


class _Row(NamedTuple):
    """What one row of a batch reads, and the requests that it answers: these differ in nothing but their last token."""

    inputs: tuple[int, ...]
    scored: int
    requests: list[int]


def log_likelihoods(
    model: Llama,
    layout: Layout,
    params: dict,
    table: FactorTable,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokens_at_once: int = 8192,
    bos: int | None = None,
) -> Iterator[tuple[int, LogLikelihood]]:
    """(index of a request, its likelihood) for every request, a context and its continuation in tokens, longest first.

    A context that is too long for the table loses its beginning. Factors are those of the number of tokens that are
    read, the continuation's last one not among them. Requests that read the same, such as one question with several
    answers of one token, are read once.

    Args:
        tokens_at_once: rows of about the same length are read in batches of about so many tokens.
        bos: the token that every row begins with, in place of its first one; None for the context alone.

    Time as a forward pass over the tokens, filled up to powers of two; logits are computed at the continuations only.
    Compiled once for every power of two among the lengths, the continuations and the numbers of answers that occur.

    Raises:
        ValueError: before anything is computed: a context or a continuation is empty, or a continuation alone is too
            long.
    """
    rows = _rows(requests, int(table.boundaries[-1]), bos)
    batches: dict[int, list[_Row]] = {}
    for row in rows:
        width = max(_SHORTEST, _power_of_two(len(row.inputs)))
        width += -width % layout.shape["seq"]
        batches.setdefault(width, []).append(row)
    for width in sorted(batches, reverse=True):
        size = layout.row_shards * max(1, tokens_at_once // (width * layout.row_shards))
        for first in range(0, len(batches[width]), size):
            yield from _read(model, layout, params, table, batches[width][first : first + size], requests, size, width)


def _rows(requests, max_length: int, bos: int | None) -> list[_Row]:
    """Requests that read the same tokens share a row; rows with continuations of about the same length, too."""
    rows: dict[tuple, _Row] = {}
    for index, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise ValueError(
                f"requests[{index}] has {len(context)} tokens of context and a continuation of {len(continuation)}; "
                "both need one at least"
            )
        if len(continuation) > max_length:
            raise ValueError(
                f"requests[{index}] has a continuation of {len(continuation)} tokens; the table of factors ends at "
                f"{max_length}"
            )
        inputs = (*context, *continuation)[-max_length - 1 : -1]
        if bos is not None:
            inputs = (bos, *inputs[1:])
        key = inputs, len(continuation)
        rows.setdefault(key, _Row(*key, [])).requests.append(index)
    return sorted(rows.values(), key=lambda row: (-row.scored, -len(row.requests)))


def _read(model, layout, params, table, rows, requests, size, width) -> Iterator[tuple[int, LogLikelihood]]:
    """One batch: at most `size` rows of at most `width` tokens, filled up to that."""
    scored = _power_of_two(max(row.scored for row in rows))
    answers = _power_of_two(max(len(row.requests) for row in rows))
    tokens = np.zeros((size, width), np.int32)
    places = np.zeros((size, scored), np.int32)
    targets = np.zeros((size, scored, answers), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.inputs)] = row.inputs
        places[i, : row.scored] = np.arange(len(row.inputs) - row.scored, len(row.inputs))
        for j, request in enumerate(row.requests):
            targets[i, : row.scored, j] = requests[request][1]
    lengths = np.array([len(row.inputs) for row in rows] + [1] * (size - len(rows)))
    with layout.active():
        scored_rows = _score(model, params, table.select(lengths), tokens, places, targets)
    log_probabilities, best = (np.asarray(array) for array in scored_rows)
    for i, row in enumerate(rows):
        for j, request in enumerate(row.requests):
            total = log_probabilities[i, : row.scored, j].sum(dtype=np.float64)
            yield request, LogLikelihood(float(total), bool(best[i, : row.scored, j].all()))


@partial(jax.jit, static_argnames="model")
def _score(
    model: Llama,
    params: dict,
    factors: RopeFactors,
    tokens: Int[Array, "B T"],
    places: Int[Array, "B n"],
    targets: Int[Array, "B n C"],
) -> tuple[Float[Array, "B n C"], Bool[Array, "B n C"]]:
    """Of C alternatives for the token that follows each of n places: log-probability, and whether it is the argmax."""
    made: Any = model.apply({"params": params}, tokens, factors, method="hidden")
    hidden = jnp.take_along_axis(made[0], places[..., None], axis=1)
    head = params["embed"]["embedding"].T if model.config.tie_embeddings else params["lm_head"]

    def of_chunk(chunk):
        logits = constrain(project(chunk[0], head), "batch", None, "vocab")
        chosen = jnp.take_along_axis(logits, chunk[1], axis=-1)
        log_probabilities = chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return log_probabilities, jnp.argmax(logits, axis=-1)[..., None] == chunk[1]

    # As in `model/llama.py`: logits of so many places at a time, on every device of its own rows.
    largest = MAX_LOGITS * shards("vocab") * shards("batch") // (len(tokens) * model.config.vocab_size)
    chunk = min(places.shape[1], 2 ** (max(largest, 1).bit_length() - 1))  # both are powers of two
    chunks = (jnp.moveaxis(x.reshape(len(x), -1, chunk, x.shape[-1]), 1, 0) for x in (hidden, targets))
    outputs = jax.lax.map(of_chunk, tuple(chunks))
    log_probabilities, is_best = (constrain(jnp.moveaxis(x, 0, 1).reshape(targets.shape)) for x in outputs)
    return log_probabilities, is_best


def _power_of_two(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()
