"""The stage `pretrain`: a model from scratch."""

from functools import partial
from typing import Any

from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.data.windows import fixed_windows
from longrope_jax.experiment.context import RunContext, factor_file, save_factors_of, table_entry
from longrope_jax.experiment.stage import Before, Stage, factors_target, model_stage, sources
from longrope_jax.experiment.stage_programs import finetune_programs, pretrain_programs
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import Trained, load_factors, unscaled
from longrope_jax.training.finetune import FinetuneSettings, finetune
from longrope_jax.training.loop import LoopSettings, load_params
from longrope_jax.training.pretrain import PretrainSettings, pretrain


def _check_pretrain(settings: PretrainSettings, config: LlamaConfig, before: Before) -> None:
    if config.vocab_size < ByteTokenizer.vocab_size:
        raise ValueError(f"model.vocab_size = {config.vocab_size} is below the tokenizer's {ByteTokenizer.vocab_size}")


def _check_pretrain_data(settings: PretrainSettings, context: RunContext) -> None:
    train, length = context.documents[settings.data]["train"], context.model.config.original_length
    settings.batches(train, context.tokenizer, length)


def _run_pretrain(settings: PretrainSettings, context: RunContext, name: str) -> dict[str, Any]:
    train = context.documents[settings.data]["train"]
    seconds = pretrain(context.model, context.layout, settings, train, context.tokenizer, context.workdir, name)
    return {"steps": settings.steps, "seconds": seconds}


def _load_pretrain(settings: PretrainSettings, context: RunContext, name: str, summary: dict[str, Any]) -> None:
    _register_params(settings, context, name)
    context.trained[name] = Trained(context.model.config.original_length, unscaled(context.model.config.head_dim))


def _register_params(settings: LoopSettings, context: RunContext, name: str) -> None:
    """Reads the parameters once; raises LookupError if they are missing."""
    context.read_params[name] = partial(
        load_params, context.workdir, name, context.model, context.layout, settings.steps
    )
    context.params(name)


PRETRAIN = Stage(
    settings=PretrainSettings,
    check=_check_pretrain,
    check_data=_check_pretrain_data,
    check_layout=lambda settings, config, layout: settings.check_layout(layout, config.original_length),
    run=_run_pretrain,
    load=_load_pretrain,
    programs=pretrain_programs,
    splits=lambda settings: ("train",),
)


def _check_finetune(settings: FinetuneSettings, config: LlamaConfig, before: Before) -> None:
    model_stage(settings.model, before)
    if settings.length < config.original_length:
        raise ValueError(f"length = {settings.length} is below the original length, {config.original_length}")
    target = factors_target(settings.factors, before, "factors")
    if target is not None and target < settings.length:
        raise ValueError(f"length = {settings.length} is beyond {target}, up to which {settings.factors} is good")
    if settings.long_share < 1 and settings.length == config.original_length:
        raise ValueError(f"long_share = {settings.long_share} needs a length above the original, {settings.length}")


def _check_finetune_data(settings: FinetuneSettings, context: RunContext) -> None:
    documents = context.documents[settings.data]
    settings.batches(documents["train"], context.tokenizer, context.model.config.original_length)
    if settings.evaluate_every:
        fixed_windows(documents["search"], settings.length, settings.held_out_documents, settings.seed)


def _run_finetune(settings: FinetuneSettings, context: RunContext, name: str) -> dict[str, Any]:
    factors = context.source(settings.factors, settings.model, settings.length)(settings.length)
    start = context.model_stage(settings.model)
    if (context.workdir / "checkpoints" / name).exists():
        context.release_params()  # it continues from its checkpoint
    seconds = finetune(
        context.model,
        context.layout,
        settings,
        factors,
        lambda: context.pop_params(start),
        context.documents[settings.data],
        context.tokenizer,
        context.workdir,
        name,
    )
    save_factors_of(context, name, factors, target_length=settings.length, method=settings.factors, model_stage=start)
    return {"steps": settings.steps, "seconds": seconds}


def _load_finetune(settings: FinetuneSettings, context: RunContext, name: str, summary: dict[str, Any]) -> None:
    factors = load_factors(factor_file(context, name), context.model.config.head_dim)
    _register_params(settings, context, name)
    context.trained[name] = Trained(_reach(settings, context), factors)  # last: a stage to run again is no model yet


def _reach(settings: FinetuneSettings, context: RunContext) -> int:
    """Up to how many tokens the factors are good that a model was tuned with, which may be shorter: Mistral 7B reads
    16k with the factors of 256k (LongRoPE sec. 4.1), and is then extended from there.
    """
    table = context.factors.get(settings.factors)
    return settings.length if table is None else table_entry(table, settings.length)[1]


FINETUNE = Stage(
    settings=FinetuneSettings,
    check=_check_finetune,
    check_data=_check_finetune_data,
    check_layout=lambda settings, config, layout: settings.check_layout(layout, settings.length),
    run=_run_finetune,
    load=_load_finetune,
    inputs=lambda s, before: [model_stage(s.model, before), *sources((s.factors,), before)],
    programs=finetune_programs,
    splits=lambda s: ("train", "search") if s.evaluate_every else ("train",),
)
