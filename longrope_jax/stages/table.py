"""The stage `table`: which factors a sequence gets by its length."""

import dataclasses
from typing import Any

from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable, load_table, save_table
from longrope_jax.runtime import processes
from longrope_jax.stages.carried import Carried
from longrope_jax.stages.kind import Before, Stage, TableSettings, factors_target, model_stage, nothing, sources


def _check_table(settings: TableSettings, config: LlamaConfig, before: Before) -> None:
    model_stage(settings.model, before)
    for length, source in zip(settings.lengths, settings.factors, strict=True):
        if isinstance(before.get(source), TableSettings):
            raise ValueError(f"factors = {settings.factors}: {source!r} is a table itself")
        target = factors_target(source, before, "factors")
        if target is not None and target < length:
            raise ValueError(f"factors = {settings.factors}: {source} is good up to {target} only, not {length}")


def _run_table(settings: TableSettings, carried: Carried, name: str) -> dict[str, Any]:
    entries = {
        length: carried.source(source, settings.model, length)(length)
        for length, source in zip(settings.lengths, settings.factors, strict=True)
    }
    if processes.is_first():
        (carried.workdir / "factors").mkdir(exist_ok=True)
        save_table(
            carried.workdir / "factors" / f"{name}.json",
            FactorTable.of(entries),
            stage=name,
            model=dataclasses.asdict(carried.model.config),
            model_stage=carried.model_stage(settings.model),
            sources=dict(zip(map(str, settings.lengths), settings.factors, strict=True)),
        )
    return {"lengths": list(settings.lengths), "seconds": 0.0}


def _load_table(settings: TableSettings, carried: Carried, name: str, summary: dict[str, Any]) -> None:
    path = carried.workdir / "factors" / f"{name}.json"
    if not path.exists():
        raise LookupError(f"{path} is gone")
    carried.factors[name] = load_table(path, carried.model.config.head_dim)


TABLE = Stage(
    TableSettings,
    _check_table,
    nothing,
    nothing,
    _run_table,
    _load_table,
    inputs=lambda s, before: [model_stage(s.model, before), *sources(s.factors, before)],
)
