"""The stage `retrieval`: does a model find what it read a long time ago?"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from longrope_jax.data.corpus import Document
from longrope_jax.evaluation.retrieval import RECORD, RetrievalSettings, make_prompts, run_retrieval
from longrope_jax.evaluation.run import Subject
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime import records
from longrope_jax.stages.carried import DYNAMIC, Carried
from longrope_jax.stages.kind import Before, Stage, factors_target, model_stage, nothing, sources
from longrope_jax.stages.programs import retrieval_programs


def _check_retrieval(settings: RetrievalSettings, config: LlamaConfig, before: Before) -> None:
    longest = max(settings.lengths)
    for name, arm in settings.arms.items():
        model_stage(arm.model, before, f"arms.{name}.model")
        target = factors_target(arm.factors, before, f"arms.{name}.factors", more=(DYNAMIC,))
        if target is not None and longest > target:
            raise ValueError(
                f"lengths = {settings.lengths} goes beyond {target}, up to which arms.{name}.factors = "
                f"{arm.factors!r} is good"
            )


def _check_retrieval_data(settings: RetrievalSettings, carried: Carried) -> None:
    documents = _documents(settings, carried)
    for length in {min(settings.lengths), max(settings.lengths)}:
        make_prompts(settings, carried.tokenizer, documents, length, settings.places[0])


def _documents(settings: RetrievalSettings, carried: Carried) -> Sequence[Document]:
    return carried.documents[settings.data]["evaluation"] if _splits(settings) else ()


def _splits(settings: RetrievalSettings) -> tuple[str, ...]:
    return () if settings.task == "passkey" else ("evaluation",)


def _run_retrieval(settings: RetrievalSettings, carried: Carried, name: str) -> dict[str, Any]:
    longest = max(settings.lengths)
    subjects = {
        arm_name: Subject(partial(carried.params, arm.model), carried.source(arm.factors, arm.model, longest))
        for arm_name, arm in settings.arms.items()
    }
    documents = _documents(settings, carried)
    made = run_retrieval(
        carried.model, carried.layout, subjects, settings, carried.tokenizer, documents, carried.workdir, name
    )
    return {"lengths": list(settings.lengths), "seconds": sum(record["seconds"] for record in made)}


def _load_retrieval(settings: RetrievalSettings, carried: Carried, name: str, summary: dict[str, Any]) -> None:
    made = [record for record in records.read(carried.workdir / "retrieval.jsonl", RECORD) if record["stage"] == name]
    if len(made) < len(settings.arms) * len(settings.lengths) * len(settings.places):
        raise LookupError(f"{carried.workdir / 'retrieval.jsonl'} has lost records of it")
    carried.retrievals[name] = settings, made


def _inputs(settings: RetrievalSettings, before: Before) -> list[str]:
    models = {model_stage(arm.model, before) for arm in settings.arms.values()}
    return sorted(models | set(sources(tuple(arm.factors for arm in settings.arms.values()), before)))


RETRIEVAL = Stage(
    RetrievalSettings,
    _check_retrieval,
    _check_retrieval_data,
    nothing,  # generation fills up batches that don't fit the mesh
    _run_retrieval,
    _load_retrieval,
    inputs=_inputs,
    programs=retrieval_programs,
    splits=_splits,
)
