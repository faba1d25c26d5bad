"""What exact angles cost: our cos/sin table beside the plain float32 product, and the error of both against float64.

python experiments/benchmarks/rotation.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from timing import median_seconds

from longrope_jax import rope

BASE, HEAD_DIM, SCALE = 10000.0, 128, 512.0


@jax.jit
def plain(positions, lam):
    """The usual implementation: one float32 product a position and pair."""
    angle = positions[:, None].astype(jnp.float32) * (jnp.float32(rope.frequencies(HEAD_DIM, BASE)) / lam)
    return jnp.cos(angle), jnp.sin(angle)


def main() -> None:
    """Prints one line a length."""
    factors = rope.yarn(HEAD_DIM, SCALE, BASE, temperature=False)
    exact = jax.jit(rope.rotary_embedding, static_argnums=2)
    print("  tokens   plain ms   exact ms   ratio   plain error   exact error")
    for length in (2**12, 2**15, 2**18, 2**21):
        # A table of 2^15 rows at the far end of the window: the error depends on the position, the cost on the rows.
        positions = jnp.arange(max(0, length - 2**15), length, dtype=jnp.int32)
        seconds = median_seconds(
            {
                "plain": lambda p=positions: plain(p, factors.lam),
                "exact": lambda p=positions: exact(p, factors, BASE),
            }
        )
        angle = np.asarray(positions, np.float64)[:, None] * (
            rope.frequencies(HEAD_DIM, BASE) / np.asarray(factors.lam, np.float64)
        )
        errors = [
            max(np.abs(np.cos(angle) - cos).max(), np.abs(np.sin(angle) - sin).max())
            for cos, sin in jax.device_get((plain(positions, factors.lam), exact(positions, factors, BASE)))
        ]
        print(
            f"{length:8d} {1e3 * seconds['plain']:10.2f} {1e3 * seconds['exact']:10.2f} "
            f"{seconds['exact'] / seconds['plain']:7.2f} {errors[0]:13.1e} {errors[1]:13.1e}"
        )


if __name__ == "__main__":
    main()
