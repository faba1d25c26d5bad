"""The pretraining stage: a model from scratch, at its original length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath

from longrope_jax.data.batches import pretraining_batches
from longrope_jax.data.corpus import Document, tokens_per_byte
from longrope_jax.model import Llama
from longrope_jax.rope import FactorTable, unscaled
from longrope_jax.runtime.mesh import Layout
from longrope_jax.training.loop import LoopSettings, train
from longrope_jax.training.step import init_params


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(LoopSettings):
    """How a model is trained from scratch on windows of its original length; see `LoopSettings`.

    Attributes:
        data: the section of the text.
    """

    data: str = "data"


def pretrain(
    model: Llama,
    layout: Layout,
    settings: PretrainSettings,
    documents: Sequence[Document],
    workdir: epath.Path,
    stage: str,
) -> float:
    """Trains with the original rotation, and returns the seconds it took; see `train`."""
    length = model.config.original_length
    return train(
        model,
        layout,
        settings,
        pretraining_batches(documents, length, settings.batch, settings.seed, layout.share),
        FactorTable.of({length: unscaled(model.config.head_dim)}),
        lambda: init_params(model, settings.seed),
        workdir,
        stage,
        bits_per_nat=tokens_per_byte(documents) / math.log(2),
    )
