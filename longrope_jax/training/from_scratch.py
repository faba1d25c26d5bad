"""Pretraining as one function, for notebooks: model, documents and settings in, parameters and metrics out."""

import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.model import Llama
from longrope_jax.runtime import records
from longrope_jax.runtime.mesh import Layout
from longrope_jax.training.loop import load_params
from longrope_jax.training.pretrain import PretrainSettings, pretrain


class Taught(NamedTuple):
    """What a training leaves.

    Attributes:
        params: of the model, after the last step.
        metrics: loss (nats per token), gradient norm, tokens per second and more, a record every `log_every` steps.
    """

    params: dict
    metrics: list[dict[str, Any]]


def train_from_scratch(
    model: Llama,
    documents: Sequence[Document],
    settings: PretrainSettings,
    *,
    tokenizer: Tokenizer | None = None,
    layout: Layout | None = None,
) -> Taught:
    """Pretrains at the model's original length, as the stage `pretrain` does, but keeps nothing on disk.

    An interrupted one is lost; for long ones there are experiments (`longrope_jax.experiment`).

    Args:
        documents: to train on.
        settings: its `data` is about an experiment and means nothing here.
        tokenizer: of the documents; without it bytes.
        layout: of the devices.

    Raises:
        ValueError: settings, model, text and devices don't go together.
        Diverged: the loss is not a number any more.
    """
    layout, tokenizer = layout or Layout(), tokenizer or ByteTokenizer()
    settings.check_layout(layout, model.config.original_length)
    with layout.active(), tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        pretrain(model, layout, settings, documents, tokenizer, workdir, "pretrain")
        params = load_params(workdir, "pretrain", model, layout, settings.steps)
        return Taught(params, list(records.read(workdir / "metrics.jsonl")))
