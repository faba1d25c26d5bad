"""Measures the cost of exact angles: time and float64 error of our cos/sin table and of the standard float32 product.

python experiments/benchmarks/rotation.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from timing import Ratio, median_seconds

from longrope_jax import rope

BASE, HEAD_DIM, SCALE = 10000.0, 128, 512.0


@jax.jit
def plain(positions, lam):
    """The usual implementation: one float32 product a position and pair."""
    angle = positions[:, None].astype(jnp.float32) * (jnp.float32(rope.frequencies(HEAD_DIM, BASE)) / lam)
    return jnp.cos(angle), jnp.sin(angle)


exact = jax.jit(rope.rotary_embedding, static_argnums=2)


def measure(length: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds, and the largest error against float64, of both at the far end of so many positions."""
    factors = rope.yarn(HEAD_DIM, SCALE, BASE, temperature=False)
    # A table of 2^15 rows: the error depends on the position, the cost on the rows.
    positions = jnp.arange(max(0, length - 2**15), length, dtype=jnp.int32)
    tables = {"plain": lambda: plain(positions, factors.lam), "exact": lambda: exact(positions, factors, BASE)}
    angle = np.asarray(positions, np.float64)[:, None] * (
        rope.frequencies(HEAD_DIM, BASE) / np.asarray(factors.lam, np.float64)
    )
    found = {name: jax.device_get(make()) for name, make in tables.items()}
    errors = {
        name: float(max(np.abs(np.cos(angle) - cos).max(), np.abs(np.sin(angle) - sin).max()))
        for name, (cos, sin) in found.items()
    }
    return median_seconds(tables), errors


def ratios() -> list[Ratio]:
    """At the end of 2,097,152 positions."""
    seconds, errors = measure(2**21)
    return [
        Ratio("time of a table, 2,097,152 positions", seconds["exact"] / seconds["plain"], "exact / plain", "lower"),
        Ratio("error against float64, the same", errors["exact"] / errors["plain"], "exact / plain", "lower"),
    ]


def main() -> None:
    """Prints one line a length."""
    print("  tokens   plain ms   exact ms   ratio   plain error   exact error")
    for length in (2**12, 2**15, 2**18, 2**21):
        seconds, errors = measure(length)
        print(
            f"{length:8d} {1e3 * seconds['plain']:10.2f} {1e3 * seconds['exact']:10.2f} "
            f"{seconds['exact'] / seconds['plain']:7.2f} {errors['plain']:13.1e} {errors['exact']:13.1e}"
        )


if __name__ == "__main__":
    main()
