"""Finished work directories, read for a comparison, and whether two of them scored the same tokens."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from longrope_jax.evaluation.evaluate import EVALUATION_RECORD, recorded_nll
from longrope_jax.evaluation.perplexity import DocumentNll
from longrope_jax.json_files import Kind, read_object
from longrope_jax.runtime import json_lines

# What of the files of a run is relied on.
_REPORT = {
    "original_length": int,
    "evaluations": {str: dict},
    "retrieval": {str: dict},
    "search": [dict],
    "seconds": {str: float},
}
_RECORD = {name: EVALUATION_RECORD[name] for name in ("length", "method", "documents", "nll_sums", "counts")}
_INDEX = {"shards": [{"sha256": str}]}


@dataclass(frozen=True)
class Run:
    """A finished work directory.

    Attributes:
        name: what tells its path from those of the others.
        workdir: the path.
        config: of config.json.
        report: of report.json.
        nll: stage -> (length, method) -> NLL by document.
        names: stage -> the documents of its windows, in order.
        text: section of text -> SHA-256 of the tokens that evaluation reads.
    """

    name: str
    workdir: epath.Path
    config: dict[str, Any]
    report: dict[str, Any]
    nll: dict[str, dict[tuple[int, str], DocumentNll]]
    names: dict[str, list[str]]
    text: dict[str, list[str]]


def read_runs(workdirs: Sequence[epath.PathLike]) -> list[Run]:
    """The runs of at least two work directories, each named by what its path does not share with the others.

    Raises:
        ValueError: there are fewer, one is named twice, or one has no finished run or a damaged report or index; one
            line.
        OSError: records of one are damaged.
    """
    if len(workdirs) < 2:
        raise ValueError(f"a comparison needs at least two work directories, not {len(workdirs)}")
    paths = [str(workdir).rstrip("/") for workdir in workdirs]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"work directory {path} is named twice")
    return [_read_run(epath.Path(path), name) for path, name in zip(paths, _short(paths), strict=True)]


def other_tokens(a: Run, b: Run, stage: str) -> str:
    """Why the runs did not score the same tokens; "" if they did."""
    section_a, section_b = (run.config[stage].get("data", "data") for run in (a, b))
    if section_a not in a.text or section_b not in b.text:
        return "the tokens that they scored are unknown"
    if a.text[section_a] != b.text[section_b]:
        return "their evaluation text differs"
    if a.names[stage] != b.names[stage] or max(a.nll[stage])[0] != max(b.nll[stage])[0]:
        return "they scored different windows of the same text"
    return ""


def _short(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them are in."""
    parts = [path.split("/") for path in paths]
    shared = len(os.path.commonprefix([names[:-1] for names in parts]))
    return ["/".join(names[shared:]) for names in parts]


def _read_run(workdir: epath.Path, name: str) -> Run:
    if not workdir.is_dir():
        raise ValueError(f"work directory {workdir} is not there")
    report = _object(workdir, "report.json", _REPORT)
    config = _object(workdir, "config.json", {"stages": [str]})
    if not any(report[key] for key in ("evaluations", "retrieval", "search")):
        raise ValueError(f"work directory {workdir} has nothing to compare: no evaluate, retrieval or search stage")
    nll: dict[str, dict[tuple[int, str], DocumentNll]] = {}
    names: dict[str, list[str]] = {}
    for record in json_lines.read(workdir / "evaluation.jsonl", _RECORD):
        nll.setdefault(record["stage"], {})[record["length"], record["method"]] = recorded_nll(record)
        names[record["stage"]] = record["documents"]
    for stage in report["evaluations"]:
        if stage not in nll:
            raise ValueError(
                f"work directory {workdir} has no records of {stage} in evaluation.jsonl; the command of its "
                "experiment makes them again"
            )
    # Folders are called after the section and a hash: data-cd02ac3a813a.
    text = {path.parent.name.rsplit("-", 1)[0]: path for path in workdir.glob("tokens/*-*/evaluation.json")}
    hashes = {
        section: [shard["sha256"] for shard in read_object(path, _INDEX)["shards"]] for section, path in text.items()
    }
    return Run(name, workdir, config, report, nll, names, hashes)


def _object(workdir: epath.Path, name: str, fields: Mapping[str, Kind]) -> dict[str, Any]:
    path = workdir / name
    if not path.exists():
        raise ValueError(f"work directory {workdir} has no {name}: its experiment has not finished")
    try:
        return read_object(path, fields)
    except ValueError as error:
        raise ValueError(f"{error}; the command of its experiment writes a new one") from None
