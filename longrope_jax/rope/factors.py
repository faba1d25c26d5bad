"""`RopeFactors`: everything that LongRoPE changes in a model's rotary position embedding, as a pytree; and
`FactorTable`: which factors a sequence of a given length gets.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longrope_jax.errors import naming

_MAX_ROWS = 10  # of a printed table


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

    lam: Float[Array | np.ndarray, "*batch half"]
    n_hat: Int[Array | np.ndarray | np.integer, "*batch"]
    mscale: Float[Array | np.ndarray | np.floating, "*batch"]

    def __repr__(self) -> str:
        return _summary("RopeFactors", self)

    def check(self, head_dim: int | None = None, *, monotone: str = "error") -> "RopeFactors":
        """Returns self if these factors are valid; needs concrete values, so call it outside `jit`.

        Args:
            head_dim: D of the model that will use them, if known.
            monotone: what happens if lam decreases: "error", or "warn" for factors from other software.

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
                raise ValueError(f"{name} has shape {leaf.shape}; with lam {lam.shape} it must be {lam.shape[:-1]}")
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


@flax.struct.dataclass
class FactorTable:
    """Factors by sequence length (LongRoPE sec. 3.3: at inference they are picked by the length), as one pytree.

    A sequence of `length` tokens gets the factors of the smallest boundary that is not below it. Make one with
    `FactorTable.of({128: short, 1024: long})`.

    Attributes:
        boundaries: largest sequence length, in tokens, that each entry is for; rising.
        factors: the entries, stacked: lam [N, D/2], n_hat [N], mscale [N].
    """

    boundaries: Int[Array | np.ndarray, "N"]
    factors: RopeFactors

    def __repr__(self) -> str:
        return _summary("FactorTable", self.factors, boundary=self.boundaries)

    @classmethod
    def of(cls, entries: Mapping[int, RopeFactors]) -> "FactorTable":
        """From {boundary: unbatched factors}.

        Raises:
            ValueError: no entry, a boundary that is no positive number of tokens, or factors that make no sense.
        """
        if not entries:
            raise ValueError("a factor table needs one boundary at least")
        boundaries = sorted(entries)
        for boundary in boundaries:
            if boundary != int(boundary) or not 0 < boundary < 2**31:
                raise ValueError(f"boundary = {boundary!r} is not a positive number of tokens")
        head_dim = 2 * np.shape(entries[boundaries[0]].lam)[-1]
        for boundary in boundaries:
            with naming(f"boundary {boundary}"):
                # A set made elsewhere may fall somewhere; whoever loaded it has been warned.
                entries[boundary].check(head_dim, monotone="warn")
                if np.ndim(entries[boundary].lam) != 1:
                    raise ValueError(f"lam has shape {np.shape(entries[boundary].lam)}; an entry is one set of factors")
        return cls(np.asarray(boundaries, np.int32), stack([entries[boundary] for boundary in boundaries]))

    def select(self, length: int | Int[Array | np.ndarray | np.integer, "*batch"]) -> RopeFactors:
        """The factors of a sequence, or of each sequence of a batch; `length` (tokens) may be traced: one gather.

        Raises:
            ValueError: a length that is known now (a number, not a tracer) lies beyond the last boundary. A traced
                one can't raise: its factors are NaN, which no loss survives.
        """
        if not isinstance(length, jax.core.Tracer) and not isinstance(self.boundaries, jax.core.Tracer):
            longest = int(np.max(length, initial=0))
            if longest > self.boundaries[-1]:
                raise ValueError(
                    f"a sequence of {longest} tokens is beyond this table's last boundary, {self.boundaries[-1]}; it "
                    f"has {', '.join(str(boundary) for boundary in np.asarray(self.boundaries))}"
                )
        length = jnp.asarray(length, jnp.int32)
        row = jnp.sum(length[..., None] > self.boundaries, axis=-1)
        lam, n_hat, mscale = self.factors.lam, self.factors.n_hat, self.factors.mscale
        # All leaves are concatenated, so that one gather fetches them; a float32 holds any n_hat below 2^24 exactly.
        columns = [lam, jnp.asarray(n_hat, jnp.float32)[:, None], jnp.asarray(mscale, jnp.float32)[:, None]]
        chosen = jnp.take(jnp.concatenate(columns, axis=1), row, axis=0, mode="fill", fill_value=jnp.nan)
        return RopeFactors(chosen[..., :-2], jnp.int32(jnp.nan_to_num(chosen[..., -2])), chosen[..., -1])


def _summary(name: str, factors: RopeFactors, **columns: Any) -> str:
    """A text table, one row for each set of factors; the leaves as they are where they have no values (in a trace)."""
    try:
        lam = np.asarray(factors.lam)
        columns |= {"n_hat": factors.n_hat, "mscale": factors.mscale}
        columns |= {"lam first": lam[..., 0], "middle": lam[..., lam.shape[-1] // 2], "last": lam[..., -1]}
        rows = np.broadcast_arrays(*(np.asarray(column, np.float64).reshape(-1) for column in columns.values()))
    except (TypeError, ValueError, IndexError, RuntimeError):
        return f"{name}(lam={factors.lam}, n_hat={factors.n_hat}, mscale={factors.mscale})"
    lines = ["".join(f"{value:>12.7g}" for value in row) for row in zip(*rows, strict=True)]
    omitted = [f"{f'({len(lines) - _MAX_ROWS} more)':>12}"] if len(lines) > _MAX_ROWS else []
    header = "".join(f"{column:>12}" for column in columns)
    return "\n".join([f"{name}, lam {list(lam.shape)}", header, *lines[:_MAX_ROWS], *omitted])


def _refuse(bad: np.ndarray, name: str, leaf: np.ndarray, why: str) -> None:
    """Raises for the first element where `bad` holds."""
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name}{list(where) if where else ''} = {leaf[where]} {why}")


def stack(candidates: list[RopeFactors]) -> RopeFactors:
    """Candidates -> one population with a leading axis P."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *candidates)
