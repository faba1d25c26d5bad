"""Tests compile their programs with few optimisations: nearly all the time of the tests is the compiler's.

Without LLVM's optimisations, and without the newer emitters of fused loops, which take half of the time that is left.
"""

import os

import jaxlib

FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 12):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # later ones have no others, and end at a flag they don't know


def flags(devices: int) -> str:
    """For so many simulated devices."""
    return " ".join([*FLAGS, f"--xla_force_host_platform_device_count={devices}"])


def environment(devices: int) -> dict[str, str]:
    """For a process of its own."""
    return {**os.environ, "XLA_FLAGS": flags(devices)}
