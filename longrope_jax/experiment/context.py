"""The run context: the outputs of the stages so far, found by stage name, and their files in the work directory."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from longrope_jax import json_files
from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.evaluation.evaluate import EvaluationSettings
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.model import Llama
from longrope_jax.rope import (
    FactorTable,
    RopeFactors,
    Trained,
    extend,
    save_factors,
    save_table,
    unscaled,
)
from longrope_jax.runtime import processes
from longrope_jax.runtime.mesh import Layout

BEST_SEED = "_best_seed"
"""Suffix of a search stage's name: the source of factors that is the best seed of that search."""
ORIGINAL = "original"
"""The source of factors that is the rotation of the pretrained model, lambda = 1."""
DYNAMIC = "dynamic_ntk"
"""The source of factors that is NTK at the current length."""


@dataclass
class RunContext:
    """The outputs of the stages so far. Stages read it and add to it.

    Attributes:
        model: the architecture.
        layout: the devices.
        documents: the documents of a text section, by section and split.
        tokenizer: the tokenizer of `documents`.
        workdir: the work directory.
        trained: stage -> the factors it last trained with, in order. Only stages that make parameters.
        read_params: the same stages -> a function that reads their parameters from disk.
        factors: search, table or load stage, or the best seed of a search -> factors by length.
        searches: one summary per search stage.
        evaluations: evaluate stage -> its settings and its records.
        retrievals: retrieval stage -> its settings and its records.
        exports: export stage -> its summary.
    """

    model: Llama
    layout: Layout
    documents: dict[str, dict[str, Sequence[Document]]]
    tokenizer: Tokenizer
    workdir: epath.Path
    trained: dict[str, Trained] = field(default_factory=dict)
    read_params: dict[str, Callable[[], dict]] = field(default_factory=dict)
    factors: dict[str, FactorTable] = field(default_factory=dict)
    searches: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, tuple[EvaluationSettings, list[dict[str, Any]]]] = field(default_factory=dict)
    retrievals: dict[str, tuple[RetrievalSettings, list[dict[str, Any]]]] = field(default_factory=dict)
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    _loaded: tuple[str, dict] | None = None

    def model_stage(self, name: str) -> str:
        """The stage of this name; "" is the latest that made parameters."""
        return name or list(self.trained)[-1]

    def params(self, stage: str) -> dict:
        """The parameters of a stage. Only one stage's parameters are in memory at a time."""
        stage = self.model_stage(stage)
        if self._loaded is None or self._loaded[0] != stage:
            self._loaded = None
            self._loaded = stage, self.read_params[stage]()
        return self._loaded[1]

    def release_params(self) -> None:
        """Frees the parameters in memory. The next `params` reads them again."""
        self._loaded = None

    def pop_params(self, stage: str) -> dict:
        """The parameters of a stage for a caller that overwrites them: this object forgets them."""
        params, self._loaded = self.params(stage), None
        return params

    def table(self, source: str, model: str) -> FactorTable:
        """Factors by length of a table, load or search stage; "" for those that stage `model` last trained with."""
        source = source or self.model_stage(model)
        if source in self.factors:
            return self.factors[source]
        trained = self.trained[source]
        return FactorTable.of({trained.length: trained.factors})

    def source(self, name: str, model: str, target: int) -> Callable[[int], RopeFactors]:
        """A function: length in tokens -> factors of a source (a stage or a method), for the model of stage `model`."""
        config, trained = self.model.config, self.trained[self.model_stage(model)]
        if name in self.factors:
            table = self.factors[name]
            return lambda length: table_entry(table, length)[0]
        if name == DYNAMIC:
            return lambda length: extend("ntk", trained, length, config.head_dim, config.rope_theta)
        if name == ORIGINAL:
            fixed = unscaled(config.head_dim)
        else:
            fixed = extend(name, trained, target, config.head_dim, config.rope_theta)
        return lambda length: fixed


def started_file(workdir: epath.Path, name: str) -> epath.Path:
    """The file with the fingerprint of a stage that has started."""
    return workdir / "stages" / f"{name}.started.json"


def finished_file(workdir: epath.Path, name: str) -> epath.Path:
    """The file with the summary of a stage that has finished."""
    return workdir / "stages" / f"{name}.json"


def table_entry(table: FactorTable, length: int) -> tuple[RopeFactors, int]:
    """What a table has for a length (tokens), or else for its longest; and up to which length that is good."""
    row = min(int(np.searchsorted(table.boundaries, length)), len(table.boundaries) - 1)
    boundary = int(table.boundaries[row])
    return table.select(boundary), boundary


def save_factors_of(context: RunContext, name: str, factors: RopeFactors | FactorTable, **metadata: Any) -> None:
    """Writes `factors/<name>.json`."""
    if processes.is_first():
        path, config = context.workdir / "factors" / f"{name}.json", context.model.config
        path.parent.mkdir(exist_ok=True)
        known = {"stage": name, "model": dataclasses.asdict(config), "original_length": config.original_length}
        metadata = json_files.finite(metadata) | known
        if isinstance(factors, FactorTable):
            save_table(path, factors, **metadata)
        else:
            save_factors(path, factors, **metadata)


def factor_file(context: RunContext, name: str) -> epath.Path:
    """`factors/<name>.json` of a finished stage; raises LookupError if it is missing."""
    path = context.workdir / "factors" / f"{name}.json"
    if not path.exists():
        raise LookupError(f"{path} is missing")
    return path
