"""Measures generation with a KV cache: time per step by unused and used slots, and prefill against a forward pass.

python experiments/benchmarks/decode.py
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from timing import Ratio, median_seconds

from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.cache import empty_cache
from longrope_jax.model.decode import GREEDY, advance
from longrope_jax.rope import stack, unscaled

CONFIG = LlamaConfig.preset("smollm2_135m")
MODEL = Llama(CONFIG)
FACTORS = jax.tree.map(jnp.asarray, stack([unscaled(CONFIG.head_dim)]))
SLOTS = (1024, 4096, 32_768)
USED = (0, 500, 2000, 8000, 32_000)
PROMPT, CHUNKS = 2048, (128, 512)


class Reader:
    """A cache of its own that is handed from call to call, as in generation."""

    def __init__(self, params: dict, slots: int):
        self.params = params
        self.cache = empty_cache(CONFIG, 1, slots)

    def read(self, tokens: np.ndarray, start: int) -> jax.Array:
        """The token that follows after i32[1, C] from position `start` on."""
        one = np.zeros(1, np.int32)
        arguments = self.params, np.uint32(0), FACTORS, self.cache, tokens, one + start, one + tokens.shape[1] - 1
        chosen, self.cache = advance(MODEL, GREEDY, *arguments)
        return chosen

    def step(self, used: int) -> Callable[[], jax.Array]:
        """One more token, with so many before it. What these are does not matter to the time."""
        return lambda: self.read(np.zeros((1, 1), np.int32), used)

    def prefill(self, tokens: np.ndarray, chunk: int) -> Callable[[], jax.Array]:
        """All tokens, in chunks."""
        return lambda: [self.read(tokens[:, at : at + chunk], at) for at in range(0, tokens.shape[1], chunk)][-1]


def init_params() -> dict:
    """Random ones."""
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), unscaled(CONFIG.head_dim))["params"]


def prefill_seconds(params: dict, prompt: int, chunks: tuple[int, ...]) -> dict[str, float]:
    """Of so many tokens at once without a cache and without logits, and in chunks with one."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, prompt)).astype(np.int32)
    reader = Reader(params, prompt)
    hidden = jax.jit(lambda params, tokens: MODEL.apply({"params": params}, tokens, FACTORS, method="hidden")[0])
    competitors = {f"chunks of {chunk}": reader.prefill(tokens, chunk) for chunk in chunks}
    return median_seconds({"without cache": lambda: hidden(params, tokens), **competitors}, 3)


def ratios() -> list[Ratio]:
    """A step in a large cache beside a small one, and prefill beside a forward pass."""
    params = init_params()
    small, large = SLOTS[0], SLOTS[-1]
    step = median_seconds({slots: Reader(params, slots).step(500) for slots in (small, large)}, 9)
    prefill = prefill_seconds(params, 1024, (512,))
    return [
        Ratio(f"a step after 500 tokens, {large} slots", step[large] / step[small], f"of {small} slots", "lower"),
        Ratio(
            "prefill of 1,024 tokens", prefill["chunks of 512"] / prefill["without cache"], "with / without", "lower"
        ),
    ]


def main() -> None:
    """Prints three tables."""
    params = init_params()
    seconds = median_seconds({slots: Reader(params, slots).step(500) for slots in SLOTS}, 25)
    print("A step after 500 tokens, by slots in the cache.\n   slots   ms   ratio")
    for slots in SLOTS:
        print(f"{slots:8d} {1e3 * seconds[slots]:4.0f} {seconds[slots] / seconds[SLOTS[0]]:7.2f}")

    reader = Reader(params, SLOTS[-1])
    seconds = median_seconds({used: reader.step(used) for used in USED})
    print(f"A step, by tokens before it, in a cache of {SLOTS[-1]} slots.\n    used   ms   ratio")
    for used in USED:
        print(f"{used:8d} {1e3 * seconds[used]:4.0f} {seconds[used] / seconds[USED[0]]:7.2f}")

    seconds = prefill_seconds(params, PROMPT, CHUNKS)
    print(f"{PROMPT} tokens at once, without logits, and with a cache.\n                tokens/s   ratio")
    for name, value in seconds.items():
        print(f"{name:>15} {PROMPT / value:8.0f} {seconds['without cache'] / value:7.2f}")


if __name__ == "__main__":
    main()
