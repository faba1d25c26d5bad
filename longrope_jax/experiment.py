"""An experiment: a config's stages in order, each resumed where it stopped and skipped once it has finished.

A stage takes what the ones before it left in the work directory. Its name is its kind, with a suffix where a kind
occurs more than once (`search`, `search_64x`); the config section of the same name holds its settings.
"""

import json
from collections.abc import Callable, Container
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from longrope_jax import json_files
from longrope_jax.data.settings import DataSettings
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.interop import load_tokenizer
from longrope_jax.messages import beginning, shortened
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.attention import check_platform
from longrope_jax.model.sharding import check_mesh
from longrope_jax.report import summarize, summary_tables, write_report
from longrope_jax.runtime import lock, preemption, processes, profiling, storage
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.runtime.profiling import ProfileSettings
from longrope_jax.runtime.records import finite, flat, to_json, write_whole
from longrope_jax.settings import parse
from longrope_jax.stages import STAGES, Carried, LoadSettings, Stage, text


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
        if key not in needed | {"mesh", "profile"} and not text.is_text_section(key):
            raise ValueError(
                f"config.{key} is neither model, data, data_NAME, mesh, profile nor a stage in config.stages = "
                f"{tuple(stages)}"
            )
    for key in sorted(needed - set(config)):
        raise ValueError(f"config.{key} is missing")
    parsed: dict[str, Any] = {name: parse(STAGES[kind_of(name)].settings, config[name], name) for name in stages}
    experiment = Experiment(
        _model_config(stages[0], parsed[stages[0]]) if is_loaded else parse(LlamaConfig, config.model, "model"),
        text.parse_sections(config, _reads(parsed)),
        parse(MeshSettings, config.get("mesh", ConfigDict()), "mesh"),
        parse(ProfileSettings, config.get("profile", ConfigDict()), "profile"),
        parsed,
    )
    _naming_section("profile", experiment.profile.check_stages, tuple(stages))
    for name, settings in experiment.stages.items():
        _naming_section(name, _stage(name).check, settings, experiment.model, _before(experiment.stages, name))
    return experiment


