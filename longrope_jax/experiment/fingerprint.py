"""What the results of a stage depend on, kept beside them: a work directory refuses to mix them with others."""

import json
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from etils import epath

from longrope_jax import json_files
from longrope_jax.errors import beginning, shortened
from longrope_jax.experiment import text
from longrope_jax.experiment.config import Experiment, before, stage_of
from longrope_jax.runtime.records import flat, to_json
from longrope_jax.search.settings import METHODS, SearchSettings


def refuse_changed_stages(workdir: epath.Path, experiment: Experiment) -> None:
    """Raises ValueError where a config would change a stage of a work directory.

    A stage that has begun keeps its settings, its model, its text and the stages that it builds on; one that leaves
    nothing until it has finished is bound from then on.

    Others may change, come or go, and so may the mesh and what else is only about how devices do the work: it changes
    results by no more than the order of sums does.
    """
    differing = {}
    for name in experiment.stages:
        if begun_file(workdir, name).exists() and (stage_of(name).resumes or finished_file(workdir, name).exists()):
            noted = json_files.read_object(begun_file(workdir, name))
            for section in _settings_of(name, experiment):
                if not isinstance(noted.get(section, {}), dict):
                    raise ValueError(f"{begun_file(workdir, name)} is damaged: {section} must be an object")
            there = flat(_as_if_now(noted, name, experiment))
            now = flat(json.loads(to_json(identity(name, experiment))))
            for key in sorted(there.keys() | now.keys()):
                if there.get(key) != now.get(key):
                    old, new = (shortened(which.get(key, "absent")) for which in (there, now))
                    differing[key] = f"{old} there, {new} now"
    if differing:
        told = beginning(", ".join(f"{key} ({values})" for key, values in differing.items()))
        raise ValueError(f"work directory {workdir} has stages of another config; differing: {told}")


def identity(name: str, experiment: Experiment) -> dict[str, Any]:
    """All that the results of a stage depend on, with the names that fields have in a config."""
    sections = {
        section: _what(asdict(settings), settings) for section, settings in _settings_of(name, experiment).items()
    }
    inputs = stage_of(name).inputs(experiment.stages[name], before(experiment.stages, name))
    return sections | {f"stages before {name}": inputs}


def _settings_of(name: str, experiment: Experiment) -> dict[str, Any]:
    """The sections that a stage depends on: the model's, its own, and that of the text if it reads any."""
    settings = experiment.stages[name]
    text_section = {settings.data: experiment.data[settings.data]} if stage_of(name).splits(settings) else {}
    return {"model": experiment.model, **text_section, name: settings}


def _as_if_now(begun: dict[str, Any], name: str, experiment: Experiment) -> dict[str, Any]:
    """What an earlier version noted of a stage, as this one would have: fields that it did not have are at their
    defaults, and text that the stage does not read (there was one section, which all noted) is none of its matters.
    """
    sections = _settings_of(name, experiment)
    known = {key: value for key, value in begun.items() if key in sections or not text.is_text_section(key)}
    for section, settings in sections.items():
        if section in known:
            known[section] = _what(_filled_up(known[section], _defaults(type(settings))), settings)
    return known


def _defaults(settings: type) -> dict[str, Any]:
    """Of the fields that have one."""
    made = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    return made | {f.name: f.default_factory() for f in fields(settings) if f.default_factory is not MISSING}


def _filled_up(known: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What is known, and the defaults of what is not, sections within included; not entries that a config names."""
    filled = dict(known)
    for name, value in defaults.items():
        if name not in known:
            filled[name] = json.loads(to_json(_plain(_ONCE.get(name, value))))
        elif is_dataclass(value) and isinstance(known[name], dict):
            filled[name] = _filled_up(known[name], {field.name: getattr(value, field.name) for field in fields(value)})
    return filled


def _plain(value: Any) -> Any:
    """A value of a field, its sections as dicts."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _what(fields: dict[str, Any], settings: Any) -> dict[str, Any]:
    """The fields of a section but those about how devices do the work, which may change with the mesh, and those that
    the settings of now make no use of.
    """
    if isinstance(settings, SearchSettings):
        unused = {section for used in METHODS.values() for section in used} - set(METHODS[settings.method])
        fields = {field: value for field, value in fields.items() if field not in unused}
    # A race and a descent go from one block of documents to the next, so what they find depends on these.
    goes_by_blocks = fields.get("racing") or fields.get("method") in ("gradient", "hybrid")
    how = _HOW - {"documents_at_once"} if goes_by_blocks else _HOW
    return {
        field: _what(value, None) if isinstance(value, dict) else value
        for field, value in fields.items()
        if field not in how and (field not in _GONE or value != _GONE[field])
    }


_HOW = {"attention", "accumulate", "remat"} | {
    f"{what}_at_once" for what in ("candidates", "documents", "prompts", "tokens")
}


_GONE = {"islands": 1}
"""Fields of earlier versions, with the value at which they did what is done without them."""


_ONCE = {"mutation": "redraw", "proposals": 1}
"""Fields with the value that was in effect before they were there, where that is not the default now."""


def begun_file(workdir: epath.Path, name: str) -> epath.Path:
    """Where the identity of a stage that has begun is."""
    return workdir / "stages" / f"{name}.begun.json"


def finished_file(workdir: epath.Path, name: str) -> epath.Path:
    """Where a stage that has finished tells of itself."""
    return workdir / "stages" / f"{name}.json"
