"""Every file that the library reads: how a valid one is made, how it is damaged, and how it is read to the end."""

import contextlib
import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tiny_gguf
import tokenizers
from array_record.python.array_record_module import ArrayRecordWriter
from data.test_stored import store
from data.test_subwords import make_tokenizer
from etils import epath
from fuzz import mutations
from interop.test_export import LONG, SHORT, TABLE
from interop.test_gguf_tokenizer import byte_level, train
from interop.test_pretrained import CONFIG, MODEL, to_huggingface, write
from ml_collections import ConfigDict
from tokenizers import pre_tokenizers

import longrope_jax as lr
from experiments import progressive_tiny
from longrope_jax import ahead_of_time, evaluation, experiment, rope
from longrope_jax.data import corpus
from longrope_jax.data.settings import DataSettings
from longrope_jax.data.sources import open_source
from longrope_jax.data.stored import StoredDocuments
from longrope_jax.data.subwords import SubwordTokenizer
from longrope_jax.data.tfds_text import open_directory
from longrope_jax.data.tokens import is_finished
from longrope_jax.evaluation import retrieval
from longrope_jax.evaluation.run import recorded_nll
from longrope_jax.interop import load_tokenizer
from longrope_jax.interop.factor_files import read_factors
from longrope_jax.interop.gguf import gguf_tokenizer
from longrope_jax.interop.pretrained import describe_pretrained, read_params, stored_dtype
from longrope_jax.interop.tensors import FolderTensors
from longrope_jax.interop.tokenizer_files import tokenizer_files
from longrope_jax.rope.huggingface import to_huggingface as to_rope_parameters
from longrope_jax.runtime import checkpoints, records
from longrope_jax.settings import section
from longrope_jax.stages import LoadSettings, TableSettings
from longrope_jax.training.step import init_params

