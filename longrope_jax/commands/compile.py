"""Compiles every stage of an experiment for a TPU slice that need not exist: does it fit, what is sent, how long does
it take?

It reads no data and no model: an experiment whose first stage is a `load` needs its `preset`.
"""

import hashlib
import importlib.metadata
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from longrope_jax import json_files
from longrope_jax.experiment import check_layout, kind_of, parse_experiment
from longrope_jax.experiment.stages import STAGES
from longrope_jax.report.tables import markdown_table
from longrope_jax.runtime.ahead_of_time import Compiled, Program, compile_lowered, describe_slice
from longrope_jax.runtime.estimate import ASSUMPTIONS, GIB, Chip, Estimate, estimate
from longrope_jax.runtime.mesh import Layout
from longrope_jax.runtime.processes import write_json, write_text
from longrope_jax.training.finetune import FinetuneSettings
from longrope_jax.training.loop import LoopSettings

REPORT = "compile_report"


@dataclass(frozen=True)
class _Row:
    stage: str
    program: Program
    compiled: Compiled
    estimate: Estimate | None
    suggestion: str


def compile_experiment(config: ConfigDict, topology: str, workdir: epath.PathLike) -> dict[str, Any]:
    """Compiles all programs of all stages; writes `compile_report.json` and `.md` to the work directory, prints tables.

    Programs that an earlier, interrupted call compiled come from its report. Time: ten seconds to a minute for each
    program, independent of the number of layers and tokens; memory: a few GiB.

    Args:
        topology: chip and shape, such as "v5p:4x4x4".

    Raises:
        ValueError: a bad config, slice or mesh; one line.
        OSError: the work directory can't be written to.
    """
    experiment = parse_experiment(config)
    layout, chip = describe_slice(topology, experiment.mesh)
    check_layout(experiment, layout, experiment.stages)
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / f"{REPORT}.json"
    cache = json_files.read_object(path, {"known": dict})["known"] if path.exists() else {}
    rows = []
    for stage, settings in experiment.stages.items():
        for program in STAGES[kind_of(stage)].programs(settings, experiment.model, layout):
            print(f"{stage}: {program.name} ...", end=" ", flush=True)
            compiled = _compile(program, topology, chip, layout, cache)
            suggestion = "" if compiled.fits else _suggestion(settings, layout)
            rows.append(_Row(stage, program, compiled, _estimate(chip, layout, program, compiled), suggestion))
            print(f"{compiled.seconds:.0f} s, {'fits' if compiled.fits else 'does not fit'}", flush=True)
            report = _report(topology, chip, layout, rows)
            write_json(path, report | {"known": cache})
    if not rows:
        raise ValueError(f"config.stages = {tuple(experiment.stages)}: none of them runs a program")
    text = _markdown(report, rows)
    write_text(workdir / f"{REPORT}.md", text)
    print(f"\n{text}\nreport: {workdir / f'{REPORT}.md'}")
    return report


def _compile(program: Program, topology: str, chip: Chip, layout: Layout, cache: dict[str, Any]) -> Compiled:
    """The program from `cache`, or compiled and added to it; stages that share a program compile it once."""
    with layout.active():
        started = time.monotonic()
        lowered = program.lower()
        where = f"{topology} {chip} {layout.shape}"
        what = f"{jax.__version__} {_libtpu()} {where} {lowered.as_text()}"
        digest = hashlib.sha256(what.encode()).hexdigest()
        if digest not in cache:
            cache[digest] = asdict(compile_lowered(lowered, chip, started))
    return Compiled.from_json(cache[digest]).with_additional(program.additional_bytes, chip)


def _libtpu() -> str:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # compiled for devices that are there
        return ""


def _estimate(chip: Chip, layout: Layout, program: Program, compiled: Compiled) -> Estimate | None:
    if not compiled.fits or compiled.arguments is None or compiled.temporaries is None:
        return None
    used = compiled.arguments + compiled.temporaries
    return estimate(chip, math.prod(layout.shape.values()), program.flops, program.executed, compiled.collectives, used)


def _report(topology: str, chip: Chip, layout: Layout, rows: list[_Row]) -> dict[str, Any]:
    def record(row: _Row) -> dict[str, Any]:
        found = {
            "stage": row.stage,
            "program": row.program.name,
            "calls": row.program.calls,
            "tokens": row.program.tokens,
            **asdict(row.compiled),
            "model_flops": row.program.flops._asdict(),
            "executed_flops": row.program.executed._asdict(),
        }
        if row.estimate is None:
            return found | {"suggestion": row.suggestion}
        return found | {"estimate": asdict(row.estimate) | {"attention_share": row.estimate.attention_share}}

    mesh = {axis: size for axis, size in layout.shape.items() if size > 1}
    return {
        "topology": topology,
        "devices": math.prod(layout.shape.values()),
        "mesh": mesh,
        "hbm_bytes": chip.hbm_bytes,
        "chip": asdict(chip),
        "assumptions": list(ASSUMPTIONS),
        "programs": [record(row) for row in rows],
    }


