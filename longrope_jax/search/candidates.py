"""What a search has scored so far: every candidate with its genes, its score, its origin and its cost."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from longrope_jax.rope import RopeFactors

OPERATORS = ("seed", "mutation", "crossover", "gradient", "cma_es", "ramp", "yarn")

_MIN_INCUMBENTS = 4  # read in full; fewer do not tell the error of a difference
_MAX_INCUMBENTS = 16
_MAX_READ = 400


class Genes(NamedTuple):
    """One candidate; with a leading axis, a population.

    Attributes:
        lam: rescale factors.
        n_hat: start tokens.
        mscale: attention temperature.
        critical: the first pair whose lam is free, see `SearchSpace`; 0 where all are.
    """

    lam: Float[Array | np.ndarray, "half"]
    n_hat: Int[Array | np.ndarray, ""]
    mscale: Float[Array | np.ndarray, ""]
    critical: Int[Array | np.ndarray, ""]


class Incumbents(NamedTuple):
    """What new candidates race against.

    Attributes:
        documents: NLL by document (nats per token) of the best F candidates that were read in full.
        threshold: score of the last of the k best, nats per token; inf where there are fewer than k.
        best: score of the best.
        read: the latest candidates that were read, in full or in a race, and on skipped positions.
        bias: their scores minus those on skipped positions.
    """

    documents: Float[np.ndarray, "F D"]
    threshold: float
    best: float
    read: RopeFactors | None = None
    bias: Float[np.ndarray, "R"] | None = None

    @property
    def has_enough(self) -> bool:
        """Whether there are enough candidates for a race."""
        return len(self.documents) >= _MIN_INCUMBENTS and np.isfinite(self.threshold)


class Scores(NamedTuple):
    """The scores of P candidates on D documents.

    Attributes:
        nll: the score, nats per token, smaller is better; inf where it is not a number, an estimate where a race
            decided early.
        documents: by document; nan where a race did not read it.
        cost: of every candidate in forward equivalents; all documents read once cost 1.
        screens: the score on skipped positions, nats per token; nan without screening.
    """

    nll: Float[np.ndarray, "P"]
    documents: Float[np.ndarray, "P D"]
    cost: Float[np.ndarray, "P"]
    screens: Float[np.ndarray, "P"] | float = np.nan


Score = Callable[[RopeFactors, Incumbents | None], Scores]
"""(a population of any size, what it may race against; None for no race) -> scores."""


@flax.struct.dataclass
class SearchState:
    """Every candidate scored so far, in order.

    Attributes:
        lam, n_hat, mscale, critical: their genes.
        nll, documents, cost, screens: their scores, see `Scores`; the first candidate of a gradient round also has the
            cost of the round's steps.
        parents: rows of the parents, -1 for none; a mutation has one, a crossover two.
        operator: index into `OPERATORS`.
        iteration: the iteration that made each candidate, 0 for the seeds.
        restart: the restart of the search that each belongs to, 0 for the first.
    """

    lam: Float[np.ndarray, "N half"]
    n_hat: Int[np.ndarray, "N"]
    mscale: Float[np.ndarray, "N"]
    critical: Int[np.ndarray, "N"]
    nll: Float[np.ndarray, "N"]
    documents: Float[np.ndarray, "N D"]
    cost: Float[np.ndarray, "N"]
    screens: Float[np.ndarray, "N"]
    parents: Int[np.ndarray, "N 2"]
    operator: Int[np.ndarray, "N"]
    iteration: Int[np.ndarray, "N"]
    restart: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.n_hat)

    def __repr__(self) -> str:
        return "SearchState(" + ", ".join(f"{name}: {value}" for name, value in self._overview()) + ")"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in self._overview())
        return f"<table>{rows}</table>"

    def _overview(self) -> list[tuple[str, str]]:
        """What a notebook shows."""
        table = [("candidates", str(len(self)))]
        if len(self):
            best = self.best()
            nll, ends = float(self.nll.min()), [*best.lam[:3], *best.lam[-3:]]
            table += [
                ("best score", f"{nll:.4f} nats per token (perplexity {np.exp(nll):.3f})"),
                ("lam, first and last three pairs", " ".join(f"{factor:.2f}" for factor in ends)),
                ("n_hat", str(int(best.n_hat))),
                ("mscale", f"{float(best.mscale):.3f}"),
                ("cost", f"{self.cost.sum():.1f} forward equivalents"),
            ]
        return table

    @property
    def genes(self) -> Genes:
        """Of all candidates."""
        return Genes(self.lam, self.n_hat, self.mscale, self.critical)

    @property
    def factors(self) -> RopeFactors:
        """All candidates as factors."""
        return RopeFactors(self.lam, self.n_hat, self.mscale)

    def take(self, rows: Int[np.ndarray, "R"]) -> "SearchState":
        """Some candidates, in the order of `rows`."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def top(self, k: int) -> Int[np.ndarray, "k"]:
        """Rows of the k best, best first; of equal ones the older first. This is Algorithm 1's top-k over history."""
        return np.argsort(self.nll, kind="stable")[:k]

    def candidates_of_restart(self, restart: int) -> Int[np.ndarray, "R"]:
        """Rows that a restart may use: its own candidates, and the seeds."""
        return np.flatnonzero((self.restart == restart) | (self.operator == OPERATORS.index("seed")))

    def incumbents(self, threshold: float) -> Incumbents:
        """What candidates race against that must score below a threshold, nats per token."""
        order = self.top(len(self))
        is_read = ~np.isnan(self.documents).any(1) & np.isfinite(self.nll)
        rows = [row for row in order if is_read[row]][:_MAX_INCUMBENTS]
        is_known = ~np.isnan(self.documents).all(1) & np.isfinite(self.nll) & np.isfinite(self.screens)
        both = np.flatnonzero(is_known)[-_MAX_READ:]
        read, bias = self.take(both).factors, self.nll[both] - self.screens[both]
        return Incumbents(self.documents[rows], float(threshold), float(self.nll.min()), read, bias)

    def best(self) -> RopeFactors:
        """The best candidate so far. It was read in full."""
        return jax.tree.map(lambda leaf: leaf[self.top(1)[0]], self.factors)


