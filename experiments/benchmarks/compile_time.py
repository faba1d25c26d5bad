"""Does compiling LLaMA2-7B's training step take longer with more layers, or longer sequences? And how much memory?

python experiments/benchmarks/compile_time.py    # with requirements-tpu.txt, no TPU
"""

import dataclasses
import resource
import time

import jax

from longrope_jax.model import LlamaConfig
from longrope_jax.runtime.ahead_of_time import compile_lowered, described
from longrope_jax.runtime.mesh import MeshSettings
from longrope_jax.stages.programs import finetune_programs
from longrope_jax.training.finetune import FinetuneSettings

SETTINGS = FinetuneSettings(
    length=2**18, steps=600, factors="yarn", batch=32, accumulate=32, evaluate_every=0, remat="attention_saveable"
)
CASES = ((8, 2**18), (32, 2**18), (64, 2**18), (32, 2**15), (32, 2**21))


def main() -> None:
    """Prints one line a case."""
    jax.config.update("jax_platforms", "cpu")
    layout, chip = described("v5p:4x4x4", MeshSettings("tensor:4,seq:-1"))
    print("layers     tokens  seconds   temporaries GiB   host's peak so far GiB")
    for layers, length in CASES:
        config = LlamaConfig.preset("llama2_7b", dtype="bfloat16", num_layers=layers)
        (program,) = finetune_programs(dataclasses.replace(SETTINGS, length=length), config, layout)
        began = time.monotonic()
        with layout.active():
            compiled = compile_lowered(program.lower(), chip, began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{layers:6} {length:10} {compiled.seconds:8.0f} {size:17.1f} {peak:22.1f}")


if __name__ == "__main__":
    main()
