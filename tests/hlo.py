"""What a compiled program allocates: for tests that compile and never run."""

import math
import re

import jax


def compile_only(function, *arguments):
    """Without the machine-code optimisations, which take half of the time and change no buffer."""
    return jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": 0})


def temporary_bytes(compiled):
    """What the program allocates beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def largest_array(compiled, dtype=r"\w+"):
    """Elements of the largest array of a type (a pattern), even one that exists inside a fused loop alone."""
    shapes = re.findall(rf"\b{dtype}\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)
