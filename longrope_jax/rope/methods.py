"""The published methods that extend a context, each as its rescale factors; and what factors do to a rotation.

All methods are the same rotation with different factors. So a method is a function of the head dimension, the scale
s = L'/L and sometimes the model's base and original length. It computes in float64 and returns unbatched `RopeFactors`
(lam f32[D/2]). `METHODS` has them by name, `extend` applies one to a model, `wavelengths`, `trained_until` and
`score_by_distance` analyse factors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from longrope_jax.rope.factors import RopeFactors


@dataclass(frozen=True)
class Trained:
    """The window and factors that a model was last trained with.

    For a pretrained model: its original length and `unscaled`. Fine-tuning changes both.

    Attributes:
        length: the context window, tokens.
        factors: unbatched, relative to the pretrained model.
    """

    length: int
    factors: RopeFactors


def frequencies(head_dim: int, base: float = 10000.0) -> np.ndarray:
    """theta_i = base^(-2i/D), the angle of every rotary pair per token (RoFormer, arXiv 2104.09864): f64[D/2], rad.

    Raises:
        ValueError: an odd head dimension, or a base that is not above 1.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}; rotary embedding needs a positive even head dimension")
    if not base > 1:
        raise ValueError(f"base = {base}; the RoPE base must be above 1")
    return base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def unscaled(head_dim: int) -> RopeFactors:
    """The pretrained rotation, lam = 1. Beyond the original length this is extrapolation."""
    return _factors(np.ones(_pairs(head_dim)))


def linear(head_dim: int, scale: float) -> RopeFactors:
    """Positional interpolation (PI, arXiv 2306.15595, eq. 4): every wavelength is stretched by `scale` = L'/L.

    Raises:
        ValueError: a scale below 1.
    """
    return _factors(np.full(_pairs(head_dim), _checked(scale)))


def ntk(head_dim: int, scale: float) -> RopeFactors:
    """NTK-aware interpolation (bloc97), base * s^(D/(D-2)): lam_i = s^(2i/(D-2)), from 1 for the first pair to s.

    Described by its author on Reddit, June 2023; YaRN (arXiv 2309.00071, sec. 3.1) has it as a formula.

    Raises:
        ValueError: a scale below 1.
    """
    exponent = 2 * np.arange(_pairs(head_dim)) / max(head_dim - 2, 1)
    return _factors(_checked(scale) ** exponent)


def dynamic_ntk(head_dim: int, length: int, original_length: int, factor: float = 1.0) -> RopeFactors:
    """Dynamic NTK: `ntk` with a scale that follows the current sequence, `factor * length / L - (factor - 1)`.

    As in Transformers; the idea is emozilla's (YaRN, arXiv 2309.00071, sec. 3.3, "dynamic scaling").

    `factor = 1` gives the scale length / L; other values are Hugging Face's `factor`. Lengths up to L do not change
    the rotation. Lengths are tokens.

    Raises:
        ValueError: a length that is not positive.
    """
    if length < 1 or original_length < 1:
        raise ValueError(f"length = {length}, original_length = {original_length}; both must be positive")
    # The excess over L, so that no rounding takes the scale below 1.
    return ntk(head_dim, 1 + factor * max(length - original_length, 0) / original_length)


def critical_dimension(
    head_dim: int,
    base: float = 10000.0,
    original_length: int = 4096,
    periods: float = 1.0,
    wavelengths: np.ndarray | None = None,
) -> int:
    """First pair that makes at most `periods` turns in the original length (LongRoPE2, arXiv 2502.20082, sec. 3.1).

    With one period it is the theoretical critical dimension d_tcd = ceil((D/2) log_base(L / 2 pi)); it can lie outside
    [0, D/2) for extreme lengths. `wavelengths`, f64[D/2] in tokens, as in `yarn`.
    """
    wavelengths = _wavelengths(head_dim, base) if wavelengths is None else wavelengths
    return int(np.ceil(_pair_with_turns(periods, wavelengths, original_length)))


