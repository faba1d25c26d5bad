"""The kinds of stages: what each checks before anything starts, does, and hands on to the stages after it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from longrope_jax import rope
from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.data.windows import fixed_windows, training_batches
from longrope_jax.evaluation.run import EvaluationSettings, run_evaluation
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import records
from longrope_jax.search.run import SearchSettings, run_search
from longrope_jax.training.loop import PretrainSettings, load_params, pretrain


@dataclass
class Carried:
    """What stages leave for the ones after them."""

    model: Llama
    documents: dict[str, list[Document]]
    workdir: epath.Path
    params: dict | None = None
    factors: RopeFactors | None = None
    searches: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """A kind of stage.

    Attributes:
        settings: the class of its settings.
        check_data: (settings, model config, documents by split) -> None, raises if the text does not suffice.
        run: (settings, carried, name) -> summary, JSON-able, with its seconds; leaves the stage's results on disk.
        load: (carried, name, summary) -> None, hands the results on, whether the stage has just run or did so before.
        check: (settings, model config, settings of the stages before) -> None, raises if they don't go together.
        makes_params: whether it leaves a model's parameters; the first stage must.
        repeatable: whether an experiment may have several of its kind.
    """

    settings: type
    check_data: Callable
    run: Callable
    load: Callable
    check: Callable
    makes_params: bool = False
    repeatable: bool = False


def _check_pretrain(settings: PretrainSettings, config: LlamaConfig, before: list[Any]) -> None:
    if config.vocab_size < ByteTokenizer.vocab_size:
        raise ValueError(f"model.vocab_size = {config.vocab_size} is below the tokenizer's {ByteTokenizer.vocab_size}")


def _check_pretrain_data(settings: PretrainSettings, config: LlamaConfig, documents) -> None:
    training_batches(documents["train"], config.original_length, settings.batch, settings.seed)


def _run_pretrain(settings: PretrainSettings, carried: Carried, name: str) -> dict[str, Any]:
    seconds = pretrain(carried.model, settings, carried.documents["train"], carried.workdir, name)
    return {"steps": settings.steps, "seconds": seconds}


def _load_pretrain(carried: Carried, name: str, summary: dict[str, Any]) -> None:
    carried.params = load_params(carried.workdir, name)


def _check_search(settings: SearchSettings, config: LlamaConfig, before: list[Any]) -> None:
    if settings.target_length <= config.original_length:
        raise ValueError(
            f"target_length = {settings.target_length} must be above the model's original_length = "
            f"{config.original_length}"
        )
    settings.space(config.original_length)


def _check_search_data(settings: SearchSettings, config: LlamaConfig, documents) -> None:
    fixed_windows(documents["search"], settings.target_length, settings.documents, settings.seed)


def _run_search(settings: SearchSettings, carried: Carried, name: str) -> dict[str, Any]:
    config = carried.model.config
    result = run_search(carried.model, carried.params, settings, carried.documents["search"], carried.workdir, name)
    (carried.workdir / "factors").mkdir(exist_ok=True)
    rope.save_factors(
        carried.workdir / "factors" / f"{name}.json",
        result.factors,
        method="longrope",
        model=dataclasses.asdict(config),
        original_length=config.original_length,
        target_length=settings.target_length,
        scores=records.finite({"search_nll": result.best_nll, "seeds_nll": result.seeds}),
        provenance={
            "stage": name,
            "evaluations": len(result.curve),
            "documents": result.documents,
            "settings": dataclasses.asdict(settings),
        },
    )
    return {
        "target_length": settings.target_length,
        "documents": result.documents,
        "evaluations": len(result.curve),
        "population": settings.evolution.population,
        "seconds": result.seconds,
        "objective_seconds": result.objective_seconds,
        "best_nll": result.best_nll,
        "seeds": result.seeds,
        "curve": result.curve,
    }


def _load_search(carried: Carried, name: str, summary: dict[str, Any]) -> None:
    carried.factors = rope.load_factors(carried.workdir / "factors" / f"{name}.json", carried.model.config.head_dim)
    factors = {"lam": carried.factors.lam.tolist(), "n_hat": int(carried.factors.n_hat)}
    carried.searches.append({"stage": name, **summary, "factors": factors})


def _check_evaluate(settings: EvaluationSettings, config: LlamaConfig, before: list[Any]) -> None:
    targets = [earlier.target_length for earlier in before if isinstance(earlier, SearchSettings)]
    if targets and targets[-1] != max(settings.lengths):
        raise ValueError(
            f"lengths = {settings.lengths} must end at {targets[-1]}, which factors are searched for: all methods are "
            "compared at one scale"
        )


def _check_evaluate_data(settings: EvaluationSettings, config: LlamaConfig, documents) -> None:
    windows = fixed_windows(documents["evaluation"], max(settings.lengths), settings.documents, settings.seed)
    if len(set(windows.names)) < 2:
        raise ValueError(
            f"only {windows.names[0]!r} has the {max(settings.lengths) + 1} tokens of a window; intervals need two "
            "evaluation documents at least"
        )


def _run_evaluate(settings: EvaluationSettings, carried: Carried, name: str) -> dict[str, Any]:
    made = run_evaluation(
        carried.model,
        carried.params,
        carried.factors,
        settings,
        carried.documents["evaluation"],
        carried.workdir,
        name,
    )
    return {"lengths": list(settings.lengths), "seconds": sum(record["seconds"] for record in made)}


def _load_evaluate(carried: Carried, name: str, summary: dict[str, Any]) -> None:
    carried.evaluation = [r for r in records.read(carried.workdir / "evaluation.jsonl") if r["stage"] == name]


STAGES = {
    "pretrain": Stage(
        PretrainSettings, _check_pretrain_data, _run_pretrain, _load_pretrain, _check_pretrain, makes_params=True
    ),
    "search": Stage(SearchSettings, _check_search_data, _run_search, _load_search, _check_search, repeatable=True),
    "evaluate": Stage(EvaluationSettings, _check_evaluate_data, _run_evaluate, _load_evaluate, _check_evaluate),
}
