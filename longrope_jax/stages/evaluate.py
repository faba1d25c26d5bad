"""The stage `evaluate`: models and factors side by side."""

from functools import partial
from typing import Any

from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.run import RECORD, EvaluationSettings, Subject, run_evaluation
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime import records
from longrope_jax.runtime.mesh import Layout
from longrope_jax.stages.carried import DYNAMIC, Carried
from longrope_jax.stages.kind import Before, LoadSettings, Stage, TableSettings, factors_target, model_stage, sources
from longrope_jax.stages.programs import evaluate_programs


def _check_evaluate(settings: EvaluationSettings, config: LlamaConfig, before: Before) -> None:
    longest = max(settings.lengths)
    for name, arm in settings.arms.items():
        model_stage(arm.model, before, f"arms.{name}.model")
        target = factors_target(arm.factors, before, f"arms.{name}.factors", more=(DYNAMIC,))
        is_table = isinstance(before.get(arm.factors), TableSettings | LoadSettings)
        if target is not None and (longest > target if is_table else longest != target):
            raise ValueError(
                f"lengths = {settings.lengths} must end at {target}, which arms.{name}.factors = {arm.factors!r} is "
                "for: all are compared at one scale"
            )


def _check_evaluate_data(settings: EvaluationSettings, carried: Carried) -> None:
    documents = carried.documents[settings.data]["evaluation"]
    windows = fixed_windows(documents, max(settings.lengths), settings.documents, settings.seed)
    if len(set(windows.names)) < 2:
        raise ValueError(
            f"only {windows.names[0]!r} has the {max(settings.lengths) + 1} tokens of a window; intervals need two "
            "evaluation documents at least"
        )


def _check_evaluate_layout(settings: EvaluationSettings, config: LlamaConfig, layout: Layout) -> None:
    for length in settings.lengths:
        layout.check_length(length, "lengths: window of")


def _run_evaluate(settings: EvaluationSettings, carried: Carried, name: str) -> dict[str, Any]:
    longest = max(settings.lengths)
    subjects = {
        arm_name: Subject(partial(carried.params, arm.model), carried.source(arm.factors, arm.model, longest))
        for arm_name, arm in settings.arms.items()
    }
    documents = carried.documents[settings.data]["evaluation"]
    made = run_evaluation(carried.model, carried.layout, subjects, settings, documents, carried.workdir, name)
    return {"lengths": list(settings.lengths), "seconds": sum(record["seconds"] for record in made)}


def _load_evaluate(settings: EvaluationSettings, carried: Carried, name: str, summary: dict[str, Any]) -> None:
    made = [record for record in records.read(carried.workdir / "evaluation.jsonl", RECORD) if record["stage"] == name]
    if len(made) < len(settings.arms) * len(settings.lengths):
        raise LookupError(f"{carried.workdir / 'evaluation.jsonl'} has lost records of it")
    carried.evaluations[name] = settings, made


def _inputs(settings: EvaluationSettings, before: Before) -> list[str]:
    models = {model_stage(arm.model, before) for arm in settings.arms.values()}
    return sorted(models | set(sources(tuple(arm.factors for arm in settings.arms.values()), before)))


EVALUATE = Stage(
    EvaluationSettings,
    _check_evaluate,
    _check_evaluate_data,
    _check_evaluate_layout,
    _run_evaluate,
    _load_evaluate,
    inputs=_inputs,
    programs=evaluate_programs,
    splits=lambda settings: ("evaluation",),
)
