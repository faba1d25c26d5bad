"""An experiment: a config's stages in order, each resumed where it stopped and skipped once it has finished.

A stage takes what the ones before it left in the work directory. Its name is its kind, with a suffix where a kind
occurs more than once (`search`, `search_64x`); the config section of the same name holds its settings.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from longrope_jax.data import corpus
from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.report import summarize, summary_table, write_report
from longrope_jax.runtime.records import finite, to_json, write_whole
from longrope_jax.settings import parse
from longrope_jax.stages import STAGES, Carried, Stage


@dataclass(frozen=True)
class DataSettings:
    """Which text.

    Attributes:
        folder: a folder of text files, or "" for the embedded corpus, the standard library's sources.
        suffix: ending that a file's name must have; "" takes every text file of the folder.
    """

    folder: str = ""
    suffix: str = ""

    def __post_init__(self):
        if self.suffix and not self.folder:
            raise ValueError(f"suffix = {self.suffix!r} needs a folder; the embedded corpus has its own")


@dataclass(frozen=True)
class Experiment:
    """A config, checked."""

    model: LlamaConfig
    data: DataSettings
    stages: dict[str, Any]


def parse_experiment(config: ConfigDict) -> Experiment:
    """Checks a config without touching data or the work directory.

    Raises:
        ValueError: one line that names the field and what is wrong with it.
    """
    stages = config.get("stages")
    if not isinstance(stages, tuple | list) or not stages:
        raise ValueError(f"config.stages = {stages!r} must name the stages in order, e.g. ('pretrain', 'search')")
    kinds = {}
    for name in stages:
        kinds[name] = str(name).split("_")[0]
        if kinds[name] not in STAGES:
            raise ValueError(f"config.stages: {name!r} is of no known kind; kinds are {', '.join(STAGES)}")
    for kind in STAGES:
        alike = [name for name in stages if kinds[name] == kind]
        if len(alike) > 1 and not STAGES[kind].repeatable:
            raise ValueError(f"config.stages = {tuple(stages)}: an experiment can have one {kind} stage")
    if len(kinds) < len(stages):
        raise ValueError(f"config.stages = {tuple(stages)} names a stage twice; give the second one a suffix")
    if not STAGES[kinds[stages[0]]].makes_params:
        raise ValueError(f"config.stages: {stages[0]!r} can't come first, it needs a model's parameters")
    known = {"stages", "model", "data", *kinds}
    for key in config:
        if key not in known:
            raise ValueError(f"config.{key} is neither model, data nor a stage in config.stages = {tuple(stages)}")
    for key in sorted(known - set(config)):
        raise ValueError(f"config.{key} is missing")
    experiment = Experiment(
        parse(LlamaConfig, config.model, "model"),
        parse(DataSettings, config.data, "data"),
        {name: parse(STAGES[kind].settings, config[name], name) for name, kind in kinds.items()},
    )
    for index, (name, settings) in enumerate(experiment.stages.items()):
        before = list(experiment.stages.values())[:index]
        _naming_section(name, _stage(name).check, settings, experiment.model, before)
    return experiment


def run(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Runs a config in a work directory, or what is left of it, and returns the path of the report."""
    return execute(*prepare(config, workdir))


def prepare(config: ConfigDict, workdir: epath.PathLike) -> tuple[Experiment, Carried]:
    """Everything that can be checked before long work: the config, the work directory, the text.

    Raises:
        ValueError: a bad config, unusable data, or a work directory of another config; one line.
        OSError: the work directory can't be written to.
    """
    experiment = parse_experiment(config)
    workdir = epath.Path(workdir)
    _refuse_other_config(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"work directory {workdir} can't be made: {error}") from None
    carried = Carried(Llama(experiment.model), _documents(experiment.data, workdir), workdir)
    try:
        for name, settings in experiment.stages.items():
            _naming_section(name, _stage(name).check_data, settings, experiment.model, carried.documents)
    except ValueError:
        if not (workdir / "config.json").exists():
            (workdir / "data").rmtree()  # so that a mended folder is looked at again
        raise
    # Only now: a config that could not run must not keep a mended one out of its work directory.
    write_whole(workdir / "config.json", to_json(json.loads(config.to_json()), indent=1) + "\n")
    return experiment, carried


def execute(experiment: Experiment, carried: Carried) -> epath.Path:
    """Runs the stages that have not finished, writes the report and returns its path."""
    workdir, seconds = carried.workdir, {}
    for name, settings in experiment.stages.items():
        finished = workdir / "stages" / f"{name}.json"
        if finished.exists():
            print(f"{name}: finished before, skipped")
            summary = json.loads(finished.read_text())
        else:
            summary = finite(_stage(name).run(settings, carried, name))
            finished.parent.mkdir(exist_ok=True)
            write_whole(finished, to_json(summary, indent=1) + "\n")
        seconds[name] = summary["seconds"]
        _stage(name).load(carried, name, summary)
    report = summarize(experiment.model, carried.evaluation, carried.searches, seconds)
    path = write_report(workdir, experiment.model, report, carried.evaluation)
    print(f"\nPerplexity by window length\n{summary_table(report)}\nreport: {path}")
    return path


def _naming_section(name: str, check: Callable, *arguments) -> None:
    """Runs a stage's check; what it has to say gets the name of the section that it is about."""
    try:
        check(*arguments)
    except ValueError as error:
        raise ValueError(f"config.{name}: {error}") from None


def _refuse_other_config(workdir: epath.Path, config: ConfigDict) -> None:
    path = workdir / "config.json"
    if not path.exists():
        return
    there, now = _flat(json.loads(path.read_text())), _flat(json.loads(config.to_json()))
    differing = [
        f"{key} ({there.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} now)"
        for key in sorted(there.keys() | now.keys())
        if there.get(key) != now.get(key)
    ]
    if differing:
        raise ValueError(f"work directory {workdir} belongs to another config; differing: {', '.join(differing)}")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def _documents(settings: DataSettings, workdir: epath.Path) -> dict[str, list[Document]]:
    source = corpus.folder_config(settings.folder, settings.suffix) if settings.folder else corpus.stdlib_config()
    builder = corpus.build(source, workdir / "data")
    return {split: corpus.documents(builder, split, ByteTokenizer()) for split in corpus.SPLITS}


def _stage(name: str) -> Stage:
    return STAGES[name.split("_")[0]]
