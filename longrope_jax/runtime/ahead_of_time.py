"""Programs compiled ahead of time for devices that need not exist: do they fit, and what do they send?

Needs libtpu (requirements-tpu.txt), but no TPU: the compiler runs on any machine.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from longrope_jax.model.flops import Flops
from longrope_jax.runtime.collectives import Traffic, traffic
from longrope_jax.runtime.estimate import CHIPS, TPUS, Chip
from longrope_jax.runtime.mesh import Layout, MeshSettings


@dataclass(frozen=True)
class Program:
    """A compiled function that a stage calls repeatedly.

    Attributes:
        name: what it does.
        lower: lowers it, for shapes only, within the layout's mesh.
        calls: how often the stage calls it.
        tokens: input tokens of one call, on all devices.
        flops: model FLOPs of one call on all devices.
        executed: the same plus what the backward pass recomputes.
        additional_bytes: memory of a device that the stage uses meanwhile, besides the program's arguments.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    calls: int
    tokens: int
    flops: Flops
    executed: Flops
    additional_bytes: int = 0


@dataclass(frozen=True)
class Compiled:
    """The compiler's memory analysis of a program; bytes are those of one device.

    Attributes:
        seconds: of lowering and compiling.
        fits: whether the program fits into the device's memory.
        peak: arguments, results that don't alias them, and temporaries; if it does not fit, the least that the compiler
            would have needed.
        arguments, temporaries: None if it does not fit.
        collectives: see `runtime/collectives.py`.
    """

    seconds: float
    fits: bool
    peak: int
    arguments: int | None = None
    temporaries: int | None = None
    collectives: dict[str, Traffic] = field(default_factory=dict)

    def with_additional(self, size: int, chip: Chip) -> "Compiled":
        """The same while a device uses `size` bytes for something else."""
        return replace(self, fits=self.fits and self.peak + size <= chip.hbm_bytes, peak=self.peak + size)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Compiled":
        """The inverse of `dataclasses.asdict`."""
        found = {kind: Traffic(**numbers) for kind, numbers in content["collectives"].items()}
        return cls(**content | {"collectives": found})


def describe_slice(topology: str, settings: MeshSettings) -> tuple[Layout, Chip]:
    """The layout on a slice such as "v5p:4x4x4", and its chip.

    Raises:
        ValueError: no such slice, the mesh does not fit on it, or libtpu is missing.
    """
    name, _, shape = topology.partition(":")
    if name not in TPUS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ValueError(f"topology = {topology!r} must be one of {', '.join(TPUS)} and a shape, such as 'v5p:4x4x4'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it searches for the cloud's metadata, for minutes
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # opens no TPU, so it blocks nobody
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"topology = {topology!r} can't be described (`pip install -r requirements-tpu.txt`?): {reason[:300]}"
        ) from None
    try:
        return Layout.of(settings, devices), CHIPS[name]
    except ValueError as error:
        raise ValueError(f"config.mesh: {error}") from None


def compile_lowered(lowered: jax.stages.Lowered, chip: Chip, started: float) -> Compiled:
    """Compiles a program whose lowering started at `started`; one that does not fit is a result, not an error."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return Compiled(time.monotonic() - started, False, needed)
    seconds = time.monotonic() - started
    memory: Any = compiled.memory_analysis()  # its class is not public
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return Compiled(
        seconds,
        peak <= chip.hbm_bytes,
        peak,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        traffic(compiled.as_text() or ""),
    )


def _needed(message: str) -> int | None:
    """Bytes of HBM that the compiler's message says it needed; None for another error."""
    for pattern in (r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", r"\(([\d.]+)([KMG])\) exceeds available HBM"):
        if found := re.search(pattern, message):
            return int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]])
    return None


def bytes_on_device(tree: Any) -> int:
    """Bytes on one device of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
