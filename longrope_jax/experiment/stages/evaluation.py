"""The stages `evaluate` and `retrieval`: both evaluate methods, each with the factors and the model of a stage."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.evaluate import EVALUATION_RECORD, EvaluatedMethod, EvaluationSettings, run_evaluation
from longrope_jax.evaluation.retrieval import RETRIEVAL_RECORD, RetrievalSettings, make_prompts, run_retrieval
from longrope_jax.experiment.context import DYNAMIC, RunContext
from longrope_jax.experiment.stage import Before, Stage, factors_target, model_stage, sources
from longrope_jax.experiment.stage_programs import evaluate_programs, retrieval_programs
from longrope_jax.experiment.stages.settings import LoadSettings, TableSettings
from longrope_jax.json_files import Kind
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime import json_lines
from longrope_jax.runtime.mesh import Layout

Settings = EvaluationSettings | RetrievalSettings


def _method_targets(settings: Settings, before: Before) -> dict[str, int | None]:
    """The lengths (tokens) that the methods' factors are for; None for a published method.

    Raises:
        ValueError: no stage before has the model or the factors of a method.
    """
    targets = {}
    for name, method in settings.methods.items():
        model_stage(method.model, before, f"methods.{name}.model")
        targets[name] = factors_target(method.factors, before, f"methods.{name}.factors", more=(DYNAMIC,))
    return targets


def _method_inputs(settings: Settings, before: Before) -> list[str]:
    """The stages whose models and factors the methods use."""
    models = {model_stage(method.model, before) for method in settings.methods.values()}
    return sorted(models | set(sources(tuple(method.factors for method in settings.methods.values()), before)))


def _evaluated_methods(settings: Settings, context: RunContext) -> dict[str, EvaluatedMethod]:
    """The methods with their parameters and factors; published methods extend to the longest of the lengths."""
    longest = max(settings.lengths)
    return {
        name: EvaluatedMethod(
            partial(context.params, method.model), context.source(method.factors, method.model, longest)
        )
        for name, method in settings.methods.items()
    }


def _finished_records(path: epath.Path, stage: str, fields: Mapping[str, Kind], count: int) -> list[dict[str, Any]]:
    """The records of a finished stage; raises LookupError if they are fewer than `count`."""
    found = json_lines.of_stage(path, stage, fields)
    if len(found) < count:
        raise LookupError(f"{path} has lost records of it")
    return found


def _check_evaluate(settings: EvaluationSettings, config: LlamaConfig, before: Before) -> None:
    for name, target in _method_targets(settings, before).items():
        source = settings.methods[name].factors
        is_table = isinstance(before.get(source), TableSettings | LoadSettings)
        if target is not None and is_table and max(settings.lengths) > target:
            raise ValueError(
                f"lengths = {settings.lengths} must end at {target}, where methods.{name}.factors = {source!r} ends"
            )


def _check_evaluate_data(settings: EvaluationSettings, context: RunContext) -> None:
    window = settings.window(max(settings.lengths))
    documents = context.documents[settings.data][settings.split]
    try:
        windows = fixed_windows(documents, window, settings.documents, settings.seed)
    except ValueError as error:
        raise ValueError(f"{error} (lengths end at {max(settings.lengths)}, margin = {settings.margin:g})") from None
    if len(set(windows.names)) < 2:
        raise ValueError(
            f"only {windows.names[0]!r} has the {window + 1} tokens of a window with its margin; intervals need two "
            f"{settings.split} documents at least"
        )


def _check_evaluate_layout(settings: EvaluationSettings, config: LlamaConfig, layout: Layout) -> None:
    for length in settings.lengths:
        window = settings.window(length)
        layout.check_length(window, "lengths: window with its margin" if window > length else "lengths: window of")


def _run_evaluate(settings: EvaluationSettings, context: RunContext, name: str) -> dict[str, Any]:
    documents, methods = context.documents[settings.data][settings.split], _evaluated_methods(settings, context)
    bos = context.tokenizer.window_bos
    found = run_evaluation(context.model, context.layout, methods, settings, documents, context.workdir, name, bos)
    return {"lengths": list(settings.lengths), "seconds": sum(record["seconds"] for record in found)}


def _load_evaluate(settings: EvaluationSettings, context: RunContext, name: str, summary: dict[str, Any]) -> None:
    count = len(settings.methods) * len(settings.lengths)
    found = _finished_records(context.workdir / "evaluation.jsonl", name, EVALUATION_RECORD, count)
    context.evaluations[name] = settings, found


EVALUATE = Stage(
    settings=EvaluationSettings,
    check=_check_evaluate,
    check_data=_check_evaluate_data,
    check_layout=_check_evaluate_layout,
    run=_run_evaluate,
    load=_load_evaluate,
    inputs=_method_inputs,
    programs=evaluate_programs,
    splits=lambda settings: (settings.split,),
)


def _check_retrieval(settings: RetrievalSettings, config: LlamaConfig, before: Before) -> None:
    longest = max(settings.lengths)
    for name, target in _method_targets(settings, before).items():
        if target is not None and longest > target:
            raise ValueError(
                f"lengths = {settings.lengths} goes beyond {target}, up to which methods.{name}.factors = "
                f"{settings.methods[name].factors!r} is good"
            )


def _check_retrieval_data(settings: RetrievalSettings, context: RunContext) -> None:
    documents = _documents(settings, context)
    for length in {min(settings.lengths), max(settings.lengths)}:
        make_prompts(settings, context.tokenizer, documents, length, settings.places[0])


def _documents(settings: RetrievalSettings, context: RunContext) -> Sequence[Document]:
    return context.documents[settings.data]["evaluation"] if _splits(settings) else ()


def _splits(settings: RetrievalSettings) -> tuple[str, ...]:
    return () if settings.task == "passkey" else ("evaluation",)


def _run_retrieval(settings: RetrievalSettings, context: RunContext, name: str) -> dict[str, Any]:
    documents, methods = _documents(settings, context), _evaluated_methods(settings, context)
    found = run_retrieval(
        context.model, context.layout, methods, settings, context.tokenizer, documents, context.workdir, name
    )
    return {"lengths": list(settings.lengths), "seconds": sum(record["seconds"] for record in found)}


def _load_retrieval(settings: RetrievalSettings, context: RunContext, name: str, summary: dict[str, Any]) -> None:
    count = len(settings.methods) * len(settings.lengths) * len(settings.places)
    found = _finished_records(context.workdir / "retrieval.jsonl", name, RETRIEVAL_RECORD, count)
    context.retrievals[name] = settings, found


RETRIEVAL = Stage(
    settings=RetrievalSettings,
    check=_check_retrieval,
    check_data=_check_retrieval_data,  # and no mesh is refused: generation fills up batches that don't fit it
    run=_run_retrieval,
    load=_load_retrieval,
    inputs=_method_inputs,
    programs=retrieval_programs,
    splits=_splits,
)
