"""The score of candidates: next-token loss of the frozen model on documents of the target length, smaller is better."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longrope_jax.model import Llama
from longrope_jax.rope import RopeFactors

Objective = Callable[[RopeFactors], Float[np.ndarray, "P"]]
"""A population of any size -> nats per token of every candidate."""


@partial(jax.jit, static_argnames=("model", "documents_at_once"))
def population_nll(
    model: Llama,
    params: dict,
    candidates: RopeFactors,
    tokens: Int[Array, "N T+1"],
    documents_at_once: int,
) -> Float[Array, "C N"]:
    """Mean NLL (nats per token) of every candidate on every document.

    Candidates are a batch axis of the model, documents are walked over in groups of `documents_at_once`: time
    O(C N T) in the matrices and O(C N T^2) in attention, memory O(C documents_at_once T).
    """

    def candidate_nll(factors, document):
        nll = model.apply({"params": params}, document[None, :-1], document[None, 1:], factors, method="token_nll")
        return nll.mean()

    def document_nll(document):
        return jax.vmap(candidate_nll, in_axes=(0, None))(candidates, document)

    return jax.lax.map(document_nll, tokens, batch_size=documents_at_once).T


def perplexity_objective(
    model: Llama,
    params: dict,
    tokens: Int[np.ndarray, "N T+1"],
    chunk: int,
    documents_at_once: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> Objective:
    """The paper's objective on N documents; populations are scored `chunk` candidates at a time.

    Every call of the compiled function has the same shape (the last chunk is padded), so a whole search compiles
    once. A score that is not a number counts as the worst.
    """
    tokens = jnp.asarray(tokens)

    def objective(population: RopeFactors) -> Float[np.ndarray, "P"]:
        size = len(population.lam)
        scores = []
        for start in range(0, size, chunk):
            rows = np.minimum(np.arange(start, start + chunk), size - 1)
            candidates = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], population)
            nll = population_nll(model, params, candidates, tokens, documents_at_once)
            scores.append(np.asarray(nll, np.float64).mean(1))
            progress(min(chunk, size - start))
        nll = np.concatenate(scores)[:size]
        return np.where(np.isfinite(nll), nll, np.inf)

    return objective
