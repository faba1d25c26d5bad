"""The published methods by name, each as the next extension of a model, whatever the model was trained with before."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longrope_jax.rope import methods
from longrope_jax.rope.factors import RopeFactors


@dataclass(frozen=True)
class Trained:
    """What a model was last trained with.

    A pretrained model's are its original length and `unscaled`; fine-tuning changes both.

    Attributes:
        length: the context window, tokens.
        factors: unbatched, relative to the pretrained model.
    """

    length: int
    factors: RopeFactors


Method = Callable[[int, float, float, int, np.ndarray], RopeFactors]

METHODS: dict[str, Method] = {
    "unscaled": lambda head_dim, scale, base, length, wavelengths: methods.unscaled(head_dim),
    "linear": lambda head_dim, scale, base, length, wavelengths: methods.linear(head_dim, scale),
    "ntk": lambda head_dim, scale, base, length, wavelengths: methods.ntk(head_dim, scale),
    "yarn": lambda head_dim, scale, base, length, wavelengths: methods.yarn(
        head_dim, scale, base, length, wavelengths=wavelengths
    ),
    "yarn_without_temperature": lambda head_dim, scale, base, length, wavelengths: methods.yarn(
        head_dim, scale, base, length, temperature=False, wavelengths=wavelengths
    ),
    # The ramp that YaRN's authors gave Mistral: more pairs are interpolated in part.
    "yarn_mistral": lambda head_dim, scale, base, length, wavelengths: methods.yarn(
        head_dim, scale, base, length, beta_fast=128, beta_slow=2, temperature=False, wavelengths=wavelengths
    ),
}
"""Name -> (head_dim, scale, base, trained length, effective wavelengths) -> factors of that extension by itself."""


def extend(method: str, trained: Trained, length: int, head_dim: int, base: float = 10000.0) -> RopeFactors:
    """Factors for windows of `length` tokens, relative to the pretrained model, by a method of `METHODS`.

    The method extends the model from the window it was last trained with, and sees the wavelengths it was trained
    with (see `methods.compose`): for a model fine-tuned at 8L with lam_1, `extend("linear", ..., 64 L)` is 8 lam_1. Up
    to the trained window there is nothing to extend: the trained factors (lam [D/2]).

    Args:
        method: a name in `METHODS`; another is a KeyError.
        trained: what the model was last trained with.
        length: of the windows, tokens.
        head_dim: D.
        base: rope_theta.
    """
    scale = max(length / trained.length, 1.0)

    def second(wavelengths: np.ndarray) -> RopeFactors:
        return METHODS[method](head_dim, scale, base, trained.length, wavelengths)

    return methods.compose(trained.factors, second, head_dim, base)
