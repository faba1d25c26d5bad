"""What a kind of stage is, and the names by which a stage's settings refer to the stages before it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from longrope_jax.interop import describe_pretrained
from longrope_jax.model import LlamaConfig
from longrope_jax.model.attention import BACKENDS
from longrope_jax.model.config import FLOAT_TYPES, PRESETS
from longrope_jax.rope import METHODS, FactorTable, unscaled
from longrope_jax.search.settings import SearchSettings
from longrope_jax.stages.carried import BEST_SEED, ORIGINAL
from longrope_jax.training.loop import LoopSettings


@dataclass(frozen=True)
class LoadSettings:
    """Whose pretrained model, and how to compute with it. As the first stage it also gives the tokenizer.

    Attributes:
        path: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a GGUF file. The architecture and the
            rotation come from there; the stage's name is a source of factors, those by length that it came with.
        dtype: of activations and matrix products.
        param_dtype: of parameters, whatever the files have.
        attention: backend, see `model/attention.py`.
        preset: name of the architecture that the files must hold, see `LlamaConfig.preset`, in its original length;
            nothing is read from them before they are needed. "" takes what they hold.
    """

    path: str
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "auto"
    preset: str = ""

    def __post_init__(self):
        if not self.path:
            raise ValueError("path is empty; give a Hugging Face folder or a .gguf file")
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset!r} must be one of {', '.join(PRESETS)}, or ''")
        for name, known in (("dtype", FLOAT_TYPES), ("param_dtype", FLOAT_TYPES), ("attention", BACKENDS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} must be one of {', '.join(known)}")

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


@dataclass(frozen=True)
class TableSettings:
    """Which factors a sequence gets by its length.

    Attributes:
        lengths: boundaries, tokens.
        factors: for every boundary a search stage, the best seed that one started from ("search_best_seed"), a load
            stage for what the model came with, "original" for lam = 1, or a method that extends the model to it (up to
            the length that it was tuned at, any method means the factors it was tuned with).
        model: the stage whose model the factors are for; "" is the latest before this one.
    """

    lengths: tuple[int, ...]
    factors: tuple[str, ...]
    model: str = ""

    def __post_init__(self):
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ValueError(f"lengths = {self.lengths} must be rising numbers of tokens")
        if len(self.factors) != len(self.lengths):
            raise ValueError(f"factors = {self.factors} must name one source for each of lengths = {self.lengths}")


Before = dict[str, Any]
"""The settings of the stages before one, by name."""


@dataclass(frozen=True)
class Stage:
    """A kind of stage.

    Attributes:
        settings: the class of its settings.
        check: (settings, model config, settings of the stages before) -> None, raises if they don't go together.
        check_data: (settings, carried) -> None, raises if the text does not suffice.
        check_layout: (settings, model config, layout) -> None, raises if the work can't be spread over the devices.
        run: (settings, carried, name) -> summary, JSON-able, with its seconds; leaves the stage's results on disk.
        load: (settings, carried, name, summary) -> None, hands the results on, whether the stage has just run or did
            so before. Raises LookupError if they are not there any more.
        inputs: (settings, settings of the stages before) -> names of the stages whose results it takes.
        splits: settings -> which splits it reads of the text that `settings.data` names.
        programs: (settings, model config, layout) -> what it runs again and again, see `stages/programs.py`.
        resumes: whether it goes on from what it has left behind when it was stopped, rather than begin again.
    """

    settings: type
    check: Callable
    check_data: Callable
    check_layout: Callable
    run: Callable
    load: Callable
    inputs: Callable
    splits: Callable = lambda settings: ()
    programs: Callable = lambda settings, config, layout: ()
    resumes: bool = True


def model_stage(name: str, before: Before, field_name: str = "model") -> str:
    """The stage before that `name` means, as `Carried.model_stage` finds it later.

    Raises:
        ValueError: it names none that makes parameters.
    """
    makers = [stage for stage, settings in before.items() if isinstance(settings, LoopSettings | LoadSettings)]
    if name and name not in makers:
        raise ValueError(
            f"{field_name} = {name!r} is no stage before this one that makes parameters; those are {', '.join(makers)}"
        )
    return name or makers[-1]


def factors_target(source: str, before: Before, field_name: str, *, more: tuple[str, ...] = ()) -> int | None:
    """The length up to which a source of factors is good; None for a method, which is good for any.

    Args:
        more: sources that are allowed besides stages, methods and the original rotation.

    Raises:
        ValueError: there is no such source.
    """
    settings = before.get(_made_by(source, before))
    if isinstance(settings, SearchSettings):
        return settings.target_length
    if isinstance(settings, TableSettings):
        return settings.lengths[-1]
    if isinstance(settings, LoadSettings):
        return int(settings.factors.boundaries[-1])
    if source in METHODS or source in (ORIGINAL, *more):
        return None
    stages = [name for name, s in before.items() if isinstance(s, SearchSettings | TableSettings | LoadSettings)]
    known = ", ".join([*stages, *METHODS, ORIGINAL, *more])
    raise ValueError(
        f"{field_name} = {source!r} is neither a search, table or load stage before this one nor one of {known}"
    )


def sources(names: tuple[str, ...], before: Before) -> list[str]:
    """The stages that make these sources of factors."""
    return [_made_by(name, before) for name in names if is_stage(name, before)]


def is_stage(source: str, before: Before) -> bool:
    """Whether a source of factors is what a stage before makes."""
    return _made_by(source, before) in before


def _made_by(source: str, before: Before) -> str:
    return source if source in before else source.removesuffix(BEST_SEED)


def nothing(*_) -> None:
    """The check of a stage that has nothing to check."""
