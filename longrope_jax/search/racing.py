"""A race over documents: a candidate is read only until it is plain whether it comes under the k best or not.

Candidates are compared with the best that were read in full, document by document, so that what makes a document hard
cancels. How far a difference on some documents is from that on all of them is seen from those best themselves: they
are the ones about which it is hard to be sure. Who may be the best of all is always read in full.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

_FEWEST = 4  # read in full, to tell from how far off differences are


class Standing(NamedTuple):
    """What newcomers are compared with.

    Attributes:
        documents: NLL by document (nats per token) of the best F that were read in full.
        bar: score of the last of the k best, under which newcomers want to come; inf where there are fewer than k.
        best: score of the best.
    """

    documents: Float[np.ndarray, "F D"]
    bar: float
    best: float

    @property
    def suffices(self) -> bool:
        """Whether there is enough to compare with."""
        return len(self.documents) >= _FEWEST and np.isfinite(self.bar)


def informative_first(
    standing: Float[np.ndarray, "F D"], weights: Float[np.ndarray, "D"], blocks: Sequence[Int[np.ndarray, "B"]]
) -> list[int]:
    """The order in which to read blocks of documents: each next one is that after which differences between the best
    are nearest to what they are on all documents.
    """
    order: list[int] = []
    left = list(range(len(blocks)))
    while left:
        errors = [_error(standing, weights, np.concatenate([blocks[b] for b in (*order, block)])) for block in left]
        order.append(left.pop(int(np.argmin(errors))))
    return order


def judge(
    losses: Float[np.ndarray, "P D"], standing: Standing, weights: Float[np.ndarray, "D"], confidence: float
) -> tuple[Float[np.ndarray, "P"], Bool[np.ndarray, "P"]]:
    """Candidates' scores, nats per token, as far as they can be told, and about whom nothing more has to be known.

    Args:
        losses: of the candidates; nan where they were not read yet, the same documents for all.
        standing: what they are compared with.
        weights: of the documents, see `document_weights`.
        confidence: one-sided, of the interval of a paired difference on all documents, given that on some (t with
            F - 1 degrees of freedom).
    """
    known = np.flatnonzero(~np.isnan(losses).any(0))
    usual = standing.documents.mean(0)
    score = usual @ weights + _weighted(losses - usual, weights, known)
    half_width = scipy.stats.t.ppf(confidence, len(standing.documents) - 1) * _error(standing.documents, weights, known)
    is_out = score - half_width > standing.bar
    is_in = (score + half_width < standing.bar) & (score - half_width > standing.best)
    return score, is_out | is_in


def _error(standing, weights, known) -> float:
    """Root mean square over the best: their difference to the mean of them on some documents, minus that on all."""
    differences = standing - standing.mean(0)
    errors = _weighted(differences, weights, known) - differences @ weights
    return float(np.sqrt(np.square(errors).sum() / (len(standing) - 1)))


def _weighted(differences, weights, known):
    return differences[:, known] @ (weights[known] / weights[known].sum())
