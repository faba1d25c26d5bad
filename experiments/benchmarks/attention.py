"""Blockwise attention beside dense: time forward and with gradients, and temporary memory as the compiler plans it.

python experiments/benchmarks/attention.py
"""

from functools import partial

import jax
import jax.numpy as jnp
from timing import median_seconds

from longrope_jax.model.attention import attention

BACKENDS = ("dense", "blockwise")
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # SmolLM2-135M
DENSE_UP_TO = 4096


def functions(backend: str):
    """Forward, and the gradients of a scalar of the output with respect to query, key and value; both jitted."""
    attend = partial(attention, backend=backend)
    loss = lambda q, k, v, positions: jnp.sum(jnp.sin(attend(q, k, v, positions)))  # noqa: E731
    return jax.jit(attend), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def arguments(length: int):
    """Random query, key, value f32[1, T, heads, D], and positions."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return *map(jax.random.normal, keys, shapes), jnp.arange(length, dtype=jnp.int32)[None]


def main() -> None:
    """Prints one line a length."""
    forward = {backend: functions(backend)[0] for backend in BACKENDS}
    gradient = {backend: functions(backend)[1] for backend in BACKENDS}
    print("Seconds as ratios dense / blockwise; MiB of temporaries with gradients.")
    print("  tokens   forward   gradients   dense MiB   blockwise MiB")
    for length in (256, 1024, 2048, 4096, 16384, 32768):
        backends = [backend for backend in BACKENDS if backend != "dense" or length <= DENSE_UP_TO]
        shapes = jax.eval_shape(lambda length=length: arguments(length))
        memory = {
            backend: gradient[backend].lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 2**20
            for backend in backends
        }
        ratios = ("-", "-")
        if "dense" in backends:
            values = arguments(length)
            timed = [
                median_seconds({b: lambda f=f[b], v=values: f(*v) for b in backends}, 5) for f in (forward, gradient)
            ]
            ratios = tuple(f"{seconds['dense'] / seconds['blockwise']:.1f}" for seconds in timed)
        print(
            f"{length:8d} {ratios[0]:>9} {ratios[1]:>11} "
            f"{format(memory['dense'], '.1f') if 'dense' in memory else '-':>11} {memory['blockwise']:15.1f}"
        )


if __name__ == "__main__":
    main()
