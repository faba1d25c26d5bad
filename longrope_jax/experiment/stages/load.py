"""The stage `load`: a pretrained model from a Hugging Face folder or a GGUF file."""

import time
from functools import partial
from typing import Any

import jax
from etils import epath

from longrope_jax.experiment.context import RunContext
from longrope_jax.experiment.stage import Before, Stage
from longrope_jax.experiment.stages.settings import LoadSettings
from longrope_jax.files import size_of
from longrope_jax.interop.pretrained import read_params
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import Trained


def _check_load(settings: LoadSettings, config: LlamaConfig, before: Before) -> None:
    if settings.config != config:
        raise ValueError(f"path = {settings.path!r} holds another architecture than the first stage's model")


def _check_load_data(settings: LoadSettings, context: RunContext) -> None:
    settings.check_preset()
    needed, there = context.tokenizer.vocab_size, context.model.config.vocab_size
    if needed > there:
        raise ValueError(f"path = {settings.path!r}: its tokenizer has {needed} tokens, its embedding only {there}")


def _run_load(settings: LoadSettings, context: RunContext, name: str) -> dict[str, Any]:
    """Reads it once, so that a damaged file stops the experiment here. Nothing is copied."""
    started = time.monotonic()
    _register(settings, context, name)
    sizes = jax.tree.map(lambda leaf: leaf.size, context.params(name))
    return {
        "path": settings.path,
        "parameters": sum(jax.tree.leaves(sizes)),
        "files": _files(settings.path),
        "seconds": time.monotonic() - started,
    }


def _load_load(settings: LoadSettings, context: RunContext, name: str, summary: dict[str, Any]) -> None:
    if summary.get("files") != _files(settings.path):
        raise ValueError(f"{settings.path}: the files are not those that this work directory started with")
    _register(settings, context, name)


def _register(settings: LoadSettings, context: RunContext, name: str) -> None:
    table = settings.factors
    context.read_params[name] = partial(read_params, settings.path, context.model.config, context.layout.mesh)
    context.factors[name] = table
    longest = int(table.boundaries[-1])
    context.trained[name] = Trained(longest, table.select(longest))


def _files(path: str) -> dict[str, int]:
    """Bytes by name of the files that hold the weights: enough to notice that they are others."""
    place = epath.Path(path)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return {file.name: size_of(file) for file in files}


LOAD = Stage(
    settings=LoadSettings,
    check=_check_load,
    check_data=_check_load_data,
    run=_run_load,
    load=_load_load,
)
