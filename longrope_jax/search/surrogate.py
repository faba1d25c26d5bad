"""A surrogate of the score, which costs little beside a score: it selects among more children than are scored.

It is a Gaussian process with a Matern 5/2 kernel over a candidate's rotation. Every pair has a length of its own (ARD),
because pairs differ much in how far their factor can move before the score does (Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2006, ch. 2, sec. 5.1 and 5.4). It depends on the candidates scored so far alone, so a
search that continues from them makes the same choices.

It replaces scikit-learn's GaussianProcessRegressor, whose lengths have bounds but no priors, and whose gradient builds
an N x N array for every length. On 100 to 600 recorded candidates of the quickstart's search, with the same kernel and
bounds, that one took 0.24 to 4.4 s per fit (here 0.01 to 0.21 s), with a held-out log likelihood of -2.0 (here -0.9)
and a rank correlation of 0.83 (here 0.85). Best scores of four pairs of searches on two small models differed by
+0.009 nats on average (-0.005 to +0.032), which is no clear difference.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.stats
from jaxtyping import Float, Int
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from longrope_jax.rope import RopeFactors
from longrope_jax.search.candidates import SearchState

_MAX_FITTED = 400  # the latest candidates; time grows with their number cubed
_RESOLUTION = 0.02  # nats per token above the best; smaller differences count in full, larger ones by their ratio
_START_TOKENS, _MSCALE = 0.02, 1.0  # units of the features log2(1 + n_hat) and log mscale
_PRIOR_LENGTH, _PRIOR_NOISE = 0.1, 3e-3  # medians of the prior
_PRIOR_STD = 1.5  # of the logarithms of a squared length and of the noise
_MAX_ITERATIONS = 10  # of L-BFGS; more hardly change likelihood and ranking
_TAIL = 6.0  # standard deviations; beyond them an expected improvement is computed by its asymptote


class Surrogate(NamedTuple):
    """A Gaussian process, conditioned on N candidates.

    Attributes:
        points: their features, divided by the lengths of the kernel.
        lengths: of the kernel, by feature.
        noise: variance of the noise, in units of `variance`.
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


# BLAS threads spin while they wait. On matrices with some hundred rows, on two shared cores, two threads used eight
# times as much processor time as one.
@threadpool_limits.wrap(limits=1, user_api="blas")
def select_by_expected_improvement(
    state: SearchState, children: SearchState, count: int, goal: float
) -> Int[np.ndarray, "count"]:
    """Rows of the children to score, in the order of selection.

    Each has the largest expected improvement, given that the children selected before it score as expected. So they do
    not crowd around one point (Ginsbourger, Le Riche and Carraro, Kriging is well-suited to parallelize optimization,
    2010, sec. 4.1). Time grows with `count` times the square of the number of children.

    Args:
        state: scored candidates, to learn from.
        children: candidates without scores.
        goal: score to improve on, nats per token, of a candidate in the state.
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
    """Mean of log(score - best + `_RESOLUTION`) of the candidates, and its covariance in units of `variance`."""
    points = features(candidates) / surrogate.lengths
    cross = _kernel(points, surrogate.points)
    explained = scipy.linalg.solve_triangular(surrogate.factor, cross.T, lower=True)
    covariance = _kernel(points, points) - explained.T @ explained
    return surrogate.mean + cross @ surrogate.coefficients, covariance


def features(candidates: SearchState | RopeFactors) -> Float[np.ndarray, "P F"]:
    """1 / lam of every pair, the share of its frequency that is left, and the other genes."""
    start_tokens = _START_TOKENS * np.log2(1.0 + candidates.n_hat)
    mscale = _MSCALE * np.log(candidates.mscale.astype(np.float64))
    return np.column_stack([1 / candidates.lam.astype(np.float64), start_tokens, mscale])


def fitted(state: SearchState) -> Surrogate:
    """Fits the latest candidates with a score, at the lengths and noise that maximise the posterior."""
    rows = np.flatnonzero(np.isfinite(state.nll))[-_MAX_FITTED:]
    points, best = features(state.take(rows)), float(state.nll.min())
    score = np.log(state.nll[rows] - best + _RESOLUTION)
    mean = float(np.median(score))
    prior = np.log(np.append(np.full(points.shape[1], _PRIOR_LENGTH) ** -2, _PRIOR_NOISE))
    found = scipy.optimize.minimize(
        negative_log_posterior,
        prior,
        args=(points, score - mean, prior),
        jac=True,
        method="L-BFGS-B",
        bounds=[(center - 4 * _PRIOR_STD, center + 4 * _PRIOR_STD) for center in prior],
        options={"maxiter": _MAX_ITERATIONS},
    ).x
    lengths, noise = np.exp(-found[:-1] / 2), float(np.exp(found[-1]))
    points = points / lengths
    factor = scipy.linalg.cholesky(_kernel(points, points) + noise * np.eye(len(points)), lower=True)
    coefficients = scipy.linalg.cho_solve((factor, True), score - mean)
    variance = max(float((score - mean) @ coefficients) / len(points), 1e-12)
    return Surrogate(points, lengths, noise, factor, best, mean, coefficients, variance)


def negative_log_posterior(
    logs: Float[np.ndarray, "F+1"],
    points: Float[np.ndarray, "N F"],
    score: Float[np.ndarray, "N"],
    prior: Float[np.ndarray, "F+1"],
) -> tuple[float, Float[np.ndarray, "F+1"]]:
    """Negative log posterior of the hyperparameters, and its gradient.

    Args:
        logs: of 1 / length^2 by feature and, last, of the noise.
        score: minus its mean; its variance is the most likely one (profiled out).
        prior: means of the logarithms.
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
    deviation = (logs - prior) / _PRIOR_STD
    return value + 0.5 * (deviation @ deviation), gradient + deviation / _PRIOR_STD


def _log_improvement(
    mean: Float[np.ndarray, "P"], deviation: Float[np.ndarray, "P"], goal: float
) -> Float[np.ndarray, "P"]:
    """Logarithm of the expected improvement of normal variables below a goal; finite however small that is."""
    z = (goal - mean) / deviation
    near = np.maximum(z, -_TAIL)
    log_ratio = np.log(scipy.stats.norm.pdf(near) + near * scipy.stats.norm.cdf(near))
    far = scipy.stats.norm.logpdf(z) - 2 * np.log(np.maximum(-z, _TAIL))
    return np.log(deviation) + np.where(z < -_TAIL, far, log_ratio)


def _kernel(first: Float[np.ndarray, "A F"], second: Float[np.ndarray, "B F"]) -> Float[np.ndarray, "A B"]:
    """Matern 5/2, of points divided by their lengths."""
    distance = np.sqrt(5) * cdist(first, second)
    return (1 + distance + np.square(distance) / 3) * np.exp(-distance)