Mutate = Callable[[random.Random, bytes, Sequence[str]], bytes]
TEXT = "Some words, and ünï 日本語.\n"


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        make: an empty folder -> valid files in it; returns the path, within it, of every file to be damaged.
        mutate: a valid file -> another one.
        read: the folder, and the path within it of the file that was damaged -> all that a user would get of it.
    """

    make: Callable[[Path], list[str]]
    mutate: Mutate
    read: Callable[[Path, str], Any]


# --- factors ----------------------------------------------------------------------------------------------------------


def _make_factors(folder: Path) -> list[str]:
    told = {"target_length": 512, "original_length": 64, "model": {"rope_theta": 1e4}, "scores": {"512": 3.5}}
    rope.save_factors(folder / "set.json", LONG.replace(n_hat=np.int32(4)), **told)
    return ["set.json"]


def _read_set(folder: Path, name: str) -> None:
    rope.load_metadata(folder / name)
    factors = rope.load_factors(folder / name)
    rope.FactorTable.of({512: factors}).select(100)
    rope.load_factors(folder / name, 2 * len(factors.lam))


def _make_csv(folder: Path) -> list[str]:
    rope.save_factors(folder / "column.csv", SHORT.replace(mscale=np.float32(1), n_hat=np.int32(8)))
    (folder / "rows.csv").write_text("1.0,1.25,2.5,4.0\n" * 3)
    return ["column.csv", "rows.csv"]


def _read_csv(folder: Path, name: str) -> None:
    rope.load_factors(folder / name)
    read_factors(folder / name, 512, 8)


def _make_table(folder: Path) -> list[str]:
    rope.save_table(folder / "table.json", TABLE, original_length=64, rope_theta=1e4)
    return ["table.json"]


def _read_table(folder: Path, name: str) -> None:
    rope.load_table(folder / name).select(64)


def _make_any_factors(folder: Path) -> list[str]:
    parameters = to_rope_parameters(TABLE, 64)
    contents = {
        "rope.json": parameters,
        "beside.json": {"max_position_embeddings": 512, "rope_theta": 1e4, "rope_scaling": parameters},
        "config.json": {**CONFIG, "max_position_embeddings": 512, "rope_parameters": parameters},
        "yarn.json": {**CONFIG, "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5,
                                                 "original_max_position_embeddings": 16}},
        "llama3.json": {**CONFIG, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return [*contents, *_make_factors(folder), *_make_table(folder)]


def _read_any_factors(folder: Path, name: str) -> None:
    found = read_factors(folder / name)
    found.table.select(int(found.table.boundaries[-1]))


# --- models -----------------------------------------------------------------------------------------------------------


def _make_model(folder: Path, files: int = 1, **changes: Any) -> None:
    params = jax.tree.map(np.asarray, init_params(lr.Llama(MODEL), 0))
    write(folder, {**CONFIG, **changes}, to_huggingface(params), files)


def _make_config(folder: Path) -> list[str]:
    _make_model(folder, rope_scaling=to_rope_parameters(TABLE, 64), max_position_embeddings=512)
    return ["config.json"]


def _read_model(folder: Path, name: str) -> None:
    config, table = describe_pretrained(folder)
    table.select(1)
    read_params(folder, config)


def _make_tensors(folder: Path) -> list[str]:
    _make_model(folder)
    return ["model.safetensors"]


def _make_index(folder: Path) -> list[str]:
    _make_model(folder, files=3)
    return ["model.safetensors.index.json"]


def _read_tensors(folder: Path, name: str) -> None:
    stored_dtype(folder)
    source = FolderTensors(epath.Path(folder))
    for tensor in source.shapes():
        source.read(tensor)
    elsewhere = [file for file in source._files.values() if Path(file).resolve().parent != folder.resolve()]
    assert not elsewhere, f"reads {elsewhere}"
    with contextlib.suppress(ValueError):  # tensors of another model, told so
        read_params(folder, MODEL)


def _make_gguf(folder: Path) -> list[str]:
    kinds = {"f32.gguf": tiny_gguf.Type.F32, "q8.gguf": tiny_gguf.Type.Q8_0}
    for name, kind in kinds.items():
        scaling = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
        tiny_gguf.write_model(folder / name, tiny_gguf.make_weights(), kind, **scaling)
    factors = {
        f"rope_factors_{name}.weight": np.linspace(1, top, 8, dtype=np.float32)
        for name, top in (("short", 2), ("long", 9))
    }
    tensors = tiny_gguf.to_llama_cpp(tiny_gguf.make_weights()) | factors
    tiny_gguf.write(folder / "longrope.gguf", {**tiny_gguf.METADATA, "llama.rope.scaling.type": "longrope"}, tensors)
    return [*kinds, "longrope.gguf"]


def _read_gguf(folder: Path, name: str) -> None:
    config, table = describe_pretrained(folder / name)
    table.select(1)
    read_params(folder / name, config)


def _make_gguf_tokenizer(folder: Path) -> list[str]:
    metadata = byte_level(train("smollm"), "smollm")
    tiny_gguf.write(folder / "bpe.gguf", metadata)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1]
    tiny_gguf.write(
        folder / "pieces.gguf",
        {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": [-float(index) for index in range(len(pieces))],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        },
    )
    return ["bpe.gguf", "pieces.gguf"]


def _read_gguf_tokenizer(folder: Path, name: str) -> None:
    tokenizer = gguf_tokenizer(folder / name)
    if tokenizer is not None:
        _use(tokenizer)


def _use(tokenizer: SubwordTokenizer) -> None:
    tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer_files(tokenizer, 2**20)
    assert tokenizer.identity


def _make_tokenizer(folder: Path) -> list[str]:
    make_tokenizer().save(str(folder / "tokenizer.json"))
    contents = {
        "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "model_max_length": 4096},
        "special_tokens_map.json": {"bos_token": "<bos>"},
        "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0},
        "config.json": {"eos_token_id": 1},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return ["tokenizer.json", "tokenizer.json", *contents]


def _read_tokenizer(folder: Path, name: str) -> None:
    _use(load_tokenizer(folder))


# --- what a run keeps in its work directory ---------------------------------------------------------------------------


def _make_manifest(folder: Path) -> list[str]:
    with checkpoints.Checkpoints(folder) as made:
        made.save(3, {"params": {"x": np.arange(4)}}, {"step": 3})
    return ["manifests/3.json"]


def _read_manifest(folder: Path, name: str) -> None:
    if damage := checkpoints._damage(epath.Path(folder), 3):
        raise OSError(f"{folder}: {damage}")  # as the warning of a damaged step has it


RECORDS = {
    "evaluation.jsonl": evaluation.run.RECORD,
    "retrieval.jsonl": retrieval.RECORD,
    "metrics.jsonl": {"step": int},
    "scores.jsonl": {"candidate": str, "block": int, "nll": [float]},
}


def _make_records(folder: Path) -> list[str]:
    examples = {int: 3, str: "some", float: 1.5, dict: {}}

    def example(kind: Any) -> Any:
        if isinstance(kind, list):
            return [example(kind[0])] * 2
        return {name: example(value) for name, value in kind.items()} if isinstance(kind, dict) else examples[kind]

    for name, fields in RECORDS.items():
        records.append(epath.Path(folder / name), [{"stage": "s", **example(fields)}] * 4)
    return list(RECORDS)


def _read_records(folder: Path, name: str) -> None:
    path = epath.Path(folder / name)
    for record in records.read(path, RECORDS[name]):
        assert record["stage"] is not None
        if name == "evaluation.jsonl" and len(record["nll_sums"]) == len(record["counts"]) == len(record["documents"]):
            recorded_nll(record)
    records.keep(path, lambda record: record["stage"] == "s", RECORDS[name])


def _make_tokens(folder: Path) -> list[str]:
    store(epath.Path(folder), {f"{number}.txt": TEXT.encode() * number for number in range(1, 6)})
    return ["train.json"]


def _make_shard(folder: Path) -> list[str]:
    _make_tokens(folder)
    return [next(folder.glob("*.array_record")).name]


def _read_tokens(folder: Path, name: str) -> None:
    if not is_finished(epath.Path(folder), "train"):
        raise OSError(f"{folder}: made again")
    for document in StoredDocuments(epath.Path(folder), "train"):
        document.tokens[: min(len(document.tokens), 100)]
        document.tokens[max(0, len(document.tokens) - 100) :]


def _state_config(folder: Path) -> ConfigDict:
    stages = {"load": LoadSettings(str(folder / "model")), "table": TableSettings((64, 512), ("original", "linear"))}
    return ConfigDict(dict(stages=tuple(stages), **{name: section(settings) for name, settings in stages.items()}))


def _make_state(folder: Path) -> list[str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    model = dataclasses.replace(MODEL, vocab_size=len(alphabet))
    params = jax.tree.map(np.asarray, init_params(lr.Llama(model), 0))
    write(folder / "model", {**CONFIG, "vocab_size": len(alphabet)}, to_huggingface(params))
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    with contextlib.redirect_stdout(None):
        experiment.run(_state_config(folder), folder / "run")
    names = ("load.begun", "load", "table.begun", "table")
    return [*(f"run/stages/{name}.json" for name in names), "run/factors/table.json"]


def _read_state(folder: Path, name: str) -> None:
    carried = experiment.reopen(_state_config(folder), folder / "run")
    carried.table("table", "load").select(64)


def _make_compile_report(folder: Path) -> list[str]:
    (folder / "compile_report.json").write_text(json.dumps({"topology": "v5p:2x2x1", "known": {"0f": {"fits": True}}}))
    return ["compile_report.json"]


def _read_compile_report(folder: Path, name: str) -> None:
    assert isinstance(ahead_of_time._known(epath.Path(folder / name)), dict)


# --- text -------------------------------------------------------------------------------------------------------------


def _make_array_record(folder: Path) -> list[str]:
    writer = ArrayRecordWriter(str(folder / "books.array_record"), "group_size:1")
    for number in range(20):
        writer.write(f"Text {number}: {TEXT * 5}".encode())
    writer.close()
    return ["books.array_record"]


def _read_array_record(folder: Path, name: str) -> None:
    for texts in open_source(DataSettings(folder=str(folder)), folder / "none").values():
        for _, text in texts.read(0, len(texts)):
            text.decode(errors="replace")


def _make_dataset(folder: Path) -> list[str]:
    texts = folder / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text(TEXT * 4)
    with contextlib.redirect_stdout(None):
        built = corpus.build(corpus.folder_config(str(texts)), folder / "built")
    for file in Path(built.data_dir).iterdir():
        shutil.copy(file, folder)
    shutil.rmtree(texts)
    shutil.rmtree(folder / "built")
    return ["features.json", "dataset_info.json"]


def _read_dataset(folder: Path, name: str) -> None:
    dataset = open_directory(folder, "")
    for split, count in dataset.counts.items():
        for document, text in dataset.read(split, range(min(count, 3))):
            assert document and text


# --- experiments ------------------------------------------------------------------------------------------------------


def _make_experiment(folder: Path) -> list[str]:
    (folder / "experiment.json").write_text(progressive_tiny.get_config().to_json())
    return ["experiment.json"]


def _mutate_experiment(rng: random.Random, content: bytes, lures: Sequence[str]) -> bytes:
    return json.dumps(mutations.mutated_json(rng, json.loads(content), lures)).encode()


def _read_experiment(folder: Path, name: str) -> None:
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


FORMATS = {
    "factors.json": Format(_make_factors, mutations.json_file, _read_set),
    "factors.csv": Format(_make_csv, mutations.csv_file, _read_csv),
    "table.json": Format(_make_table, mutations.json_file, _read_table),
    "rope_parameters": Format(_make_any_factors, mutations.json_file, _read_any_factors),
    "config.json": Format(_make_config, mutations.json_file, _read_model),
    "safetensors": Format(_make_tensors, mutations.with_json_header, _read_tensors),
    "safetensors.index.json": Format(_make_index, mutations.json_file, _read_tensors),
    "gguf": Format(_make_gguf, mutations.binary_header, _read_gguf),
    "gguf tokenizer": Format(_make_gguf_tokenizer, mutations.binary_header, _read_gguf_tokenizer),
    "tokenizer.json": Format(_make_tokenizer, mutations.json_file, _read_tokenizer),
    "manifest": Format(_make_manifest, mutations.json_file, _read_manifest),
    "records.jsonl": Format(_make_records, mutations.json_lines, _read_records),
    "tokens index": Format(_make_tokens, mutations.json_file, _read_tokens),
    "tokens": Format(_make_shard, mutations.binary_header, _read_tokens),
    "stages": Format(_make_state, mutations.json_file, _read_state),
    "compile_report.json": Format(_make_compile_report, mutations.json_file, _read_compile_report),
    "array_record": Format(_make_array_record, mutations.binary_header, _read_array_record),
    "TFDS dataset": Format(_make_dataset, mutations.json_file, _read_dataset),
    "experiment": Format(_make_experiment, _mutate_experiment, _read_experiment),
}