def ntk_critical(
    head_dim: int,
    scale: float,
    base: float = 10000.0,
    original_length: int = 4096,
    wavelengths: np.ndarray | None = None,
) -> RopeFactors:
    """NTK with its base chosen so that lam >= s from the critical dimension on (LongRoPE2, arXiv 2502.20082):
    lam_i = s^(i / d_tcd). `wavelengths`, f64[D/2] in tokens, as in `yarn`.

    Raises:
        ValueError: a scale below 1, or an original length that is shorter than every wavelength.
    """
    critical = critical_dimension(head_dim, base, original_length, wavelengths=wavelengths)
    if critical < 1:
        raise ValueError(f"original_length = {original_length} is shorter than every wavelength of base {base}")
    return _factors(_checked(scale) ** (np.arange(_pairs(head_dim)) / critical))


def yarn(
    head_dim: int,
    scale: float,
    base: float = 10000.0,
    original_length: int = 4096,
    wavelengths: np.ndarray | None = None,
    beta_fast: float = 32,
    beta_slow: float = 1,
    temperature: bool = True,
) -> RopeFactors:
    """YaRN, "NTK by parts" (arXiv 2309.00071, sec. 3.2): fast pairs keep their wavelength, slow ones are interpolated.

    A blend over the pair index falls from 1 at the pair that makes `beta_fast` turns in the original length to 0 at
    the one that makes `beta_slow`; 1/lam blends 1 and 1/s along it. Boundaries are floored, ceiled and clamped as in
    the released code.

    Args:
        wavelengths: f64[D/2] in tokens, where they are not those of `base`: an already extended model's (see
            `compose`).
        temperature: multiply cos and sin by 0.1 ln s + 1 (sec. 3.4), else by 1.

    Raises:
        ValueError: a scale below 1, or a `beta_fast` that is not above `beta_slow`.
    """
    scale = _checked(scale)
    if beta_fast <= beta_slow:
        raise ValueError(f"beta_fast = {beta_fast} must be above beta_slow = {beta_slow}")
    wavelengths = _wavelengths(head_dim, base) if wavelengths is None else wavelengths
    low = max(np.floor(_pair_with_turns(beta_fast, wavelengths, original_length)), 0)
    high = min(np.ceil(_pair_with_turns(beta_slow, wavelengths, original_length)), head_dim - 1)
    width = high - low if high != low else 0.001
    unscaled_share = 1 - np.clip((np.arange(_pairs(head_dim)) - low) / width, 0, 1)
    return _factors(_blend(unscaled_share, scale), 0.1 * np.log(scale) + 1 if temperature else 1.0)


def llama3(
    head_dim: int,
    scale: float,
    base: float = 500000.0,
    original_length: int = 8192,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    wavelengths: np.ndarray | None = None,
) -> RopeFactors:
    """LLaMA-3.1's blend: as YaRN's, but linear in the turns between `low_freq_factor` and `high_freq_factor`.

    As in Meta's released code, and "llama3" in Transformers. `wavelengths`, f64[D/2] in tokens, as in `yarn`.

    Raises:
        ValueError: a scale below 1, or a `high_freq_factor` that is not above `low_freq_factor`.
    """
    scale = _checked(scale)
    if high_freq_factor <= low_freq_factor:
        raise ValueError(f"high_freq_factor = {high_freq_factor} must be above low_freq_factor = {low_freq_factor}")
    turns = original_length / (_wavelengths(head_dim, base) if wavelengths is None else wavelengths)
    unscaled_share = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return _factors(_blend(unscaled_share, scale))


def longrope_mscale(scale: float, original_length: int) -> float:
    """LongRoPE's attention temperature in the released code and Hugging Face: sqrt(1 + ln s / ln L), 1 up to s = 1, and
    infinite for an L of a single token.
    """
    if scale <= 1:
        return 1.0
    return float(np.sqrt(1 + np.log(scale) / np.log(original_length))) if original_length > 1 else np.inf


Method = Callable[[int, float, float, int, np.ndarray], RopeFactors]


METHODS: dict[str, Method] = {
    "unscaled": lambda head_dim, *_: unscaled(head_dim),
    "linear": lambda head_dim, scale, *_: linear(head_dim, scale),
    "ntk": lambda head_dim, scale, *_: ntk(head_dim, scale),
    "yarn": yarn,
    "yarn_without_temperature": partial(yarn, temperature=False),
    # The blend of YaRN's authors for Mistral: it interpolates more pairs in part.
    "yarn_mistral": partial(yarn, beta_fast=128, beta_slow=2, temperature=False),
}
"""Name -> (head_dim, scale, base, trained length, effective wavelengths) -> factors of that extension alone."""


