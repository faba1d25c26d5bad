"""A config, checked: which stages there are, with which settings, on which model and text."""

import contextlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from longrope_jax.data.corpus import DataSettings
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.errors import beginning, shortened
from longrope_jax.experiment import text_sections
from longrope_jax.experiment.stages import STAGES, LoadSettings, Stage
from longrope_jax.interop import load_tokenizer
from longrope_jax.model import LlamaConfig
from longrope_jax.model.attention import check_platform
from longrope_jax.model.sharding import check_mesh
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.runtime.profiling import ProfileSettings
from longrope_jax.settings import parse


@dataclass(frozen=True)
class Experiment:
    """A config, checked.

    Attributes:
        model: the architecture.
        data: the sections of text, by name.
        mesh: how devices share the work.
        profile: which steps are traced.
        stages: settings of every stage by its name, in order.
    """

    model: LlamaConfig
    data: dict[str, DataSettings]
    mesh: MeshSettings
    profile: ProfileSettings
    stages: dict[str, Any]


def parse_experiment(config: ConfigDict) -> Experiment:
    """Checks a config without touching data, devices or the work directory; a model's own description is read.

    Raises:
        ValueError: one line that names the field and what is wrong with it.
    """
    stages = config.get("stages")
    if not isinstance(stages, tuple | list) or not stages:
        raise ValueError(
            f"config.stages = {shortened(stages)} must name the stages in order, e.g. ('pretrain', 'search')"
        )
    for name in stages:
        if kind_of(name) not in STAGES:
            raise ValueError(f"config.stages: {shortened(name)} is of no known kind; kinds are {', '.join(STAGES)}")
    if len(set(stages)) < len(stages):
        raise ValueError(
            f"config.stages = {shortened(tuple(stages))} names a stage twice; give the second one a suffix"
        )
    if kind_of(stages[0]) not in ("pretrain", "load"):
        raise ValueError(f"config.stages: {stages[0]!r} can't come first, it needs a model's parameters")
    is_loaded = kind_of(stages[0]) == "load"
    if is_loaded and "model" in config:
        raise ValueError(f"config.model: the model is the one that config.{stages[0]}.path holds; leave it out")
    needed = {"stages", *stages} if is_loaded else {"stages", "model", *stages}
    for key in config:
        if key not in needed | {"mesh", "profile"} and not text_sections.is_text_section(key):
            raise ValueError(
                f"config.{beginning(key)} is neither model, data, data_NAME, mesh, profile nor a stage in "
                f"config.stages = {tuple(stages)}"
            )
    for key in sorted(needed - set(config)):
        raise ValueError(f"config.{key} is missing")
    parsed: dict[str, Any] = {name: parse(STAGES[kind_of(name)].settings, config[name], name) for name in stages}
    with naming_section(stages[0]):
        loaded = parsed[stages[0]].config if is_loaded else None
    experiment = Experiment(
        loaded or parse(LlamaConfig, config.model, "model"),
        text_sections.parse_sections(config, reads(parsed)),
        parse(MeshSettings, config.get("mesh", ConfigDict()), "mesh"),
        parse(ProfileSettings, config.get("profile", ConfigDict()), "profile"),
        parsed,
    )
    with naming_section("profile"):
        experiment.profile.check_stages(tuple(stages))
    for name, settings in experiment.stages.items():
        with naming_section(name):
            stage_of(name).check(settings, experiment.model, before(experiment.stages, name))
    return experiment


def check_layout(experiment: Experiment, layout: Layout, stages: Container[str]) -> None:
    """Raises ValueError if the model, or one of these stages, can't be spread over the devices."""
    first = next(iter(experiment.stages))
    with naming_section(first if isinstance(experiment.stages[first], LoadSettings) else "model"):
        check_platform(experiment.model.attention, layout.platform)
    with naming_section("mesh"):
        check_mesh(experiment.model, layout.shape, layout.platform)
    for name, settings in experiment.stages.items():
        if name in stages:
            with naming_section(name):
                stage_of(name).check_layout(settings, experiment.model, layout)


@contextlib.contextmanager
def naming_section(name: str) -> Iterator[None]:
    """Turns errors of a check into a ValueError of one line that begins with the name of the config section."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"config.{name}: {beginning(error)}") from None


def before(stages: dict[str, Any], name: str) -> dict[str, Any]:
    """The stages that come before one."""
    names = list(stages)
    return {earlier: stages[earlier] for earlier in names[: names.index(name)]}


def tokenizer_of(experiment: Experiment) -> Tokenizer:
    """The first stage's: the model that it loads came with one, a model from scratch reads bytes.

    Raises:
        ValueError: the model's can't be read, or has no BOS where the stage wants one.
    """
    name, settings = next(iter(experiment.stages.items()))
    if not isinstance(settings, LoadSettings):
        return ByteTokenizer()
    with naming_section(name):
        tokenizer = load_tokenizer(settings.path)
        if settings.bos == "windows" and tokenizer.bos is None:
            raise ValueError(f"bos = 'windows' needs a tokenizer with a BOS token; that of {settings.path!r} has none")
        if settings.bos != "auto":
            tokenizer.window_bos = tokenizer.bos if settings.bos == "windows" else None
        return tokenizer


def reads(stages: dict[str, Any]) -> text_sections.Reads:
    """What text the stages read."""
    return {name: (s.data, stage_of(name).splits(s)) for name, s in stages.items() if hasattr(s, "data")}


def kind_of(name: str) -> str:
    """The kind of a stage, from its name."""
    return str(name).split("_")[0]


def stage_of(name: str) -> Stage:
    """What stages of its kind do."""
    return STAGES[kind_of(name)]
