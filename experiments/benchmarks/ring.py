"""What a device needs when several share a sequence: memory as the compiler plans it, and its part of the work.

python experiments/benchmarks/ring.py
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.attention import BLOCK, Tokens, key_blocks
from longrope_jax.model.ring import zigzag
from longrope_jax.model.sharding import make_mesh
from longrope_jax.rope import unscaled

LENGTH = 16_384
SHARDS = (1, 2, 4, 8)
CONFIG = LlamaConfig.preset("tiny", remat="nothing_saveable")


def compile_step(shards: int) -> jax.stages.Compiled:
    """Loss and gradients of one sequence, cut over so many devices; compiled for shapes, never run."""
    model, factors = Llama(CONFIG), unscaled(CONFIG.head_dim)
    row = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), factors)["params"]

    def total(params, tokens, targets, positions):
        return model.apply({"params": params}, tokens, targets, factors, positions, method="token_nll").sum()

    with jax.set_mesh(make_mesh(seq=shards)):
        return jax.jit(jax.value_and_grad(total)).lower(params, row, row, row).compile()


def gathers_whole_sequences(compiled: jax.stages.Compiled) -> bool:
    """Does any all-gather result in an array with all tokens?"""
    results = re.findall(r"= (.*?) all-gather(?:-start)?\(", compiled.as_text())
    return any(re.search(rf"[\[,]{LENGTH}[,\]]", result) for result in results)


def imbalance(order: np.ndarray, shards: int) -> float:
    """Visible block pairs of the busiest device, divided by the mean over devices: for this one all others wait."""
    tokens = [Tokens(part[None], None) for part in np.split(order.astype(np.int32), shards)]
    ranges = [[key_blocks(BLOCK, queries, keys) for keys in tokens] for queries in tokens]
    pairs = [sum(int((last - first).sum()) for first, last in row) for row in ranges]
    return max(pairs) / np.mean(pairs)


def main() -> None:
    """Prints one row a number of devices."""
    jax.config.update("jax_num_cpu_devices", max(SHARDS))
    print(f"One gradient step of a sequence of {LENGTH} tokens, {CONFIG.num_layers} layers, on simulated devices.\n")
    print("| seq | MiB a device | of seq 1 | all-gather of T | busiest / mean, contiguous | busiest / mean, zigzag |")
    print("|---:|---:|---:|---|---:|---:|")
    for shards in SHARDS:
        compiled = compile_step(shards)
        needed = compiled.memory_analysis().temp_size_in_bytes
        alone = needed if shards == 1 else alone
        contiguous, balanced = imbalance(np.arange(LENGTH), shards), imbalance(zigzag(LENGTH, shards), shards)
        print(
            f"| {shards} | {needed / 2**20:.1f} | {needed / alone:.3f} | "
            f"{'yes' if gathers_whole_sequences(compiled) else 'no'} | {contiguous:.2f} | {balanced:.2f} |"
        )


if __name__ == "__main__":
    main()