def compose(
    first: RopeFactors, method: Callable[[np.ndarray], RopeFactors], head_dim: int, base: float = 10000.0
) -> RopeFactors:
    """Extends an extended model once more (LongRoPE sec. 3.3), the second method seeing *effective* wavelengths.

    The model knows the rotation with theta_i / lam_i now, so a method that looks at wavelengths must look at those.

    Args:
        first: the factors that the model was tuned with, unbatched.
        method: effective wavelengths f64[D/2] (tokens) -> factors of the second extension by itself, for example
            `lambda w: yarn(head_dim, 8, original_length=8 * L, wavelengths=w)` or `lambda w: linear(head_dim, 8)`.

    Returns:
        Factors relative to the pretrained model, lam = lam_1 * lam_2, mscale likewise. Start tokens are the first
        extension's, unless the second names more.

    Raises:
        ValueError: `first` has not one factor for every pair.
    """
    lam = np.asarray(first.lam, np.float64)
    if lam.shape != (_pairs(head_dim),):
        raise ValueError(f"the first extension's lam has shape {lam.shape}, not ({_pairs(head_dim)},)")
    second = method(_wavelengths(head_dim, base) * lam)
    return RopeFactors(
        lam=jnp.asarray(lam * np.asarray(second.lam, np.float64), jnp.float32),
        n_hat=jnp.maximum(jnp.asarray(first.n_hat), second.n_hat),
        mscale=jnp.asarray(first.mscale) * second.mscale,
    )


def extend(method: str, trained: Trained, length: int, head_dim: int, base: float = 10000.0) -> RopeFactors:
    """Factors for windows of `length` tokens, relative to the pretrained model, by a method of `METHODS`.

    The method extends the model from the window it was last trained with, and sees the wavelengths it was trained
    with (see `compose`): for a model fine-tuned at 8L with lam_1, `extend("linear", ..., 64 L)` is 8 lam_1. Up
    to the trained window there is nothing to extend: the trained factors (lam [D/2]).

    Args:
        method: a name in `METHODS`; another is a KeyError.
        trained: what the model was last trained with.
        length: of the windows, tokens.
        head_dim: D.
        base: rope_theta.
    """
    scale = max(length / trained.length, 1.0)
    return compose(
        trained.factors,
        lambda wavelengths: METHODS[method](head_dim, scale, base, trained.length, wavelengths),
        head_dim,
        base,
    )


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


def _wavelengths(head_dim: int, base: float) -> np.ndarray:
    """2 pi / theta_i: tokens in which a pair turns once."""
    return 2 * np.pi / frequencies(head_dim, base)


def _pair_with_turns(turns: float, wavelengths: np.ndarray, length: int) -> float:
    """The (fractional) pair index whose wavelength goes `turns` times into `length`, linear in log wavelength.

    RoPE's own wavelengths are geometric in the index, so for them this is the closed form of YaRN's released code.
    Values outside the wavelengths are extrapolated from the first or last interval.
    """
    if len(wavelengths) < 2:
        return 0.0  # one pair has no blend
    log_wavelengths, wanted = np.log(wavelengths), np.log(length / turns)
    left = int(np.clip(np.searchsorted(log_wavelengths, wanted) - 1, 0, len(wavelengths) - 2))
    step = log_wavelengths[left + 1] - log_wavelengths[left]
    return float(left + (wanted - log_wavelengths[left]) / step)


def _blend(unscaled_share: np.ndarray, scale: float) -> np.ndarray:
    """lam f64[D/2]: 1 for a share of 1, `scale` for a share of 0; between them 1/lam is linear in the share."""
    return 1 / ((1 - unscaled_share) / scale + unscaled_share)


def _factors(lam: np.ndarray, mscale: float = 1.0) -> RopeFactors:
    return RopeFactors(jnp.asarray(lam, jnp.float32), jnp.int32(0), jnp.float32(mscale))


def _pairs(head_dim: int) -> int:
    return len(frequencies(head_dim))


def _checked(scale: float) -> float:
    if not (np.isfinite(scale) and scale >= 1):
        raise ValueError(f"scale = {scale}; an extension ratio L'/L must be at least 1")
    return float(scale)
