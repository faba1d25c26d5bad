"""The stage `evaluate`: models and factors side by side."""

from typing import Any

from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.run import RECORD, EvaluationSettings, run_evaluation
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime.mesh import Layout
from longrope_jax.stages.arms import arm_inputs, arm_targets, finished_records, subjects
from longrope_jax.stages.carried import Carried
from longrope_jax.stages.kind import Stage
from longrope_jax.stages.programs import evaluate_programs
from longrope_jax.stages.references import Before
from longrope_jax.stages.settings import LoadSettings, TableSettings


def _check_evaluate(settings: EvaluationSettings, config: LlamaConfig, before: Before) -> None:
    longest = max(settings.lengths)
    for name, target in arm_targets(settings, before).items():
        source = settings.arms[name].factors
        is_table = isinstance(before.get(source), TableSettings | LoadSettings)
        if target is not None and (longest > target if is_table else longest != target):
            raise ValueError(
                f"lengths = {settings.lengths} must end at {target}, which arms.{name}.factors = {source!r} is "
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
    documents, judged = carried.documents[settings.data]["evaluation"], subjects(settings, carried)
    made = run_evaluation(carried.model, carried.layout, judged, settings, documents, carried.workdir, name)
    return {"lengths": list(settings.lengths), "seconds": sum(record["seconds"] for record in made)}


def _load_evaluate(settings: EvaluationSettings, carried: Carried, name: str, summary: dict[str, Any]) -> None:
    count = len(settings.arms) * len(settings.lengths)
    carried.evaluations[name] = settings, finished_records(carried.workdir / "evaluation.jsonl", name, RECORD, count)


EVALUATE = Stage(
    EvaluationSettings,
    _check_evaluate,
    _check_evaluate_data,
    _check_evaluate_layout,
    _run_evaluate,
    _load_evaluate,
    inputs=arm_inputs,
    programs=evaluate_programs,
    splits=lambda settings: ("evaluation",),
)
