"""The stage `table`: which factors a sequence gets by its length."""

from typing import Any

from longrope_jax.experiment.context import RunContext, factor_file, save_factors_of
from longrope_jax.experiment.stage import Before, Stage, factors_target, model_stage, sources
from longrope_jax.experiment.stages.settings import TableSettings
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable, load_table


def _check_table(settings: TableSettings, config: LlamaConfig, before: Before) -> None:
    model_stage(settings.model, before)
    for length, source in zip(settings.lengths, settings.factors, strict=True):
        if isinstance(before.get(source), TableSettings):
            raise ValueError(f"factors = {settings.factors}: {source!r} is a table itself")
        target = factors_target(source, before, "factors")
        if target is not None and target < length:
            raise ValueError(f"factors = {settings.factors}: {source} is good up to {target} only, not {length}")


def _run_table(settings: TableSettings, context: RunContext, name: str) -> dict[str, Any]:
    entries = {
        length: context.source(source, settings.model, length)(length)
        for length, source in zip(settings.lengths, settings.factors, strict=True)
    }
    save_factors_of(
        context,
        name,
        FactorTable.of(entries),
        model_stage=context.model_stage(settings.model),
        sources=dict(zip(map(str, settings.lengths), settings.factors, strict=True)),
    )
    return {"lengths": list(settings.lengths), "seconds": 0.0}


def _load_table(settings: TableSettings, context: RunContext, name: str, summary: dict[str, Any]) -> None:
    context.factors[name] = load_table(factor_file(context, name), context.model.config.head_dim)


TABLE = Stage(
    settings=TableSettings,
    check=_check_table,
    run=_run_table,
    load=_load_table,
    inputs=lambda s, before: [model_stage(s.model, before), *sources(s.factors, before)],
)
