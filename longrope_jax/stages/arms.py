"""What the stages `evaluate` and `retrieval` have in common: both judge arms, each a model with factors."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from etils import epath

from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.evaluation.run import EvaluationSettings, Subject
from longrope_jax.json_files import Kind
from longrope_jax.runtime import records
from longrope_jax.stages.carried import DYNAMIC, Carried
from longrope_jax.stages.references import Before, factors_target, model_stage, sources

Settings = EvaluationSettings | RetrievalSettings


def arm_targets(settings: Settings, before: Before) -> dict[str, int | None]:
    """The lengths (tokens) up to which the arms' factors are good, None for a method.

    Raises:
        ValueError: an arm names a model or factors that no stage before makes.
    """
    targets = {}
    for name, arm in settings.arms.items():
        model_stage(arm.model, before, f"arms.{name}.model")
        targets[name] = factors_target(arm.factors, before, f"arms.{name}.factors", more=(DYNAMIC,))
    return targets


def arm_inputs(settings: Settings, before: Before) -> list[str]:
    """The stages whose models and factors the arms are."""
    models = {model_stage(arm.model, before) for arm in settings.arms.values()}
    return sorted(models | set(sources(tuple(arm.factors for arm in settings.arms.values()), before)))


def subjects(settings: Settings, carried: Carried) -> dict[str, Subject]:
    """The arms with their parameters and factors; methods extend to the longest of the lengths."""
    longest = max(settings.lengths)
    return {
        name: Subject(partial(carried.params, arm.model), carried.source(arm.factors, arm.model, longest))
        for name, arm in settings.arms.items()
    }


def finished_records(path: epath.Path, stage: str, fields: Mapping[str, Kind], count: int) -> list[dict[str, Any]]:
    """The records that a finished stage left; raises LookupError if they are fewer than `count`."""
    made = records.of_stage(path, stage, fields)
    if len(made) < count:
        raise LookupError(f"{path} has lost records of it")
    return made
