"""Fine-tuning: a pretrained or extended model learns a longer window with given factors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from etils import epath

from longrope_jax.data.batches import finetuning_batches
from longrope_jax.data.corpus import Document, tokens_per_byte
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import token_nll
from longrope_jax.model import Llama
from longrope_jax.model.config import REMAT_POLICIES
from longrope_jax.rope import FactorTable, RopeFactors, unscaled
from longrope_jax.runtime.mesh import Layout
from longrope_jax.settings import Fraction, NonNegativeInt, PositiveInt, one_of
from longrope_jax.training.loop import LoopSettings, train


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(LoopSettings):
    """How a model is fine-tuned to a longer window (LongRoPE sec. 4.1; mixed windows: LongRoPE2).

    Attributes:
        length: L', tokens of a sequence.
        factors: the rotation to train with: a search stage, a table stage, or a method such as "yarn".
        model: the stage whose parameters it starts from; "" is the latest stage before this one.
        packed: packs pieces of documents of up to `length` tokens into sequences, with segment ids, so that all text is
            used; else cuts segments of exactly `length` tokens from documents that are long enough.
        long_share: share of the long sequences; the others are packed with pieces of at most the original length and
            use the original rotation.
        evaluate_every: steps between evaluations on held-out documents (those of the search); 0 for none.
        held_out_documents: how many.
        remat: what a block saves for the backward pass, see `LlamaConfig`.
        data: the config section of the text, for training and held out.
    """

    length: PositiveInt
    factors: str
    model: str = ""
    packed: bool = False
    long_share: Fraction = 1.0
    evaluate_every: NonNegativeInt = 100
    held_out_documents: PositiveInt = 8
    remat: Annotated[str, one_of(REMAT_POLICIES)] = "nothing_saveable"
    data: str = "data"

    def batches(
        self, documents: Sequence[Document], tokenizer: Tokenizer, original_length: int, share: tuple[int, int] = (0, 1)
    ):
        """The iterator of batches; raises ValueError if there is too little text or no BOS or EOS."""
        if tokenizer.bos is None or tokenizer.eos is None:
            raise ValueError("segments begin with BOS and end with EOS; the model's tokenizer does not have both")
        return finetuning_batches(
            documents,
            self.length,
            original_length,
            self.batch,
            self.seed,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            packed=self.packed,
            long_share=self.long_share,
            process=share,
        )


def finetune(
    model: Llama,
    layout: Layout,
    settings: FinetuneSettings,
    factors: RopeFactors,
    first_params: Callable[[], dict],
    documents: dict[str, Sequence[Document]],
    tokenizer: Tokenizer,
    workdir: epath.Path,
    stage: str,
) -> float:
    """Trains with `factors` (and, on short sequences, the original rotation); returns the seconds it took; see `train`.

    The cost of a step is that of `train_step` at T = length; memory falls with the mesh's `seq` axis.
    """
    config = model.config
    tuned = Llama(dataclasses.replace(config, remat=settings.remat))
    entries = {settings.length: factors}
    if settings.long_share < 1:
        entries[config.original_length] = unscaled(config.head_dim)
    held_out_loss = None
    if settings.evaluate_every:
        windows = fixed_windows(documents["search"], settings.length, settings.held_out_documents, settings.seed)
        held_out_loss = partial(_held_out_loss, model, layout, factors, windows.tokens, tokenizer.window_bos)
    return train(
        tuned,
        layout,
        settings,
        settings.batches(documents["train"], tokenizer, config.original_length, layout.share),
        FactorTable.of(entries),
        first_params,
        workdir,
        stage,
        bits_per_nat=tokens_per_byte(documents["train"]) / math.log(2),
        evaluate=held_out_loss,
        evaluate_every=settings.evaluate_every,
    )


def _held_out_loss(model, layout, factors, tokens, bos, params) -> dict[str, float]:
    nll = token_nll(model, layout, params, factors, tokens, tokens.shape[1] - 1, bos=bos)
    return {"held_out_loss": nll.mean(dtype=np.float64)}
