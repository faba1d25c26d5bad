"""What it costs not to read a text again where its factors change."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longrope_jax.data.corpus import Document
from longrope_jax.data.windows import Windows, fixed_windows
from longrope_jax.evaluation.perplexity import Comparison, Perplexity, compare, nll_by_file, perplexity
from longrope_jax.model import Llama
from longrope_jax.model.cache import empty_cache, slots_for
from longrope_jax.rope import FactorTable, RopeFactors
from longrope_jax.runtime.mesh import Layout


def nll_after_switch(
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


class Cost(NamedTuple):
    """At one length: perplexities with the factors that were found and with others, on the same documents.

    Attributes:
        length: tokens.
        found: with the factors that were found.
        others: with the others.
        difference: of the others minus those that were found; positive is what the others cost.
        windows: how many of that length.
        documents: from how many they are.
    """

    length: int
    found: Perplexity
    others: Perplexity
    difference: Comparison
    windows: int
    documents: int

    def to_record(self) -> dict[str, Any]:
        """As JSON can hold it, but for numbers that are infinite or nan."""
        parts = {name: getattr(self, name)._asdict() for name in ("found", "others", "difference")}
        return self._asdict() | parts

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Cost":
        """The inverse of `to_record`; null stands for a number that is none."""
        kinds = {"found": Perplexity, "others": Perplexity, "difference": Comparison}
        return cls(**record | {name: kind(**_numbers(record[name])) for name, kind in kinds.items()})

    def __str__(self) -> str:
        return f"perplexity {self.found.ppl:.4f} becomes {self.others.ppl:.4f} at {self.length:,} tokens"


def changed_lengths(found: FactorTable, others: FactorTable) -> tuple[int, ...]:
    """The boundaries of `found` up to which sequences get other factors from `others`."""
    lengths = [int(boundary) for boundary in found.boundaries]
    return tuple(length for length in lengths if not _same(found, others, length))


def cost_windows(
    found: FactorTable,
    others: FactorTable,
    documents: Sequence[Document],
    lengths: Sequence[int],
    count: int,
    seed: int = 0,
) -> dict[int, Windows]:
    """What to measure on, by length: `count` windows at every one of `lengths`, or of `changed_lengths` if it is empty;
    nothing where no length changes.

    Raises:
        ValueError: a length at which nothing changes or beyond the tables, or too little text: intervals are over
            documents, so two have to be long enough.
    """
    changed = changed_lengths(found, others)
    if not changed:
        return {}
    longest = int(found.boundaries[-1])
    for length in lengths:
        if not 1 <= length <= longest:
            raise ValueError(
                f"cost_lengths: {length} must be a number of tokens from 1 to {longest}, where factors end"
            )
        if _same(found, others, length):
            possible = ", ".join(map(str, changed))
            raise ValueError(f"cost_lengths: nothing changes at {length} tokens, only up to {possible}")
    windows = {}
    for length in dict.fromkeys(lengths or changed):
        try:
            windows[length] = fixed_windows(documents, length, count, seed)
        except ValueError as error:
            raise ValueError(f"what is dropped has to be measured, but {error}; give shorter cost_lengths") from None
        if len(set(windows[length].names)) < 2:
            raise ValueError(
                f"what is dropped has to be measured, but only {windows[length].names[0]!r} has the {length + 1} "
                "tokens of a window, and intervals need two documents; give more text or shorter cost_lengths"
            )
    return windows


def replacement_cost(
    model: Llama,
    layout: Layout,
    params: dict,
    found: FactorTable,
    others: FactorTable,
    windows: dict[int, Windows],
    bos: int | None = None,
) -> list[Cost]:
    """Perplexity with both tables on the same windows, by length. Costs two evaluations of every window.

    Args:
        bos: what every window begins with, see `token_nll`.
    """
    costs = []
    for length, chosen in windows.items():
        with_found, with_others = (
            nll_by_file(model, layout, params, table.select(length), chosen, length, bos) for table in (found, others)
        )
        difference, names = compare(with_others, with_found), chosen.names
        costs.append(
            Cost(length, perplexity(with_found), perplexity(with_others), difference, len(names), len(set(names)))
        )
    return costs


def _same(found: FactorTable, others: FactorTable, length: int) -> bool:
    """Whether two tables turn the tokens of a sequence alike."""
    mine, theirs = found.select(length), others.select(length)
    if not (np.array_equal(mine.lam, theirs.lam) and mine.mscale == theirs.mscale):
        return False
    is_rescaled = np.any(np.asarray(mine.lam) != 1)
    return not is_rescaled or max(int(mine.n_hat), 1) == max(int(theirs.n_hat), 1)


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Null becomes nan, in pairs too."""
    known = {name: math.nan if value is None else value for name, value in record.items()}
    return known | {"ci95": tuple(math.nan if value is None else value for value in record["ci95"])}
