"""The factors that a stage leaves in the work directory, `factors/<stage>.json`."""

import dataclasses
from typing import Any

from etils import epath

from longrope_jax.rope import FactorTable, RopeFactors, load_factors, load_table, save_factors, save_table
from longrope_jax.runtime import processes, records
from longrope_jax.stages.carried import Carried


def save_stage_factors(carried: Carried, name: str, factors: RopeFactors, target: int, **metadata: Any) -> None:
    """Writes one set of factors, for windows of up to `target` tokens."""
    if processes.is_first():
        config = carried.model.config
        save_factors(
            _new_file(carried, name),
            factors,
            **records.finite(metadata),
            stage=name,
            model=dataclasses.asdict(config),
            original_length=config.original_length,
            target_length=target,
        )


def load_stage_factors(carried: Carried, name: str) -> RopeFactors:
    """What `save_stage_factors` wrote; raises LookupError if it is gone."""
    return load_factors(_found(carried, name), carried.model.config.head_dim)


def save_stage_table(carried: Carried, name: str, table: FactorTable, **metadata: Any) -> None:
    """Writes factors by length."""
    if processes.is_first():
        model = dataclasses.asdict(carried.model.config)
        save_table(_new_file(carried, name), table, stage=name, model=model, **metadata)


def load_stage_table(carried: Carried, name: str) -> FactorTable:
    """What `save_stage_table` wrote; raises LookupError if it is gone."""
    return load_table(_found(carried, name), carried.model.config.head_dim)


def _new_file(carried: Carried, name: str) -> epath.Path:
    path = _file(carried, name)
    path.parent.mkdir(exist_ok=True)
    return path


def _found(carried: Carried, name: str) -> epath.Path:
    path = _file(carried, name)
    if not path.exists():
        raise LookupError(f"{path} is gone")
    return path


def _file(carried: Carried, name: str) -> epath.Path:
    return carried.workdir / "factors" / f"{name}.json"
