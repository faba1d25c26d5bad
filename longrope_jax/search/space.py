"""Where factors are searched: LongRoPE's table 4, and LongRoPE2's space above a critical dimension."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longrope_jax.rope import critical_dimension

# Table 4 without 1: position 0 does not turn, so one start token is the same function as none.
N_HAT = (0, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
STEP = 0.01  # of lam, in table 4
SPACES = ("paper", "critical_dimension")
_MAX_PERIODS = 10  # in L, of the first pair that may be the critical one (LongRoPE2 sec. 3.2)


@dataclass(frozen=True)
class SearchSpace:
    """All candidates: `low <= lam_c <= lam_{c+1} <= ... <= high` from a critical pair c on, multiples of `step` where
    drawn; lam_i = lam_c^(i/c), NTK, for the pairs below it; n_hat and mscale from grids.

    Seeds keep their own values, which are rarely multiples of the step.

    Attributes:
        low, high: bounds of lam; table 4 has 1.0 and 1.25 s, LongRoPE2 s and 2 s.
        step: of lam; table 4 has 0.01.
        n_hat: start tokens to choose from, 0 among them.
        mscale: bounds of the attention temperature, drawn in multiples of `step`; equal ones fix it.
        critical: pairs to choose the critical one from; (0,), the paper's space, frees all.
    """

    low: float
    high: float
    step: float
    n_hat: tuple[int, ...]
    mscale: tuple[float, float] = (1.0, 1.0)
    critical: tuple[int, ...] = (0,)

    def __post_init__(self):
        if not 1 <= self.low < self.high:
            raise ValueError(f"need 1 <= low < high for lam, not low = {self.low}, high = {self.high}")
        if not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step = {self.step} must be positive and fit between {self.low} and {self.high}")
        if 0 not in self.n_hat or min(self.n_hat) < 0:
            raise ValueError(f"n_hat = {self.n_hat} must contain 0 and nothing below")
        if not 0 < self.mscale[0] <= self.mscale[1]:
            raise ValueError(f"mscale = {self.mscale} must be two positive bounds, the lower one first")
        if not self.critical or min(self.critical) < 0:
            raise ValueError(f"critical = {self.critical} must be pairs from 0 on")

    def completed(
        self, lam: Float[Array | np.ndarray, "*rows half"], critical: Int[Array | np.ndarray | np.integer, "*rows"]
    ) -> Float[Array, "*rows half"]:
        """lam of a candidate: these factors from the critical pair on, clipped to the bounds, and NTK below it.

        Source: LongRoPE2 sec. 3.2.
        """
        return self.followed(jnp.clip(lam, self.low, self.high), critical)

    def followed(
        self, lam: Float[Array, "*rows half"], critical: Int[Array | np.ndarray | np.integer, "*rows"]
    ) -> Float[Array, "*rows half"]:
        """The same for factors that are within the bounds."""
        if self.critical == (0,):
            return lam
        critical = jnp.asarray(critical)[..., None]
        pairs = jnp.arange(lam.shape[-1])
        base = jnp.take_along_axis(lam, critical, axis=-1)
        return jnp.where(pairs >= critical, lam, base ** (jnp.minimum(pairs, critical) / jnp.maximum(critical, 1)))


def paper_space(
    scale: float,
    original_length: int,
    upper_bound: float = 1.25,
    n_hat: tuple[int, ...] = N_HAT,
    mscale: tuple[float, float] = (1.0, 1.0),
    step: float = STEP,
) -> SearchSpace:
    """Table 4 for an extension by `scale`: lam in [1, upper_bound * scale], n_hat up to the original length.

    The model has never seen positions beyond that unscaled. At a scale near 1 this is the space of the short-context
    recovery (sec. 3.3), with the maximum `upper_bound * scale`.

    Raises:
        ValueError: a scale below 1, or an empty range.
    """
    _check_scale(scale)
    return SearchSpace(1.0, upper_bound * scale, step, _capped(n_hat, original_length), mscale)


def critical_space(
    scale: float,
    original_length: int,
    head_dim: int,
    base: float,
    n_hat: tuple[int, ...] = N_HAT,
    mscale: tuple[float, float] = (1.0, 1.0),
) -> SearchSpace:
    """LongRoPE2's space (arXiv 2502.20082, sec. 3.2) for an extension by `scale`: lam in [s, 2 s] from a critical pair
    on, which lies between the one with ten periods in L and the theoretical critical dimension.

    Raises:
        ValueError: a scale below 1, or an odd head dimension.
    """
    _check_scale(scale)
    first, last = (
        min(max(critical_dimension(head_dim, base, original_length, periods), 0), head_dim // 2 - 1)
        for periods in (_MAX_PERIODS, 1)
    )
    return SearchSpace(scale, 2 * scale, STEP, _capped(n_hat, original_length), mscale, tuple(range(first, last + 1)))


def _check_scale(scale: float) -> None:
    if not scale >= 1:
        raise ValueError(f"scale = {scale}; a search needs a target length of the original length or more")


def _capped(n_hat: tuple[int, ...], original_length: int) -> tuple[int, ...]:
    return tuple(n for n in n_hat if n <= original_length)
