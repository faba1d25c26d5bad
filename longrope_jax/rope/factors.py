"""`RopeFactors`: everything that LongRoPE changes in a model's rotary position embedding, as a pytree."""

import warnings

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class RopeFactors:
    """The rotation of LongRoPE (arXiv 2402.13753, eq. 3), apart from the model's base frequencies.

    Pair `i` of a head turns by `n * theta_i` at the positions `n < n_hat` and by `n * theta_i / lam_i` from `n_hat` on.
    Leading axes are free and shared by all leaves: a population of P candidates has lam [P, D/2], n_hat [P] and
    mscale [P].

    Attributes:
        lam: rescale factors, one for every rotary pair, high frequencies first (>= 1, non-decreasing).
        n_hat: how many start tokens keep their original angle (tokens).
        mscale: attention temperature; cos and sin are multiplied by it, so logits by its square.
    """

    lam: Float[Array, "*batch half"]
    n_hat: Int[Array, "*batch"]
    mscale: Float[Array, "*batch"]

    def check(self, head_dim: int | None = None, *, monotone: str = "error") -> "RopeFactors":
        """Returns self if these factors make sense; needs concrete values, so call it outside `jit`.

        Args:
            head_dim: D of the model that is going to use them, if known.
            monotone: what to do about a lam that falls somewhere: "error", or "warn" for factors made elsewhere.

        Raises:
            ValueError: names the leaf, the pair and the value that is wrong.
        """
        if monotone not in ("error", "warn"):
            raise ValueError(f"monotone = {monotone!r} must be 'error' or 'warn'")
        lam, n_hat, mscale = (np.asarray(leaf) for leaf in (self.lam, self.n_hat, self.mscale))
        if lam.ndim == 0 or lam.shape[-1] == 0:
            raise ValueError(f"lam has shape {lam.shape}; it needs one factor for every rotary pair, [..., D/2]")
        if head_dim is not None and 2 * lam.shape[-1] != head_dim:
            raise ValueError(f"lam has {lam.shape[-1]} factors; a head dimension of {head_dim} needs {head_dim / 2:g}")
        for name, leaf in (("n_hat", n_hat), ("mscale", mscale)):
            if leaf.shape != lam.shape[:-1]:
                raise ValueError(f"{name} has shape {leaf.shape}; beside lam {lam.shape} it must be {lam.shape[:-1]}")
        _refuse(~np.isfinite(lam), "lam", lam, "is not finite")
        _refuse(lam < 1, "lam", lam, "is below 1 (a factor stretches a wavelength, it never shortens it)")
        _refuse((n_hat < 0) | (n_hat != np.round(n_hat)), "n_hat", n_hat, "is not a number of tokens, 0 or more")
        _refuse(~(np.isfinite(mscale) & (mscale > 0)), "mscale", mscale, "is not a positive number")
        falls = np.concatenate([np.zeros_like(lam[..., :1], bool), np.diff(lam, axis=-1) < 0], axis=-1)
        if monotone == "warn" and falls.any():
            where = tuple(int(i) for i in np.argwhere(falls)[0])
            warnings.warn(f"lam{list(where)} = {lam[where]} is smaller than its predecessor", stacklevel=2)
        else:
            _refuse(falls, "lam", lam, "is smaller than its predecessor; LongRoPE's factors never decrease")
        return self


def _refuse(bad: np.ndarray, name: str, leaf: np.ndarray, why: str) -> None:
    """Raises for the first element where `bad` holds."""
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name}{list(where) if where else ''} = {leaf[where]} {why}")


def stack(candidates: list[RopeFactors]) -> RopeFactors:
    """Candidates -> one population with a leading axis P."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *candidates)
