"""The stage `table`: which factors a sequence gets by its length."""

from typing import Any

from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable
from longrope_jax.stages.carried import Carried
from longrope_jax.stages.kept_factors import load_stage_table, save_stage_table
from longrope_jax.stages.kind import Stage, nothing
from longrope_jax.stages.references import Before, factors_target, model_stage, sources
from longrope_jax.stages.settings import TableSettings


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
    save_stage_table(
        carried,
        name,
        FactorTable.of(entries),
        model_stage=carried.model_stage(settings.model),
        sources=dict(zip(map(str, settings.lengths), settings.factors, strict=True)),
    )
    return {"lengths": list(settings.lengths), "seconds": 0.0}


def _load_table(settings: TableSettings, carried: Carried, name: str, summary: dict[str, Any]) -> None:
    carried.factors[name] = load_stage_table(carried, name)


TABLE = Stage(
    TableSettings,
    _check_table,
    nothing,
    nothing,
    _run_table,
    _load_table,
    inputs=lambda s, before: [model_stage(s.model, before), *sources(s.factors, before)],
)
