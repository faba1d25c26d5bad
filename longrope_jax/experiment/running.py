"""Runs a config in a work directory: its stages in order, resumed where they stopped, skipped where they finished."""

import json
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from longrope_jax import files, json_files
from longrope_jax.experiment import text_sections
from longrope_jax.experiment.config import (
    Experiment,
    check_layout,
    naming_section,
    parse_experiment,
    reads,
    stage_of,
    tokenizer_of,
)
from longrope_jax.experiment.context import RunContext, finished_file, started_file
from longrope_jax.experiment.fingerprint import check_fingerprints, fingerprint
from longrope_jax.model import Llama
from longrope_jax.report import summarize, summary_tables, write_report
from longrope_jax.runtime import lock, preemption, processes, profiling
from longrope_jax.runtime.mesh import Layout
from longrope_jax.runtime.processes import write_json


def run(config: ConfigDict, workdir: epath.PathLike) -> epath.Path:
    """Runs a config in a work directory, or what is left of it, and returns the path of the report."""
    with lock.hold(workdir):
        return execute(*prepare(config, workdir))


def prepare(config: ConfigDict, workdir: epath.PathLike) -> tuple[Experiment, RunContext]:
    """Everything that can be checked before long work: the config, the devices, the work directory, the text.

    Call it, and `execute`, while `lock.hold` keeps others out of the work directory.

    Raises:
        ValueError: a bad config, unusable data, devices that don't fit, or a work directory in which a stage started
            with other settings; one line.
        OSError: the work directory can't be written to.
    """
    experiment = parse_experiment(config)
    files.see_what_others_write()
    workdir = epath.Path(workdir)
    layout = _layout(experiment, workdir)
    check_fingerprints(workdir, experiment)
    files.make(workdir)
    tokenizer = tokenizer_of(experiment)
    documents = text_sections.read(experiment.data, reads(experiment.stages), tokenizer, workdir)
    context = RunContext(Llama(experiment.model), layout, documents, tokenizer, workdir)
    for name, settings in experiment.stages.items():
        with naming_section(name):
            stage_of(name).check_data(settings, context)
    # Only now: a config that could not run must not keep a mended one out of its work directory.
    write_json(workdir / "config.json", json.loads(config.to_json()))
    return experiment, context


def reopen(config: ConfigDict, workdir: epath.PathLike) -> RunContext:
    """What the finished stages of a work directory left, without its text and without doing anything.

    Raises:
        ValueError: a bad config, a work directory of another one, or one in which no model is finished.
    """
    files.see_what_others_write()
    experiment, workdir = parse_experiment(config), epath.Path(workdir)
    check_fingerprints(workdir, experiment)
    layout = Layout.of(experiment.mesh)
    context = RunContext(Llama(experiment.model), layout, {}, tokenizer_of(experiment), workdir)
    for name, settings in experiment.stages.items():
        finished = finished_file(workdir, name)
        if finished.exists():
            try:
                stage_of(name).load(settings, context, name, _summary(finished))
            except LookupError as error:
                raise ValueError(f"{finished}: {name} lost its results: {error.args[0]}") from None
    if not context.trained:
        raise ValueError(f"work directory {workdir} has no finished stage of this config that makes a model")
    return context


def execute(experiment: Experiment, context: RunContext) -> epath.Path:
    """Runs the stages that have not finished, writes the report and returns its path.

    Raises:
        preemption.Preempted: the process was asked to stop; finished stages and the last checkpoint are saved.
    """
    workdir, seconds = context.workdir, {}
    with preemption.watch(), context.layout.active():
        for name in experiment.stages:
            if preemption.requested():
                raise preemption.Preempted(name, "the stages before it are finished")
            seconds[name] = _run_or_skip(name, experiment, context)["seconds"]
    report = summarize(
        experiment.model, context.evaluations, context.retrievals, context.searches, context.exports, seconds
    )
    path = workdir / "report.md"
    if processes.is_first():
        write_report(workdir, experiment.model, report, context.evaluations)
        print(f"\n{summary_tables(report)}report: {path}")
    return path


def _run_or_skip(name: str, experiment: Experiment, context: RunContext) -> dict[str, Any]:
    """Runs a stage, or loads it if it has finished. Returns its summary."""
    settings, finished = experiment.stages[name], finished_file(context.workdir, name)
    if processes.any_of(finished.exists()):
        lost = None
        try:
            summary = _summary(finished)
            stage_of(name).load(settings, context, name, summary)
        except (LookupError, ValueError) as error:
            lost = " ".join(map(str, error.args))
        if not processes.any_of(lost is not None):
            if processes.is_first():
                print(f"{name}: finished before, skipped")
            return summary
        logging.warning("%s: finished before, but %s; running it again", name, lost)
    if processes.is_first():
        finished.parent.mkdir(exist_ok=True)
    write_json(started_file(context.workdir, name), fingerprint(name, experiment))
    processes.wait_for_all(f"{name} begins")
    with profiling.of_stage(experiment.profile, name, context.workdir):
        summary = json_files.finite(stage_of(name).run(settings, context, name))
    write_json(finished, summary)
    processes.wait_for_all(name)
    stage_of(name).load(settings, context, name, summary)
    return summary


def _layout(experiment: Experiment, workdir: epath.Path) -> Layout:
    """The devices, if the model and the stages that are still to run can be spread over them."""
    with naming_section("mesh"):
        layout = Layout.of(experiment.mesh)
    check_layout(experiment, layout, {name for name in experiment.stages if not finished_file(workdir, name).exists()})
    return layout


def _summary(finished: epath.Path) -> dict[str, Any]:
    """The summary of a finished stage."""
    return json_files.read_object(finished, {"seconds": float})
