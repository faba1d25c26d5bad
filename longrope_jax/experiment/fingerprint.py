"""The fingerprint of a stage: everything its result depends on. A work directory refuses to mix two of them."""

import json
from dataclasses import asdict
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from longrope_jax import json_files
from longrope_jax.errors import beginning, shortened
from longrope_jax.experiment.config import Experiment, before, stage_of
from longrope_jax.experiment.context import finished_file, started_file
from longrope_jax.search.settings import METHODS, SearchSettings

FORMAT = 1
"""Version of the files in a work directory. It is a part of every fingerprint, so another version is refused."""
_DEVICE_FIELDS = {"attention", "accumulate", "remat"} | {
    f"{what}_at_once" for what in ("candidates", "documents", "prompts", "tokens")
}
"""Fields that say how devices do the work. They may change with the mesh: results differ by the order of sums only."""


def check_fingerprints(workdir: epath.Path, experiment: Experiment) -> None:
    """Refuses a config that would change a stage of a work directory.

    A stage that has started keeps its settings, its model, its text and its input stages. A stage that can't be resumed
    keeps them once it has finished. Other stages, the mesh and fields about devices may change.

    Raises:
        ValueError: names every field that differs, with both values.
    """
    differing = {}
    for name in experiment.stages:
        path = started_file(workdir, name)
        if not path.exists() or not (stage_of(name).resumes or finished_file(workdir, name).exists()):
            continue
        stored = flatten_dict(json_files.read_object(path), sep=".")
        current = flatten_dict(json.loads(json_files.to_json(fingerprint(name, experiment))), sep=".")
        for key in sorted(stored.keys() | current.keys()):
            if stored.get(key) != current.get(key):
                old, new = (shortened(fields.get(key, "absent")) for fields in (stored, current))
                differing[key] = f"{old} there, {new} now"
    if differing:
        fields = beginning(", ".join(f"{key} ({values})" for key, values in differing.items()))
        raise ValueError(f"work directory {workdir} has stages of another config; differing: {fields}")


def fingerprint(name: str, experiment: Experiment) -> dict[str, Any]:
    """Everything a stage's result depends on, keyed by config field."""
    settings = experiment.stages[name]
    stage = stage_of(name)
    sections = {"model": experiment.model, name: settings}
    if stage.splits(settings):
        sections[settings.data] = experiment.data[settings.data]
    inputs = stage.inputs(settings, before(experiment.stages, name))
    return {
        "format": FORMAT,
        **{section: _relevant(asdict(fields), fields) for section, fields in sections.items()},
        f"stages before {name}": inputs,
    }


def _relevant(fields: dict[str, Any], settings: Any) -> dict[str, Any]:
    """The fields that change a result: not those about devices, nor sections of a search that its method ignores."""
    ignored = set(_DEVICE_FIELDS)
    if isinstance(settings, SearchSettings):
        ignored |= {section for used in METHODS.values() for section in used} - set(METHODS[settings.method])
    # A race and a gradient search read one block of documents after the other: the size of a block matters.
    if fields.get("racing") or fields.get("method") in ("gradient", "hybrid"):
        ignored.remove("documents_at_once")
    return {
        field: _relevant(value, None) if isinstance(value, dict) else value
        for field, value in fields.items()
        if field not in ignored
    }
