"""The names by which a stage's settings refer to the stages before it: whose parameters, whose factors."""

from typing import Any

from longrope_jax.rope import METHODS
from longrope_jax.search.settings import SearchSettings
from longrope_jax.stages.carried import BEST_SEED, ORIGINAL
from longrope_jax.stages.settings import LoadSettings, TableSettings
from longrope_jax.training.loop import LoopSettings

Before = dict[str, Any]
"""The settings of the stages before one, by name."""


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
