"""Compares blockwise with dense attention: time forward and with gradients, and the compiler's temporary memory.

python experiments/benchmarks/attention.py
"""

from functools import partial

import jax
import jax.numpy as jnp
from timing import Ratio, median_seconds

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


def memory(gradient, length: int) -> float:
    """MiB of temporaries of a function with gradients."""
    shapes = jax.eval_shape(lambda: arguments(length))
    return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 2**20


def seconds(by_backend: dict, values: tuple) -> dict[str, float]:
    """Of every backend's function of these arguments."""
    return median_seconds({name: lambda f=f: f(*values) for name, f in by_backend.items()}, 5)


def ratios() -> list[Ratio]:
    """Dense beside blockwise, time at 2,048 tokens and memory at 4,096."""
    forward, gradient = ({name: functions(name)[part] for name in BACKENDS} for part in (0, 1))
    values = arguments(2048)
    found = {
        "forward, 2,048 tokens": seconds(forward, values),
        "with gradients, 2,048 tokens": seconds(gradient, values),
        "memory with gradients, 4,096 tokens": {name: memory(f, 4096) for name, f in gradient.items()},
    }
    return [Ratio(case, of["dense"] / of["blockwise"], "dense / blockwise", "higher") for case, of in found.items()]


def main() -> None:
    """Prints one line a length."""
    forward = {backend: functions(backend)[0] for backend in BACKENDS}
    gradient = {backend: functions(backend)[1] for backend in BACKENDS}
    print("Seconds as ratios dense / blockwise; MiB of temporaries with gradients.")
    print("  tokens   forward   gradients   dense MiB   blockwise MiB")
    for length in (256, 1024, 2048, 4096, 16384, 32768):
        backends = [backend for backend in BACKENDS if backend != "dense" or length <= DENSE_UP_TO]
        needed = {backend: memory(gradient[backend], length) for backend in backends}
        times = ("-", "-")
        if "dense" in backends:
            timed = [seconds(by_backend, arguments(length)) for by_backend in (forward, gradient)]
            times = tuple(f"{of['dense'] / of['blockwise']:.1f}" for of in timed)
        print(
            f"{length:8d} {times[0]:>9} {times[1]:>11} "
            f"{format(needed['dense'], '.1f') if 'dense' in needed else '-':>11} {needed['blockwise']:15.1f}"
        )


if __name__ == "__main__":
    main()
