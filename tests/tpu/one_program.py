"""Compiles one program of an experiment for a slice in a process of its own, and prints what that took, as JSON.

python -m tests.tpu.one_program CONFIG STAGE PROGRAM TOPOLOGY field.of.config=value ...; `tests/tpu/test_slices.py`
calls it.
"""

import ast
import dataclasses
import json
import math
import re
import resource
import runpy
import sys
import time

import hlo
import jax

from longrope_jax.experiment import kind_of, parse_experiment
from longrope_jax.experiment.stages import STAGES
from longrope_jax.runtime.ahead_of_time import compile_lowered, describe_slice


class Kept:
    """A lowered program that keeps what it is compiled to."""

    compiled = None

    def __init__(self, lowered):
        self.lowered = lowered

    def compile(self):
        self.compiled = self.lowered.compile()
        return self.compiled


def measure(path: str, stage: str, name: str, topology: str, *changes: str) -> dict:
    """Of the program of a stage whose name begins with `name`; num_layers=4 changes the model."""
    experiment = parse_experiment(runpy.run_path(path)["get_config"]())
    model, settings = experiment.model, experiment.stages[stage]
    for change in changes:
        field, value = change.split("=")
        if hasattr(settings, field):
            settings = dataclasses.replace(settings, **{field: ast.literal_eval(value)})
        else:
            model = dataclasses.replace(model, **{field: ast.literal_eval(value)})
    layout, chip = describe_slice(topology, experiment.mesh)
    programs = STAGES[kind_of(stage)].programs(settings, model, layout)
    (program,) = [program for program in programs if program.name.startswith(name)]
    began = time.monotonic()
    with layout.active():
        kept = Kept(program.lower())
        found = compile_lowered(kept, chip, began).with_additional(program.additional_bytes, chip)
    text = kept.compiled.as_text() if kept.compiled else ""
    return {
        "fits": found.fits,
        "peak": found.peak,
        "hbm": chip.hbm_bytes,
        "seconds": found.seconds,
        "collectives": dataclasses.asdict(found)["collectives"],
        "operations_lowered": len(re.findall(r" = \"?(?:stablehlo|sdy|func|chlo|mhlo)\.", kept.lowered.as_text())),
        "operations": len(re.findall(r"^\s+(?:ROOT )?%[\w.\-]+ = ", text, re.MULTILINE)),
        "largest_array": hlo.largest_array(kept.compiled) if kept.compiled else 0,
        "largest_of_all_tokens": largest_with(name.split()[-1], text),
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def largest_with(dimension: str, text: str) -> int:
    """Elements of the largest array that has a dimension of this size."""
    shapes = [found.split(",") for found in re.findall(r"\b\w+\[([\d,]+)\]", text)]
    return max((math.prod(map(int, shape)) for shape in shapes if dimension in shape), default=0)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(measure(*sys.argv[1:])))