def run(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Runs a config in a work directory, or what is left of it, and returns the path of the report."""
    with lock.hold(workdir):
        return execute(*prepare(config, workdir))


def prepare(config: ConfigDict, workdir: epath.PathLike) -> tuple[Experiment, Carried]:
    """Everything that can be checked before long work: the config, the devices, the work directory, the text.

    Call it, and `execute`, while `lock.hold` keeps others out of the work directory.

    Raises:
        ValueError: a bad config, unusable data, devices that don't fit, or a work directory in which a stage has begun
            with other settings; one line.
        OSError: the work directory can't be written to.
    """
    experiment = parse_experiment(config)
    storage.see_what_others_write()
    workdir = epath.Path(workdir)
    layout = _layout(experiment, workdir)
    _refuse_changed_stages(workdir, experiment)
    storage.make(workdir)
    tokenizer = _tokenizer(experiment)
    documents = text.read(experiment.data, _reads(experiment.stages), tokenizer, workdir)
    carried = Carried(Llama(experiment.model), layout, documents, tokenizer, workdir)
    for name, settings in experiment.stages.items():
        _naming_section(name, _stage(name).check_data, settings, carried)
    # Only now: a config that could not run must not keep a mended one out of its work directory.
    write_whole(workdir / "config.json", to_json(json.loads(config.to_json()), indent=1) + "\n")
    return experiment, carried


def reopen(config: ConfigDict, workdir: epath.PathLike) -> Carried:
    """What the finished stages of a work directory left, without its text and without doing anything.

    Raises:
        ValueError: a bad config, a work directory of another one, or one in which no model is finished.
    """
    storage.see_what_others_write()
    experiment, workdir = parse_experiment(config), epath.Path(workdir)
    _refuse_changed_stages(workdir, experiment)
    layout = Layout.of(experiment.mesh)
    carried = Carried(Llama(experiment.model), layout, {}, _tokenizer(experiment), workdir)
    for name, settings in experiment.stages.items():
        finished = _finished(workdir, name)
        if finished.exists():
            try:
                _stage(name).load(settings, carried, name, _summary(finished))
            except LookupError as error:
                raise ValueError(f"{finished}: {name} has lost what it left: {error.args[0]}") from None
    if not carried.trained:
        raise ValueError(f"work directory {workdir} has no finished stage of this config that makes a model")
    return carried


def execute(experiment: Experiment, carried: Carried) -> epath.Path:
    """Runs the stages that have not finished, writes the report and returns its path.

    Raises:
        preemption.Preempted: the process was asked to stop; finished stages are kept, and what the one under way saved.
    """
    workdir, seconds = carried.workdir, {}
    with preemption.watch(), carried.layout.active():
        for name in experiment.stages:
            if preemption.requested():
                raise preemption.Preempted(name, "the stages before it are finished")
            seconds[name] = _run_or_skip(name, experiment, carried)["seconds"]
    report = summarize(
        experiment.model, carried.evaluations, carried.retrievals, carried.searches, carried.exports, seconds
    )
    path = workdir / "report.md"
    if processes.is_first():
        write_report(workdir, experiment.model, report, carried.evaluations)
        print(f"\n{summary_tables(report)}report: {path}")
    return path


def _run_or_skip(name: str, experiment: Experiment, carried: Carried) -> dict[str, Any]:
    """The stage's summary; what it leaves is handed on."""
    settings, finished = experiment.stages[name], _finished(carried.workdir, name)
    if processes.any_of(finished.exists()):
        lost = None
        try:
            summary = _summary(finished)
            _stage(name).load(settings, carried, name, summary)
        except (LookupError, ValueError) as error:
            lost = " ".join(map(str, error.args))
        if not processes.any_of(lost is not None):
            _tell(f"{name}: finished before, skipped")
            return summary
        logging.warning("%s: finished before, but %s; running it again", name, lost)
    if processes.is_first():
        finished.parent.mkdir(exist_ok=True)
    write_whole(_begun(carried.workdir, name), to_json(_identity(name, experiment), indent=1) + "\n")
    processes.wait_for_all(f"{name} begins")
    with profiling.of_stage(experiment.profile, name, carried.workdir):
        summary = finite(_stage(name).run(settings, carried, name))
    write_whole(finished, to_json(summary, indent=1) + "\n")
    processes.wait_for_all(name)
    _stage(name).load(settings, carried, name, summary)
    return summary


def _layout(experiment: Experiment, workdir: epath.Path) -> Layout:
    """The devices, if the model and the stages that are still to run can be spread over them."""
    try:
        layout = Layout.of(experiment.mesh)
    except ValueError as error:
        raise ValueError(f"config.mesh: {beginning(error)}") from None
    check_layout(experiment, layout, {name for name in experiment.stages if not _finished(workdir, name).exists()})
    return layout


def check_layout(experiment: Experiment, layout: Layout, stages: Container[str]) -> None:
    """Raises ValueError if the model, or one of these stages, can't be spread over the devices."""
    first = next(iter(experiment.stages))
    described_in = first if isinstance(experiment.stages[first], LoadSettings) else "model"
    _naming_section(described_in, check_platform, experiment.model.attention, layout.platform)
    _naming_section("mesh", check_mesh, experiment.model, layout.shape, layout.platform)
    for name, settings in experiment.stages.items():
        if name in stages:
            _naming_section(name, _stage(name).check_layout, settings, experiment.model, layout)


def _naming_section(name: str, check: Callable, *arguments) -> None:
    """Runs a stage's check; what it has to say gets the name of the section that it is about."""
    try:
        check(*arguments)
    except ValueError as error:
        raise ValueError(f"config.{name}: {beginning(error)}") from None


def _refuse_changed_stages(workdir: epath.Path, experiment: Experiment) -> None:
    """A stage that has begun keeps its settings, its model, its text and the stages that it builds on; one that leaves
    nothing until it has finished is bound from then on.

    Others may change, come or go, and so may the mesh and what else is only about how devices do the work: it changes
    results by no more than the order of sums does.
    """
    differing = {}
    for name in experiment.stages:
        if _begun(workdir, name).exists() and (_stage(name).resumes or _finished(workdir, name).exists()):
            noted = json_files.read_object(_begun(workdir, name))
            for section in _settings_of(name, experiment):
                if not isinstance(noted.get(section, {}), dict):
                    raise ValueError(f"{_begun(workdir, name)} is damaged: {section} must be an object")
            there = flat(_as_if_now(noted, name, experiment))
            now = flat(json.loads(to_json(_identity(name, experiment))))
            for key in sorted(there.keys() | now.keys()):
                if there.get(key) != now.get(key):
                    before, after = (shortened(which.get(key, "absent"), 300) for which in (there, now))
                    differing[key] = f"{before} there, {after} now"
    if differing:
        told = beginning(", ".join(f"{key} ({values})" for key, values in differing.items()))
        raise ValueError(f"work directory {workdir} has stages of another config; differing: {told}")


def _identity(name: str, experiment: Experiment) -> dict[str, Any]:
    """All that the results of a stage depend on, with the names that fields have in a config."""
    sections = {section: _what(asdict(settings)) for section, settings in _settings_of(name, experiment).items()}
    inputs = _stage(name).inputs(experiment.stages[name], _before(experiment.stages, name))
    return sections | {f"stages before {name}": inputs}


def _settings_of(name: str, experiment: Experiment) -> dict[str, Any]:
    """The sections that a stage depends on: the model's, its own, and that of the text if it reads any."""
    settings = experiment.stages[name]
    text_section = {settings.data: experiment.data[settings.data]} if _stage(name).splits(settings) else {}
    return {"model": experiment.model, **text_section, name: settings}


def _as_if_now(begun: dict[str, Any], name: str, experiment: Experiment) -> dict[str, Any]:
    """What an earlier version noted of a stage, as this one would have: fields that it did not have are at their
    defaults, and text that the stage does not read (there was one section, which all noted) is none of its matters.
    """
    sections = _settings_of(name, experiment)
    known = {key: value for key, value in begun.items() if key in sections or not text.is_text_section(key)}
    for section, settings in sections.items():
        if section in known:
            known[section] = _what(_filled_up(known[section], _defaults(type(settings))))
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


def _what(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of a section but those about how devices do the work, which may change with the mesh."""
    # A race and a descent go from one block of documents to the next, so what they find depends on these.
    goes_by_blocks = settings.get("racing") or settings.get("method") in ("gradient", "hybrid")
    how = _HOW - {"documents_at_once"} if goes_by_blocks else _HOW
    return {
        field: _what(value) if isinstance(value, dict) else value
        for field, value in settings.items()
        if field not in how and (field not in _GONE or value != _GONE[field])
    }


_HOW = {"attention", "accumulate", "remat"} | {
    f"{what}_at_once" for what in ("candidates", "documents", "prompts", "tokens")
}

_GONE = {"islands": 1}
"""Fields of earlier versions, with the value at which they did what is done without them."""

_ONCE = {"mutation": "redraw", "proposals": 1}
"""Fields with the value that was in effect before they were there, where that is not the default now."""


def _summary(finished: epath.Path) -> dict[str, Any]:
    """What a stage that has finished tells of itself."""
    return json_files.read_object(finished, {"seconds": float})


def _begun(workdir: epath.Path, name: str) -> epath.Path:
    return workdir / "stages" / f"{name}.begun.json"


def _finished(workdir: epath.Path, name: str) -> epath.Path:
    return workdir / "stages" / f"{name}.json"


def _before(stages: dict[str, Any], name: str) -> dict[str, Any]:
    """The stages that come before one."""
    names = list(stages)
    return {earlier: stages[earlier] for earlier in names[: names.index(name)]}


def _model_config(name: str, settings: LoadSettings) -> LlamaConfig:
    """The architecture of the model that a load stage names."""
    try:
        return settings.config
    except (ValueError, OSError) as error:
        raise ValueError(f"config.{name}: {beginning(error)}") from None


def _tokenizer(experiment: Experiment) -> Tokenizer:
    """The first stage's: the model that it loads came with one, a model from scratch reads bytes."""
    name, settings = next(iter(experiment.stages.items()))
    if not isinstance(settings, LoadSettings):
        return ByteTokenizer()
    try:
        return load_tokenizer(settings.path)
    except (ValueError, OSError) as error:
        raise ValueError(f"config.{name}: {beginning(error)}") from None


def _reads(stages: dict[str, Any]) -> text.Reads:
    """What text the stages read."""
    return {name: (s.data, _stage(name).splits(s)) for name, s in stages.items() if hasattr(s, "data")}


def _tell(line: str) -> None:
    if processes.is_first():
        print(line)


def kind_of(name: str) -> str:
    """The kind of a stage, from its name."""
    return str(name).split("_")[0]


def _stage(name: str) -> Stage:
    return STAGES[kind_of(name)]
