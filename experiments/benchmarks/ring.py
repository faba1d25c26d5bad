"""Measures ring attention per device: the compiler's memory, and the device's share of the work.

python experiments/benchmarks/ring.py
"""

import re

import jax
import numpy as np
from timing import Ratio

from longrope_jax.data.sequences import Batch
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.attention_parts import Tokens, key_blocks
from longrope_jax.model.blockwise import BLOCK
from longrope_jax.model.ring import zigzag
from longrope_jax.rope import FactorTable, unscaled
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.training.step import OptimizerSettings, init_params, init_state, make_optimizer, train_step

LENGTH = 16_384
SHARDS = (1, 2, 4, 8)
CONFIG = LlamaConfig.preset("tiny", remat="nothing_saveable")


def compile_step(shards: int) -> jax.stages.Compiled:
    """A training step on one sequence, cut over so many devices; compiled for shapes, never run."""
    model, optimizer = Llama(CONFIG), make_optimizer(OptimizerSettings(), 100)
    table = FactorTable.of({LENGTH: unscaled(CONFIG.head_dim)})
    layout = Layout.of(MeshSettings(f"seq:{shards}"))
    with layout.active():
        state = layout.abstract(jax.eval_shape(lambda: init_state(init_params(model, 0), optimizer)))
        row = np.zeros((1, LENGTH), np.int32)
        batch = layout.place(Batch(row, row, row, None, np.full(1, LENGTH, np.int32)))
        return train_step.lower(model, 1, state, batch, table).compile()


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


def ratios() -> list[Ratio]:
    """A sequence over four devices beside all of it on one; 1 is what can be had at best."""
    jax.config.update("jax_num_cpu_devices", max(SHARDS))
    shards = 4
    alone, needed = (compile_step(count).memory_analysis().temp_size_in_bytes for count in (1, shards))
    return [
        Ratio(f"memory of {shards} devices, {LENGTH} tokens", shards * needed / alone, "together / one alone", "lower"),
        Ratio(
            f"work of {shards} devices, zigzag", imbalance(zigzag(LENGTH, shards), shards), "busiest / mean", "lower"
        ),
    ]


def main() -> None:
    """Prints one row a number of devices."""
    jax.config.update("jax_num_cpu_devices", max(SHARDS))
    print(f"A training step on a sequence of {LENGTH} tokens, {CONFIG.num_layers} layers, on simulated devices.\n")
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
