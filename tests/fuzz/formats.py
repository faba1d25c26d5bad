"""Every file that the library reads: how a valid one is made, how it is damaged, and how it is read to the end."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fuzz import models, mutations, runs

Mutate = Callable[[random.Random, bytes, Sequence[str]], bytes]


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


FORMATS = {
    "factors.json": Format(models.make_factors, mutations.json_file, models.read_set),
    "factors.csv": Format(models.make_csv, mutations.csv_file, models.read_csv),
    "table.json": Format(models.make_table, mutations.json_file, models.read_table),
    "rope_parameters": Format(models.make_any_factors, mutations.json_file, models.read_any_factors),
    "config.json": Format(models.make_config, mutations.json_file, models.read_model),
    "safetensors": Format(models.make_tensors, mutations.with_json_header, models.read_tensors),
    "safetensors.index.json": Format(models.make_index, mutations.json_file, models.read_tensors),
    "gguf": Format(models.make_gguf, mutations.binary_header, models.read_gguf),
    "gguf tokenizer": Format(models.make_gguf_tokenizer, mutations.binary_header, models.read_gguf_tokenizer),
    "tokenizer.json": Format(models.make_tokenizer_files, mutations.json_file, models.read_tokenizer),
    "manifest": Format(runs.make_manifest, mutations.json_file, runs.read_manifest),
    "records.jsonl": Format(runs.make_records, mutations.json_lines, runs.read_records),
    "tokens index": Format(runs.make_tokens, mutations.json_file, runs.read_tokens),
    "tokens": Format(runs.make_shard, mutations.binary_header, runs.read_tokens),
    "stages": Format(runs.make_state, mutations.json_file, runs.read_state),
    "compile_report.json": Format(runs.make_compile_report, mutations.json_file, runs.read_compile_report),
    "array_record": Format(runs.make_array_record, mutations.binary_header, runs.read_array_record),
    "TFDS dataset": Format(runs.make_dataset, mutations.json_file, runs.read_dataset),
    "experiment": Format(runs.make_experiment, runs.mutate_experiment, runs.read_experiment),
}
