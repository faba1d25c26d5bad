"""What a search has scored so far: every candidate with its genes, its score, where it came from and what it cost."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from longrope_jax.rope import RopeFactors
from longrope_jax.search.racing import Standing

OPERATORS = ("seed", "mutation", "crossover", "gradient", "cma_es", "start_tokens", "ramp")

_COMPARED = 16  # candidates read in full that a race compares with


class Genes(NamedTuple):
    """One candidate; with a leading axis, a population.

    Attributes:
        lam: rescale factors.
        n_hat: start tokens.
        mscale: attention temperature.
        critical: the pair from which on lam is free, see `SearchSpace`; 0 where all are.
    """

    lam: Float[Array | np.ndarray, "half"]
    n_hat: Int[Array | np.ndarray, ""]
    mscale: Float[Array | np.ndarray, ""]
    critical: Int[Array | np.ndarray, ""]


class Scores(NamedTuple):
    """What an objective says of P candidates on D documents.

    Attributes:
        nll: the score, nats per token, smaller is better; inf where it is not a number, an estimate where a race had
            seen enough.
        documents: by document; nan where a race had no need for it.
        cost: of every candidate in forward equivalents, 1 for all documents read once.
    """

    nll: Float[np.ndarray, "P"]
    documents: Float[np.ndarray, "P D"]
    cost: Float[np.ndarray, "P"]


Score = Callable[[RopeFactors, Standing | None], Scores]
"""(a population of any size, what it may race against, if it may) -> scores."""


@flax.struct.dataclass
class SearchState:
    """Every candidate scored so far, in order.

    Attributes:
        lam, n_hat, mscale, critical: their genes.
        nll, documents, cost: their scores, see `Scores`; what a gradient round spent is the cost of what it found.
        parents: rows of the candidates that each was made of, -1 for none; a mutation has one, a crossover two.
        operator: index into `OPERATORS`.
        iteration: that each was born in, 0 for what a search starts with.
        restart: the start of the search that each belongs to, 0 for the first.
    """

    lam: Float[np.ndarray, "N half"]
    n_hat: Int[np.ndarray, "N"]
    mscale: Float[np.ndarray, "N"]
    critical: Int[np.ndarray, "N"]
    nll: Float[np.ndarray, "N"]
    documents: Float[np.ndarray, "N D"]
    cost: Float[np.ndarray, "N"]
    parents: Int[np.ndarray, "N 2"]
    operator: Int[np.ndarray, "N"]
    iteration: Int[np.ndarray, "N"]
    restart: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.n_hat)

    @property
    def genes(self) -> Genes:
        """Of all candidates."""
        return Genes(self.lam, self.n_hat, self.mscale, self.critical)

    @property
    def factors(self) -> RopeFactors:
        """All candidates as factors."""
        return RopeFactors(self.lam, self.n_hat, self.mscale)

    def take(self, rows: Int[np.ndarray, "R"]) -> "SearchState":
        """Some candidates, in the order asked for."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def top(self, k: int) -> Int[np.ndarray, "k"]:
        """Rows of the k best, best first, of equals the older one: over all history, Algorithm 1's elitist top-k."""
        return np.argsort(self.nll, kind="stable")[:k]

    def own(self, restart: int) -> Int[np.ndarray, "R"]:
        """Rows of what one start of the search may use: its own candidates, and the seeds."""
        return np.flatnonzero((self.restart == restart) | (self.operator == OPERATORS.index("seed")))

    def standing(self, bar: float) -> Standing:
        """What newcomers race against who want to come under a score, nats per token."""
        order = self.top(len(self))
        is_read = ~np.isnan(self.documents).any(1) & np.isfinite(self.nll)
        rows = [row for row in order if is_read[row]][:_COMPARED]
        return Standing(self.documents[rows], float(bar), float(self.nll.min()))

    def best(self) -> RopeFactors:
        """The best candidate so far; one that was read in full."""
        return jax.tree.map(lambda leaf: leaf[self.top(1)[0]], self.factors)


def unscored(
    genes: Genes,
    operator: str,
    documents: int,
    parents: Int[np.ndarray, "P 2"] | None = None,
    restart: int | Int[np.ndarray, "P"] = 0,
) -> SearchState:
    """New candidates (leaves of `genes` have a leading axis P) that have no score yet on so many documents."""
    count = len(genes.n_hat)
    return SearchState(
        np.asarray(genes.lam, np.float32),
        np.asarray(genes.n_hat, np.int32),
        np.asarray(genes.mscale, np.float32),
        np.asarray(genes.critical, np.int32),
        np.full(count, np.inf),
        np.full((count, documents), np.nan),
        np.zeros(count),
        np.full((count, 2), -1) if parents is None else np.asarray(parents, int),
        np.full(count, OPERATORS.index(operator)),
        np.zeros(count, int),
        np.broadcast_to(np.asarray(restart, int), count).copy(),
    )


def scored(candidates: SearchState, score: Score, standing: Standing | None, iteration: int) -> SearchState:
    """The same candidates with their scores, born in `iteration`; they race if there is a standing."""
    if not len(candidates):
        return candidates
    scores = score(candidates.factors, standing)
    return dataclasses.replace(
        candidates,
        nll=scores.nll,
        documents=scores.documents,
        cost=candidates.cost + scores.cost,
        iteration=np.full(len(candidates), iteration),
    )


def joined(*states: SearchState) -> SearchState:
    """One after the other."""
    return jax.tree.map(lambda *rows: np.concatenate(rows), *states)


def identities(genes: Genes) -> list[tuple]:
    """Of a population: two candidates are the same if all their genes are, to a millionth."""
    lam, mscale = (np.round(np.asarray(leaf, np.float64), 6).tolist() for leaf in (genes.lam, genes.mscale))
    rest = zip(np.asarray(genes.n_hat).tolist(), np.asarray(genes.critical).tolist(), strict=True)
    return [(*pair, temperature, *row) for pair, temperature, row in zip(rest, mscale, lam, strict=True)]


def without_known(candidates: SearchState, *known: SearchState) -> SearchState:
    """Those that are in none of the known ones, each once: nothing is scored twice."""
    seen = {identity for state in known for identity in identities(state.genes)}
    rows = []
    for row, identity in enumerate(identities(candidates.genes)):
        if identity not in seen:
            seen.add(identity)
            rows.append(row)
    return candidates.take(np.array(rows, int))


def describe(state: SearchState, seed_names: Iterable[str], first: int = 0) -> list[dict[str, Any]]:
    """One JSON-able entry a candidate from row `first` on: where it came from, its genes, its score and its cost."""
    names = list(seed_names)
    return [
        {
            "candidate": row,
            "iteration": int(state.iteration[row]),
            "operator": OPERATORS[state.operator[row]],
            "parents": [int(parent) for parent in state.parents[row] if parent >= 0],
            **({"seed": names[row]} if state.operator[row] == 0 else {}),
            "nll": float(state.nll[row]),
            "documents": state.documents[row].tolist(),
            "cost": float(state.cost[row]),
            "n_hat": int(state.n_hat[row]),
            "mscale": float(state.mscale[row]),
            "critical": int(state.critical[row]),
            "lam": state.lam[row].tolist(),
        }
        for row in range(first, len(state))
    ]
