"""The stage `retrieval`: does a model find what it read a long time ago?"""

from collections.abc import Sequence
from typing import Any

from longrope_jax.data.corpus import Document
from longrope_jax.evaluation.retrieval import RECORD, RetrievalSettings, make_prompts, run_retrieval
from longrope_jax.model import LlamaConfig
from longrope_jax.stages.arms import arm_inputs, arm_targets, finished_records, subjects
from longrope_jax.stages.carried import Carried
from longrope_jax.stages.kind import Stage, nothing
from longrope_jax.stages.programs import retrieval_programs
from longrope_jax.stages.references import Before


def _check_retrieval(settings: RetrievalSettings, config: LlamaConfig, before: Before) -> None:
    longest = max(settings.lengths)
    for name, target in arm_targets(settings, before).items():
        if target is not None and longest > target:
            raise ValueError(
                f"lengths = {settings.lengths} goes beyond {target}, up to which arms.{name}.factors = "
                f"{settings.arms[name].factors!r} is good"
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
    documents, judged = _documents(settings, carried), subjects(settings, carried)
    made = run_retrieval(
        carried.model, carried.layout, judged, settings, carried.tokenizer, documents, carried.workdir, name
    )
    return {"lengths": list(settings.lengths), "seconds": sum(record["seconds"] for record in made)}


def _load_retrieval(settings: RetrievalSettings, carried: Carried, name: str, summary: dict[str, Any]) -> None:
    count = len(settings.arms) * len(settings.lengths) * len(settings.places)
    carried.retrievals[name] = settings, finished_records(carried.workdir / "retrieval.jsonl", name, RECORD, count)


RETRIEVAL = Stage(
    RetrievalSettings,
    _check_retrieval,
    _check_retrieval_data,
    nothing,  # generation fills up batches that don't fit the mesh
    _run_retrieval,
    _load_retrieval,
    inputs=arm_inputs,
    programs=retrieval_programs,
    splits=_splits,
)
