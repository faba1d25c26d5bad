"""Where factors are searched (LongRoPE table 4) and where the search starts."""

from dataclasses import dataclass

from longrope_jax import rope
from longrope_jax.rope import RopeFactors

# Table 4 without 1: position 0 does not turn, so one start token is the same function as none.
N_HAT = (0, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


@dataclass(frozen=True)
class SearchSpace:
    """All candidates: `low <= lam_0 <= lam_1 <= ... <= high`, multiples of `step` where drawn; n_hat from a grid.

    Seeds keep their own values, which are rarely multiples of the step.

    Attributes:
        low, high: bounds of lam; table 4 has 1.0 and 1.25 s.
        step: of lam; table 4 has 0.01.
        n_hat: start tokens to choose from, 0 among them.
    """

    low: float
    high: float
    step: float
    n_hat: tuple[int, ...]

    def __post_init__(self):
        if not 1 <= self.low < self.high:
            raise ValueError(f"need 1 <= low < high for lam, not low = {self.low}, high = {self.high}")
        if not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step = {self.step} must be positive and fit between {self.low} and {self.high}")
        if 0 not in self.n_hat or min(self.n_hat) < 0:
            raise ValueError(f"n_hat = {self.n_hat} must contain 0 and nothing below")


def paper_space(
    scale: float,
    original_length: int,
    lower_bound: float = 1.0,
    upper_bound: float = 1.25,
    step: float = 0.01,
    n_hat: tuple[int, ...] = N_HAT,
) -> SearchSpace:
    """Table 4 for an extension by `scale`: lam in [lower_bound, upper_bound * scale], n_hat up to the original length.

    Start tokens beyond that would be positions which the model has never seen unscaled.
    """
    if not scale > 1:
        raise ValueError(f"scale = {scale}; a search needs a target length above the original length")
    if not upper_bound >= 1:
        raise ValueError(f"upper_bound = {upper_bound} must be at least 1: the seeds' factors reach the scale itself")
    return SearchSpace(lower_bound, upper_bound * scale, step, tuple(n for n in n_hat if n <= original_length))


def paper_seeds(head_dim: int, scale: float, base: float, original_length: int) -> dict[str, RopeFactors]:
    """Algorithm 1's first three individuals by name, with mscale 1: a search compares rotations, not temperatures."""
    return {
        "linear": rope.linear(head_dim, scale),
        "ntk": rope.ntk(head_dim, scale),
        "yarn": rope.yarn(head_dim, scale, base, original_length, temperature=False),
    }
