"""What factors do to a rotation, in numbers: wavelengths, trained ranges, and how scores fall with distance."""

import numpy as np
from jaxtyping import Float, Int

from longrope_jax.rope.factors import RopeFactors
from longrope_jax.rope.methods import frequencies


def wavelengths(factors: RopeFactors, base: float = 10000.0) -> Float[np.ndarray, "half"]:
    """Tokens in which every pair turns once with its factor, 2 pi lam_i / theta_i, beyond the start tokens.

    Args:
        factors: unbatched.
    """
    lam = np.asarray(factors.lam, np.float64)
    return 2 * np.pi * lam / frequencies(2 * len(lam), base)


def trained_until(factors: RopeFactors, original_length: int, base: float = 10000.0) -> Float[np.ndarray, "half"]:
    """The position (tokens) at which every pair comes to angles that pretraining has not shown it.

    A pair that turns once within the original length L has seen all angles: infinity. A slower one has seen those below
    L theta_i, and comes to the end of them at L lam_i. So the factors that keep a window of sL in the trained range
    are those with lam_i >= s from the critical dimension on (LongRoPE2, arXiv 2502.20082, sec. 3.1).

    Args:
        factors: unbatched.
        original_length: L, tokens.
    """
    lam = np.asarray(factors.lam, np.float64)
    turns = frequencies(2 * len(lam), base) * original_length / (2 * np.pi)
    return np.where(turns >= 1, np.inf, original_length * lam)


def score_by_distance(
    factors: RopeFactors, distances: Int[np.ndarray, "N"], base: float = 10000.0
) -> Float[np.ndarray, "N"]:
    """How well a query matches a key of the same content so many tokens before it, as the rotation alone has it.

    The mean over pairs of cos(n theta_i / lam_i), times mscale^2: what is left of the score of a query and a key that
    are equal and spread evenly over the pairs, 1 at distance 0 without a temperature (RoFormer, arXiv 2104.09864, sec.
    3.4.3, which bounds it; arXiv 2405.14591, eq. 7, for the mean). Both lie beyond the start tokens.

    Args:
        factors: unbatched.
        distances: tokens, 0 or more.
    """
    lam = np.asarray(factors.lam, np.float64)
    angles = np.asarray(distances)[:, None] * frequencies(2 * len(lam), base) / lam
    return np.cos(angles).mean(1) * float(factors.mscale) ** 2
