"""What a run reads and leaves behind: texts, tokens, records, checkpoints and its own state, made small and valid."""

import contextlib
import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from array_record.python.array_record_module import ArrayRecordWriter
from data.test_stored import store
from etils import epath
from fuzz import mutations
from fuzz.models import TEXT, random_weights
from interop.test_pretrained import CONFIG, MODEL, write
from ml_collections import ConfigDict
from tokenizers import pre_tokenizers

from experiments import progressive_tiny
from longrope_jax import experiment
from longrope_jax.data import corpus
from longrope_jax.data.corpus import DataSettings
from longrope_jax.data.sources import open_source
from longrope_jax.data.tfds_text import open_directory
from longrope_jax.data.token_files import is_finished, stored_documents
from longrope_jax.evaluation import evaluate, retrieval
from longrope_jax.evaluation.evaluate import recorded_nll
from longrope_jax.experiment.stages import LoadSettings, TableSettings
from longrope_jax.json_files import read_object
from longrope_jax.runtime import checkpoints, json_lines
from longrope_jax.settings import section

# --- what a run keeps in its work directory ---------------------------------------------------------------------------


def make_manifest(folder: Path) -> list[str]:
    with checkpoints.Checkpoints(folder) as made:
        made.save(3, {"params": {"x": np.arange(4)}}, {"step": 3})
    return ["manifests/3.json"]


def read_manifest(folder: Path, name: str) -> None:
    if damage := checkpoints._damage(epath.Path(folder), 3):
        raise OSError(f"{folder}: {damage}")  # as the warning of a damaged step has it


RECORDS = {
    "evaluation.jsonl": evaluate.EVALUATION_RECORD,
    "retrieval.jsonl": retrieval.RETRIEVAL_RECORD,
    "metrics.jsonl": {"step": int},
    "scores.jsonl": {"candidate": str, "block": int, "nll": [float]},
}


def make_records(folder: Path) -> list[str]:
    examples = {int: 3, str: "some", float: 1.5, dict: {}}

    def example(kind: Any) -> Any:
        if isinstance(kind, list):
            return [example(kind[0])] * 2
        return {name: example(value) for name, value in kind.items()} if isinstance(kind, dict) else examples[kind]

    for name, fields in RECORDS.items():
        json_lines.append(epath.Path(folder / name), [{"stage": "s", **example(fields)}] * 4)
    return list(RECORDS)


def read_records(folder: Path, name: str) -> None:
    path = epath.Path(folder / name)
    for record in json_lines.read(path, RECORDS[name]):
        assert record["stage"] is not None
        if name == "evaluation.jsonl" and len(record["nll_sums"]) == len(record["counts"]) == len(record["documents"]):
            recorded_nll(record)
    json_lines.keep(path, lambda record: record["stage"] == "s", RECORDS[name])


def make_tokens(folder: Path) -> list[str]:
    store(epath.Path(folder), {f"{number}.txt": TEXT.encode() * number for number in range(1, 6)})
    return ["train.json"]


def make_shard(folder: Path) -> list[str]:
    make_tokens(folder)
    return [next(folder.glob("*.array_record")).name]


def read_tokens(folder: Path, name: str) -> None:
    if not is_finished(epath.Path(folder), "train"):
        raise OSError(f"{folder}: made again")
    for document in stored_documents(epath.Path(folder), "train"):
        document.tokens[: min(len(document.tokens), 100)]
        document.tokens[max(0, len(document.tokens) - 100) :]


def _state_config(folder: Path) -> ConfigDict:
    stages = {"load": LoadSettings(str(folder / "model")), "table": TableSettings((64, 512), ("original", "linear"))}
    return ConfigDict(dict(stages=tuple(stages), **{name: section(settings) for name, settings in stages.items()}))


def make_state(folder: Path) -> list[str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    model = dataclasses.replace(MODEL, vocab_size=len(alphabet))
    write(folder / "model", {**CONFIG, "vocab_size": len(alphabet)}, random_weights(model))
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    with contextlib.redirect_stdout(None):
        experiment.run(_state_config(folder), folder / "run")
    names = ("load.started", "load", "table.started", "table")
    return [*(f"run/stages/{name}.json" for name in names), "run/factors/table.json"]


def read_state(folder: Path, name: str) -> None:
    carried = experiment.reopen(_state_config(folder), folder / "run")
    table = carried.table("table", "load")
    table.select(int(table.boundaries[-1]))


def make_compile_report(folder: Path) -> list[str]:
    (folder / "compile_report.json").write_text(json.dumps({"topology": "v5p:2x2x1", "known": {"0f": {"fits": True}}}))
    return ["compile_report.json"]


def read_compile_report(folder: Path, name: str) -> None:
    assert isinstance(read_object(epath.Path(folder / name), {"known": dict})["known"], dict)


# --- text -------------------------------------------------------------------------------------------------------------


def make_array_record(folder: Path) -> list[str]:
    writer = ArrayRecordWriter(str(folder / "books.array_record"), "group_size:1")
    for number in range(20):
        writer.write(f"Text {number}: {TEXT * 5}".encode())
    writer.close()
    return ["books.array_record"]


def read_array_record(folder: Path, name: str) -> None:
    for texts in open_source(DataSettings(folder=str(folder)), folder / "none").values():
        for _, text in texts.read(0, len(texts)):
            text.decode(errors="replace")


def make_dataset(folder: Path) -> list[str]:
    texts = folder / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text(TEXT * 4)
    with contextlib.redirect_stdout(None):
        built = corpus.build(corpus.folder_config(DataSettings(str(texts))), folder / "built")
    for file in Path(built.data_dir).iterdir():
        shutil.copy(file, folder)
    shutil.rmtree(texts)
    shutil.rmtree(folder / "built")
    return ["features.json", "dataset_info.json"]


def read_dataset(folder: Path, name: str) -> None:
    dataset = open_directory(folder, "")
    for split, count in dataset.counts.items():
        for document, text in dataset.read(split, range(min(count, 3))):
            assert document and text


# --- experiments ------------------------------------------------------------------------------------------------------


def make_experiment(folder: Path) -> list[str]:
    (folder / "experiment.json").write_text(progressive_tiny.get_config().to_json())
    return ["experiment.json"]


def mutate_experiment(rng: random.Random, content: bytes, lures: Sequence[str]) -> bytes:
    return json.dumps(mutations.mutated_json(rng, json.loads(content), lures)).encode()


def read_experiment(folder: Path, name: str) -> None:
    """A config is a program; this is what may come of one."""
    content = json.loads((folder / name).read_text())
    try:
        config = ConfigDict(content)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return  # none that a program could make
    try:
        experiment.parse_experiment(config)
    except ValueError as error:
        if not str(error).startswith("config."):
            raise
        raise ValueError(f"{folder}: {error}") from None
