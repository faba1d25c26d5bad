"""Settings of the stages that only gather what others have made: a pretrained model, or factors by length."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np

from longrope_jax.interop import describe_pretrained
from longrope_jax.model import LlamaConfig
from longrope_jax.model.attention import BACKENDS
from longrope_jax.model.config import FLOAT_TYPES, PRESETS
from longrope_jax.rope import FactorTable, unscaled
from longrope_jax.settings import Rule, Settings, one_of


@dataclass(frozen=True)
class LoadSettings(Settings):
    """Whose pretrained model, and how to compute with it. As the first stage it also gives the tokenizer.

    Attributes:
        path: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a GGUF file. The architecture and the
            rotation come from there; the stage's name is a source of factors, those by length that it came with.
        dtype: of activations and matrix products.
        param_dtype: of parameters, whatever the files have.
        attention: backend, see `model/attention.py`.
        preset: name of the architecture that the files must hold, see `LlamaConfig.preset`, in its original length;
            nothing is read from them before they are needed. "" takes what they hold.
        bos: what begins with BOS. "documents": only these, and prompts. "windows": all that search and evaluation read,
            in place of a window's first token, as in LongRoPE's released code. "auto": "windows" if the tokenizer says
            that it adds BOS.
    """

    path: Annotated[str, Rule(bool, "is empty; give a Hugging Face folder or a .gguf file")]
    dtype: Annotated[str, one_of(FLOAT_TYPES)] = "float32"
    param_dtype: Annotated[str, one_of(FLOAT_TYPES)] = "float32"
    attention: Annotated[str, one_of(BACKENDS)] = "auto"
    preset: Annotated[str, one_of(PRESETS, "")] = ""
    bos: Annotated[str, one_of(("auto", "documents", "windows"))] = "auto"

    @property
    def config(self) -> LlamaConfig:
        """The model's; raises ValueError where the path holds none that can be loaded."""
        return self._described[0]

    @property
    def factors(self) -> FactorTable:
        """The rotation that the model came with, by length."""
        return self._described[1]

    def check_preset(self) -> None:
        """Raises ValueError if the files hold something else than the preset says."""
        if not self.preset:
            return
        found, factors = describe_pretrained(self.path, **self._numerics)
        wanted = dataclasses.asdict(self.config)
        # Mistral 7B claims 32k tokens, which it reads through a sliding window of 4k; that it can do 8k is L here.
        differing = [
            f"{field} = {value} there, {wanted[field]} here"
            for field, value in dataclasses.asdict(found).items()
            if value != wanted[field] and not (field == "original_length" and value > wanted[field])
        ]
        if any(np.any(entry != 1) for entry in (factors.factors.lam, factors.factors.mscale)):
            differing.append("a context that is extended already")
        if differing:
            raise ValueError(f"path = {self.path!r} does not hold preset = {self.preset!r}: {', '.join(differing)}")

    @property
    def _numerics(self) -> dict[str, str]:
        return dict(dtype=self.dtype, param_dtype=self.param_dtype, attention=self.attention)

    @cached_property
    def _described(self) -> tuple[LlamaConfig, FactorTable]:
        if not self.preset:
            return describe_pretrained(self.path, **self._numerics)
        config = LlamaConfig.preset(self.preset, **self._numerics)
        return config, FactorTable.of({config.original_length: unscaled(config.head_dim)})


def _is_rising(lengths: tuple[int, ...]) -> bool:
    return len(lengths) > 0 and lengths[0] > 0 and list(lengths) == sorted(set(lengths))


@dataclass(frozen=True)
class TableSettings(Settings):
    """Which factors a sequence gets by its length.

    Attributes:
        lengths: boundaries, tokens.
        factors: for every boundary a search stage, the best seed that one started from ("search_best_seed"), a load
            stage for what the model came with, "original" for lam = 1, or a method that extends the model to it (up to
            the length that it was tuned at, any method means the factors it was tuned with).
        model: the stage whose model the factors are for; "" is the latest before this one.
    """

    lengths: Annotated[tuple[int, ...], Rule(_is_rising, "must be rising numbers of tokens")]
    factors: tuple[str, ...]
    model: str = ""

    def __post_init__(self):
        super().__post_init__()
        if len(self.factors) != len(self.lengths):
            raise ValueError(f"factors = {self.factors} must name one source for each of lengths = {self.lengths}")
