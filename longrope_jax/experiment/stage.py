"""A kind of stage, and how the settings of a stage refer to earlier stages: by the names of models and factors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longrope_jax.experiment.context import BEST_SEED, ORIGINAL
from longrope_jax.experiment.stages.settings import LoadSettings, TableSettings
from longrope_jax.rope import METHODS
from longrope_jax.search.settings import SearchSettings
from longrope_jax.training.loop import LoopSettings


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A kind of stage. Checks that are left out accept everything.

    Attributes:
        settings: the class of its settings.
        check: (settings, model config, settings of earlier stages) -> None. Raises ValueError if they do not fit.
        check_data: (settings, context) -> None. Raises ValueError if the text is too short.
        check_layout: (settings, model config, layout) -> None. Raises ValueError if the mesh does not fit.
        run: (settings, context, name) -> summary for JSON, with its seconds. Writes the results to disk.
        load: (settings, context, name, summary) -> None. Adds the results on disk to the context. Raises LookupError if
            they are missing.
        inputs: (settings, settings of earlier stages) -> names of the stages whose results it uses.
        splits: settings -> the splits it reads of the text section `settings.data`.
        programs: (settings, model config, layout) -> the programs that it compiles, see `experiment/stage_programs.py`.
        resumes: whether a stopped stage continues from its checkpoint. Otherwise it starts again.
    """

    settings: type
    check: Callable = lambda settings, config, before: None
    check_data: Callable = lambda settings, context: None
    check_layout: Callable = lambda settings, config, layout: None
    run: Callable
    load: Callable
    inputs: Callable = lambda settings, before: []
    splits: Callable = lambda settings: ()
    programs: Callable = lambda settings, config, layout: ()
    resumes: bool = True


Before = dict[str, Any]
"""The settings of the earlier stages, by name."""


def model_stage(name: str, before: Before, field_name: str = "model") -> str:
    """The stage before that `name` means, as `RunContext.model_stage` finds it later.

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
