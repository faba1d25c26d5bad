"""The stage `pretrain`: a model from scratch."""

from functools import partial
from typing import Any

from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import Trained, unscaled
from longrope_jax.runtime.mesh import Layout
from longrope_jax.stages.carried import Carried
from longrope_jax.stages.kind import Stage
from longrope_jax.stages.programs import pretrain_programs
from longrope_jax.stages.references import Before
from longrope_jax.training.loop import load_params
from longrope_jax.training.pretrain import PretrainSettings, pretrain


def _check_pretrain(settings: PretrainSettings, config: LlamaConfig, before: Before) -> None:
    if config.vocab_size < ByteTokenizer.vocab_size:
        raise ValueError(f"model.vocab_size = {config.vocab_size} is below the tokenizer's {ByteTokenizer.vocab_size}")


def _check_pretrain_data(settings: PretrainSettings, carried: Carried) -> None:
    train, length = carried.documents[settings.data]["train"], carried.model.config.original_length
    settings.batches(train, carried.tokenizer, length)


def _check_pretrain_layout(settings: PretrainSettings, config: LlamaConfig, layout: Layout) -> None:
    settings.check_layout(layout, config.original_length)


def _run_pretrain(settings: PretrainSettings, carried: Carried, name: str) -> dict[str, Any]:
    train = carried.documents[settings.data]["train"]
    seconds = pretrain(carried.model, carried.layout, settings, train, carried.tokenizer, carried.workdir, name)
    return {"steps": settings.steps, "seconds": seconds}


def _load_pretrain(settings: PretrainSettings, carried: Carried, name: str, summary: dict[str, Any]) -> None:
    config = carried.model.config
    carried.read_params[name] = partial(
        load_params, carried.workdir, name, carried.model, carried.layout, settings.steps
    )
    carried.params(name)
    carried.trained[name] = Trained(config.original_length, unscaled(config.head_dim))


PRETRAIN = Stage(
    PretrainSettings,
    _check_pretrain,
    _check_pretrain_data,
    _check_pretrain_layout,
    _run_pretrain,
    _load_pretrain,
    inputs=lambda settings, before: [],
    programs=pretrain_programs,
    splits=lambda settings: ("train",),
)
