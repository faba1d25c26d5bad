"""The stage `finetune`: a model learns a longer window."""

from functools import partial
from typing import Any

import numpy as np

from longrope_jax.data.windows import fixed_windows
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable, RopeFactors, Trained
from longrope_jax.runtime.mesh import Layout
from longrope_jax.stages.carried import Carried
from longrope_jax.stages.kept_factors import load_stage_factors, save_stage_factors
from longrope_jax.stages.kind import Stage
from longrope_jax.stages.programs import finetune_programs
from longrope_jax.stages.references import Before, factors_target, model_stage, sources
from longrope_jax.training.finetune import FinetuneSettings, finetune
from longrope_jax.training.loop import load_params


def _check_finetune(settings: FinetuneSettings, config: LlamaConfig, before: Before) -> None:
    model_stage(settings.model, before)
    if settings.length < config.original_length:
        raise ValueError(f"length = {settings.length} is below the original length, {config.original_length}")
    target = factors_target(settings.factors, before, "factors")
    if target is not None and target < settings.length:
        raise ValueError(f"length = {settings.length} is beyond {target}, up to which {settings.factors} is good")
    if settings.long_share < 1 and settings.length == config.original_length:
        raise ValueError(f"long_share = {settings.long_share} needs a length above the original, {settings.length}")


def _check_finetune_data(settings: FinetuneSettings, carried: Carried) -> None:
    documents = carried.documents[settings.data]
    settings.batches(documents["train"], carried.tokenizer, carried.model.config.original_length)
    if settings.evaluate_every:
        fixed_windows(documents["search"], settings.length, settings.held_out_documents, settings.seed)


def _check_finetune_layout(settings: FinetuneSettings, config: LlamaConfig, layout: Layout) -> None:
    settings.check_layout(layout, settings.length)


def _finetune_factors(settings: FinetuneSettings, carried: Carried) -> RopeFactors:
    return carried.source(settings.factors, settings.model, settings.length)(settings.length)


def _run_finetune(settings: FinetuneSettings, carried: Carried, name: str) -> dict[str, Any]:
    factors = _finetune_factors(settings, carried)
    start = carried.model_stage(settings.model)
    if (carried.workdir / "checkpoints" / name).exists():
        carried.forget_params()  # it goes on from there, and would have no use for those it began with
    seconds = finetune(
        carried.model,
        carried.layout,
        settings,
        factors,
        lambda: carried.give_away_params(start),
        carried.documents[settings.data],
        carried.tokenizer,
        carried.workdir,
        name,
    )
    save_stage_factors(carried, name, factors, settings.length, method=settings.factors, model_stage=start)
    return {"steps": settings.steps, "seconds": seconds}


def _load_finetune(settings: FinetuneSettings, carried: Carried, name: str, summary: dict[str, Any]) -> None:
    factors = load_stage_factors(carried, name)
    carried.read_params[name] = partial(
        load_params, carried.workdir, name, carried.model, carried.layout, settings.steps
    )
    carried.params(name)
    carried.trained[name] = Trained(
        _reach(settings, carried), factors
    )  # last: a stage that has to run again is no model yet


def _reach(settings: FinetuneSettings, carried: Carried) -> int:
    """Up to how many tokens the factors are good that a model was tuned with, which may be shorter: Mistral 7B reads
    16k with the factors of 256k (LongRoPE sec. 4.1), and is then extended from there.
    """
    found = carried.factors.get(settings.factors)
    if isinstance(found, FactorTable):
        return int(found.boundaries[np.searchsorted(found.boundaries, settings.length)])
    return carried.targets.get(settings.factors, settings.length)


FINETUNE = Stage(
    FinetuneSettings,
    _check_finetune,
    _check_finetune_data,
    _check_finetune_layout,
    _run_finetune,
    _load_finetune,
    inputs=lambda s, before: [model_stage(s.model, before), *sources((s.factors,), before)],
    programs=finetune_programs,
    splits=lambda s: ("train", "search") if s.evaluate_every else ("train",),
)
