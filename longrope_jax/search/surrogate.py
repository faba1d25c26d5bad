"""A model of the score, which costs nothing beside the score: children are made in excess, and it is asked first.

It is a Gaussian process over what a candidate does to the rotation, with a length of its own for every pair: pairs
differ much in how far their factor can move before the score does (Rasmussen and Williams, Gaussian Processes for
Machine Learning, 2006, ch. 2, sec. 5.1 and 5.4). It is fitted to the candidates scored so far and to nothing else, so
that a search which goes on from them makes the same choices.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.stats
from jaxtyping import Float, Int
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from longrope_jax.search.candidates import SearchState

_MOST = 400  # candidates fitted to, the latest; time grows with their number cubed
_RESOLUTION = 0.02  # nats per token above the best: below it differences count in full, above it by their ratio
_START_TOKENS, _MSCALE = 0.02, 1.0  # units of the features log2(1 + n_hat) and log mscale
_USUAL_LENGTH, _USUAL_NOISE = 0.1, 3e-3  # medians of what is expected before there are scores
_SPREAD = 1.5  # of their logarithms, a standard deviation; of a length's square
_STEPS = 10  # of L-BFGS; after them likelihood and ranking hardly change
_SURE = 6.0  # standard deviations beyond which the tail of an expected improvement is its asymptote


class Surrogate(NamedTuple):
    """A Gaussian process, conditioned on N candidates.

    Attributes:
        points: their features, in lengths of the kernel.
        lengths: of the kernel, by feature.
        noise: variance of what is no function of the features, in units of `variance`.
        factor: Cholesky factor of the covariance with the noise, lower, in units of `variance`.
        best: the least of the scores, nats per token.
        mean, coefficients, variance: of log(score - best + `_RESOLUTION`).
    """

    points: Float[np.ndarray, "N F"]
    lengths: Float[np.ndarray, "F"]
    noise: float
    factor: Float[np.ndarray, "N N"]
    best: float
    mean: float
    coefficients: Float[np.ndarray, "N"]
    variance: float


# BLAS's threads spin while they wait for each other: of matrices with some hundred rows, on two cores that others were
# using too, two threads took eight times as much of the processor as one.
@threadpool_limits.wrap(limits=1, user_api="blas")
def promising(state: SearchState, children: SearchState, count: int, goal: float) -> Int[np.ndarray, "count"]:
    """Rows of the children to score, in the order in which they were chosen.

    Each is the one of which most improvement is expected beyond what there is and beyond those chosen before it, which
    are taken to turn out as expected: so they are no crowd around a single guess (Ginsbourger, Le Riche and Carraro,
    Kriging is well-suited to parallelize optimization, 2010, sec. 4.1). Time grows with `count` times the square of the
    number of children, which is nothing beside a score.

    Args:
        state: scored, what is learnt from.
        children: unscored.
        goal: score to improve on, nats per token; that of a candidate in the state.
    """
    surrogate = fitted(state)
    mean, covariance = posterior(surrogate, children)
    goal, chosen = float(np.log(goal - surrogate.best + _RESOLUTION)), list[int]()
    for _ in range(min(count, len(children))):
        deviation = np.sqrt(surrogate.variance * np.maximum(np.diagonal(covariance), 1e-12))
        improvement = _log_improvement(mean, deviation, goal)
        improvement[chosen] = -np.inf
        row = int(np.argmax(improvement))
        chosen.append(row)
        goal = min(goal, mean[row])
        known = covariance[row] / np.sqrt(covariance[row, row] + surrogate.noise)
        covariance -= np.outer(known, known)
    return np.array(chosen, int)


def posterior(surrogate: Surrogate, candidates: SearchState) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P P"]]:
    """What is to be expected of their scores, as log(score - best + `_RESOLUTION`), and its covariance, in units of
    `variance`.
    """
    points = features(candidates) / surrogate.lengths
    cross = _kernel(points, surrogate.points)
    explained = scipy.linalg.solve_triangular(surrogate.factor, cross.T, lower=True)
    covariance = _kernel(points, points) - explained.T @ explained
    return surrogate.mean + cross @ surrogate.coefficients, covariance


def features(candidates: SearchState) -> Float[np.ndarray, "P F"]:
    """What a candidate does: by pair the share of its frequency that is left, 1 / lam, and the other genes."""
    start_tokens = _START_TOKENS * np.log2(1.0 + candidates.n_hat)
    mscale = _MSCALE * np.log(candidates.mscale.astype(np.float64))
    return np.column_stack([1 / candidates.lam.astype(np.float64), start_tokens, mscale])


def fitted(state: SearchState) -> Surrogate:
    """To the latest of the state that have a score, at the lengths and the noise that are likeliest given them."""
    rows = np.flatnonzero(np.isfinite(state.nll))[-_MOST:]
    points, best = features(state.take(rows)), float(state.nll.min())
    score = np.log(state.nll[rows] - best + _RESOLUTION)
    mean = float(np.median(score))
    usual = np.log(np.append(np.full(points.shape[1], _USUAL_LENGTH) ** -2, _USUAL_NOISE))
    found = scipy.optimize.minimize(
        _unlikeliness,
        usual,
        args=(points, score - mean, usual),
        jac=True,
        method="L-BFGS-B",
        bounds=[(center - 4 * _SPREAD, center + 4 * _SPREAD) for center in usual],
        options={"maxiter": _STEPS},
    ).x
    lengths, noise = np.exp(-found[:-1] / 2), float(np.exp(found[-1]))
    points = points / lengths
    factor = scipy.linalg.cholesky(_kernel(points, points) + noise * np.eye(len(points)), lower=True)
    coefficients = scipy.linalg.cho_solve((factor, True), score - mean)
    variance = max(float((score - mean) @ coefficients) / len(points), 1e-12)
    return Surrogate(points, lengths, noise, factor, best, mean, coefficients, variance)


def _unlikeliness(
    logs: Float[np.ndarray, "F+1"],
    points: Float[np.ndarray, "N F"],
    score: Float[np.ndarray, "N"],
    usual: Float[np.ndarray, "F+1"],
) -> tuple[float, Float[np.ndarray, "F+1"]]:
    """Minus the logarithm of the posterior of the kernel's numbers, and its gradient.

    Args:
        logs: of 1 / length^2 by feature and, last, of the noise; what is expected of them are `usual`.
        score: its mean taken off; its variance is the likeliest one (profiled out).
    """
    weights, noise, count = np.exp(logs[:-1]), np.exp(logs[-1]), len(score)
    scaled = points * np.sqrt(weights)
    distance = np.sqrt(5) * cdist(scaled, scaled)
    decay = np.exp(-distance)
    covariance = (1 + distance + np.square(distance) / 3) * decay + noise * np.eye(count)
    factor = (scipy.linalg.cholesky(covariance, lower=True), True)
    coefficients = scipy.linalg.cho_solve(factor, score)
    variance = max(score @ coefficients / count, 1e-12)
    value = 0.5 * count * np.log(variance) + np.log(np.diagonal(factor[0])).sum()
    # (5.9) of the book: half the trace of (K^-1 - a a^T / variance) dK.
    slope = 0.5 * (scipy.linalg.cho_solve(factor, np.eye(count)) - np.outer(coefficients, coefficients) / variance)
    of_square = -5 / 6 * (1 + distance) * decay * slope  # by the squared distance of two points
    # The sum over pairs of points of w_jk (x_j - x_k)^2, one for every feature.
    by_feature = 2 * (of_square.sum(1) @ np.square(points) - (points * (of_square @ points)).sum(0))
    gradient = np.append(weights * by_feature, noise * np.trace(slope))
    surprise = (logs - usual) / _SPREAD
    return value + 0.5 * (surprise @ surprise), gradient + surprise / _SPREAD


def _log_improvement(
    mean: Float[np.ndarray, "P"], deviation: Float[np.ndarray, "P"], goal: float
) -> Float[np.ndarray, "P"]:
    """Logarithm of the expected improvement of normal variables below a goal; finite however small that is."""
    z = (goal - mean) / deviation
    near = np.maximum(z, -_SURE)
    log_ratio = np.log(scipy.stats.norm.pdf(near) + near * scipy.stats.norm.cdf(near))
    far = scipy.stats.norm.logpdf(z) - 2 * np.log(np.maximum(-z, _SURE))
    return np.log(deviation) + np.where(z < -_SURE, far, log_ratio)


def _kernel(first: Float[np.ndarray, "A F"], second: Float[np.ndarray, "B F"]) -> Float[np.ndarray, "A B"]:
    """Matern's of smoothness 5/2, of points in lengths."""
    distance = np.sqrt(5) * cdist(first, second)
    return (1 + distance + np.square(distance) / 3) * np.exp(-distance)
