"""Where factors are searched (LongRoPE table 4) and where the search starts."""

from dataclasses import dataclass

import numpy as np

from longrope_jax.rope import RopeFactors, Trained, extend, unscaled

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

    Start tokens beyond that would be positions which the model has never seen unscaled. At a scale of 1 or a little
    more this is the space of the short-context recovery (sec. 3.3), whose smaller maximum is `upper_bound * scale`.
    """
    if not scale >= 1:
        raise ValueError(f"scale = {scale}; a search needs a target length of the original length or more")
    return SearchSpace(lower_bound, upper_bound * scale, step, tuple(n for n in n_hat if n <= original_length))


def paper_seeds(
    head_dim: int, target_length: int, base: float, original_length: int, trained: Trained, space: SearchSpace
) -> dict[str, RopeFactors]:
    """Algorithm 1's first individuals by name, different from each other, lam within the space.

    Beyond the window that the model was trained with, they are PI, NTK and YaRN as its next extension, on its
    *effective* wavelengths; for a model that was extended before also YaRN with its wider ramp, as two extensions
    leave a step between the pairs that neither touched and those that both stretched. For a shorter target (short-
    context recovery) they are the same methods on the original model, no method at all, and the trained factors. All
    have the temperature that the model was trained with: a search compares rotations.
    """
    methods = {"linear": "linear", "ntk": "ntk", "yarn": "yarn_without_temperature"}
    if trained.length > original_length:
        methods["yarn_mistral"] = "yarn_mistral"
    if target_length > trained.length:
        seeds = {name: extend(method, trained, target_length, head_dim, base) for name, method in methods.items()}
    else:
        original = Trained(original_length, unscaled(head_dim))
        seeds = {name: extend(method, original, target_length, head_dim, base) for name, method in methods.items()}
        is_clipped = np.max(trained.factors.lam) > space.high
        name = "trained_clipped" if is_clipped else "trained"
        seeds = {name: trained.factors, "unscaled": original.factors, **seeds}
    clipped = {
        name: RopeFactors(
            np.clip(np.asarray(seed.lam), np.float32(space.low), np.float32(space.high)),
            np.asarray(seed.n_hat),
            np.asarray(trained.factors.mscale),
        )
        for name, seed in seeds.items()
    }
    different = {(int(seed.n_hat), seed.lam.tobytes()): name for name, seed in reversed(clipped.items())}
    return {name: seed for name, seed in clipped.items() if name in different.values()}