def new_candidates(
    genes: Genes,
    operator: str,
    documents: int,
    parents: Int[np.ndarray, "P 2"] | None = None,
    restart: int | Int[np.ndarray, "P"] = 0,
) -> SearchState:
    """Candidates without scores. Leaves of `genes` have a leading axis P; `documents` is the number of documents."""
    count = len(genes.n_hat)
    return SearchState(
        np.asarray(genes.lam, np.float32),
        np.asarray(genes.n_hat, np.int32),
        np.asarray(genes.mscale, np.float32),
        np.asarray(genes.critical, np.int32),
        np.full(count, np.inf),
        np.full((count, documents), np.nan),
        np.zeros(count),
        np.full(count, np.nan),
        np.full((count, 2), -1) if parents is None else np.asarray(parents, int),
        np.full(count, OPERATORS.index(operator)),
        np.zeros(count, int),
        np.broadcast_to(np.asarray(restart, int), count).copy(),
    )


def evaluate(candidates: SearchState, score: Score, incumbents: Incumbents | None, iteration: int) -> SearchState:
    """The same candidates with their scores, as candidates of `iteration`; with incumbents they race."""
    if not len(candidates):
        return candidates
    scores = score(candidates.factors, incumbents)
    return dataclasses.replace(
        candidates,
        nll=scores.nll,
        documents=scores.documents,
        cost=candidates.cost + scores.cost,
        screens=np.full(len(candidates), scores.screens),
        iteration=np.full(len(candidates), iteration),
    )


def concatenate(*states: SearchState) -> SearchState:
    """One state after the other."""
    return jax.tree.map(lambda *rows: np.concatenate(rows), *states)


def gene_keys(genes: Genes) -> list[tuple]:
    """A hashable key for every candidate. Two candidates are the same if all their genes are, to a millionth."""
    lam, mscale = (np.round(np.asarray(leaf, np.float64), 6).tolist() for leaf in (genes.lam, genes.mscale))
    rest = zip(np.asarray(genes.n_hat).tolist(), np.asarray(genes.critical).tolist(), strict=True)
    return [(*pair, temperature, *row) for pair, temperature, row in zip(rest, mscale, lam, strict=True)]


def remove_duplicates(candidates: SearchState, *known: SearchState) -> SearchState:
    """The candidates that are in none of the known states, each once: nothing is scored twice."""
    seen = {key for state in known for key in gene_keys(state.genes)}
    rows = []
    for row, key in enumerate(gene_keys(candidates.genes)):
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return candidates.take(np.array(rows, int))


def describe(state: SearchState, seed_names: Iterable[str], first: int = 0) -> list[dict[str, Any]]:
    """One JSON-able entry per candidate from row `first` on: its origin, genes, score and cost."""
    names = list(seed_names)
    return [
        {
            "candidate": row,
            "iteration": int(state.iteration[row]),
            "operator": OPERATORS[state.operator[row]],
            "parents": [int(parent) for parent in state.parents[row] if parent >= 0],
            **({"seed": names[row]} if state.operator[row] == 0 else {}),
            **({"screen": float(state.screens[row])} if np.isfinite(state.screens[row]) else {}),
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