_MEMORY_HEADER = ("stage", "program", "compile s", "arguments", "temporaries", "peak", "of HBM", "fits")
_TIME_HEADER = (
    "stage", "program", "runs", "model PFLOP", "attention", "ring / attention s", "others / matrices s", "run s",
    "MFU, with attention", "hours",
)  # fmt: skip


def _markdown(report: dict[str, Any], rows: list[_Row]) -> str:
    mesh = ", ".join(f"{axis}:{size}" for axis, size in report["mesh"].items())
    suggestions = [f"* {row.stage}, {row.program.name}: {row.suggestion}\n" for row in rows if row.suggestion]
    times = [_time_cells(row, row.estimate) for row in rows if row.estimate]
    hours = sum(row.estimate.total * row.program.calls for row in rows if row.estimate) / 3600
    parts = [
        f"# {report['topology']}: {report['devices']} devices as {mesh}\n",
        f"Memory of a device in GiB; it has {_gib(report['hbm_bytes'])}.\n",
        markdown_table(_MEMORY_HEADER, [_memory_cells(row, report["hbm_bytes"]) for row in rows]),
        *(["What does not fit, and what to change:\n", "".join(suggestions)] if suggestions else []),
        f"Time, estimated and not measured: {hours:.2g} hours. Communication is hidden where it takes no longer than "
        "the computation that it overlaps with. Assumptions:\n",
        "".join(f"* {assumption};\n" for assumption in ASSUMPTIONS),
        markdown_table(_TIME_HEADER, times) if times else "",
        "What a device receives in one run, GiB, and how often:\n",
        _traffic_table([row for row in rows if row.compiled.fits]),
    ]
    return "\n".join(part for part in parts if part)


def _memory_cells(row: _Row, hbm_bytes: int) -> tuple[str, ...]:
    found = row.compiled
    return (
        row.stage,
        row.program.name,
        f"{found.seconds:.0f}",
        *map(_gib, (found.arguments, found.temporaries, found.peak)),
        f"{found.peak / hbm_bytes:.0%}",
        "yes" if found.fits else "**no**",
    )


def _time_cells(row: _Row, guess: Estimate) -> tuple[str, ...]:
    return (
        row.stage,
        row.program.name,
        str(row.program.calls),
        f"{row.program.flops.total / 1e15:.3g}",
        f"{guess.attention_share:.0%}",
        f"{guess.ring:.3g} / {guess.attention:.3g}",
        f"{guess.others:.3g} / {guess.matrices:.3g}",
        f"{guess.total:.3g}",
        f"{guess.mfu:.0%}, {guess.mfu_with_attention:.0%}",
        f"{guess.total * row.program.calls / 3600:.2g}",
    )


def _traffic_table(rows: list[_Row]) -> str:
    kinds = sorted({kind for row in rows for kind in row.compiled.collectives})

    def cells(row: _Row) -> tuple[str, ...]:
        found = row.compiled.collectives
        sent = (f"{_gib(found[kind].bytes)} ({found[kind].count})" if kind in found else "" for kind in kinds)
        return (row.stage, row.program.name, *sent)

    return markdown_table(("stage", "program", *kinds), [cells(row) for row in rows])


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.1f}" if size > GIB / 2 else f"{size / GIB:.2g}"


def _suggestion(settings: Any, layout: Layout) -> str:
    """What to change so that a program fits, the most effective change first."""
    rows, suggestions = layout.row_shards, []
    if isinstance(settings, LoopSettings):
        parts = settings.batch // rows
        if isinstance(settings, FinetuneSettings) and settings.remat != "nothing_saveable":
            suggestions.append("remat = 'nothing_saveable'")
        if settings.accumulate < parts:
            suggestions.append(f"accumulate = {parts}: one sequence of the batch at a time on every shard of rows")
    for name in ("tokens_at_once", "candidates_at_once", "documents_at_once", "prompts_at_once"):
        if getattr(settings, name, 0) > rows:
            suggestions.append(f"a smaller {name} than {getattr(settings, name)}")
    if rows > 1:
        suggestions.append(f"mesh.axes with more seq and less than {rows} for data * fsdp: fewer sequences at a time")
    suggestions.append("a slice with more chips, over which tokens, parameters and optimizer are sharded")
    return "; ".join(suggestions)
