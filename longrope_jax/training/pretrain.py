"""Pretraining from scratch at the original length, as a stage and as one function."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from longrope_jax.data.batches import pretraining_batches
from longrope_jax.data.corpus import Document, tokens_per_byte
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.model import Llama
from longrope_jax.rope import FactorTable, unscaled
from longrope_jax.runtime import json_lines
from longrope_jax.runtime.mesh import Layout
from longrope_jax.settings import Fraction
from longrope_jax.training.loop import LoopSettings, load_params, train
from longrope_jax.training.step import init_params


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(LoopSettings):
    """How a model is trained from scratch on windows of its original length; see `LoopSettings`.

    Attributes:
        needle_share: share of the sequences that hide a needle in the text, ask for it and answer, see `needle_cloze`:
            a small model learns to retrieve from such, and hardly from text alone.
        data: the section of the text.
    """

    needle_share: Fraction = 0.0
    data: str = "data"

    def batches(
        self, documents: Sequence[Document], tokenizer: Tokenizer, original_length: int, share: tuple[int, int] = (0, 1)
    ):
        """The iterator of batches; raises ValueError if there is too little text, or the length is too short."""
        return pretraining_batches(
            documents, original_length, self.batch, self.seed, share, self.needle_share, tokenizer
        )


def pretrain(
    model: Llama,
    layout: Layout,
    settings: PretrainSettings,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    workdir: epath.Path,
    stage: str,
) -> float:
    """Trains with the original rotation; returns the seconds it took. See `train`."""
    length = model.config.original_length
    return train(
        model,
        layout,
        settings,
        settings.batches(documents, tokenizer, length, layout.share),
        FactorTable.of({length: unscaled(model.config.head_dim)}),
        lambda: init_params(model, settings.seed),
        workdir,
        stage,
        bits_per_nat=tokens_per_byte(documents) / math.log(2),
    )


class TrainingResult(NamedTuple):
    """The result of a training.

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
) -> TrainingResult:
    """Pretrains at the model's original length, as the stage `pretrain` does, but leaves nothing on disk.

    An interrupted training is lost; for long ones use an experiment (`longrope_jax.experiment`).

    Args:
        documents: to train on.
        settings: of the training; `data` is ignored.
        tokenizer: of the documents; None means bytes.
        layout: of the devices.

    Raises:
        ValueError: settings, model, text and devices don't fit together.
        Diverged: the loss is not finite.
    """
    layout, tokenizer = layout or Layout(), tokenizer or ByteTokenizer()
    settings.check_layout(layout, model.config.original_length)
    with layout.active(), tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        pretrain(model, layout, settings, documents, tokenizer, workdir, "pretrain")
        params = load_params(workdir, "pretrain", model, layout, settings.steps)
        return TrainingResult(params, json_lines.read(workdir / "metrics.jsonl"))
