"""What stages hand on: models, factors and results, found again by the names of the stages that made them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

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
    load_factors,
    load_table,
    save_factors,
    save_table,
    unscaled,
)
from longrope_jax.runtime import processes, records
from longrope_jax.runtime.mesh import Layout

BEST_SEED = "_best_seed"
"""Added to the name of a search it names the best of what that started from, as a source of factors."""
ORIGINAL = "original"
"""The source of factors that is the rotation of the pretrained model, whatever a model was tuned with since."""
DYNAMIC = "dynamic_ntk"
"""The source of factors that is NTK by the length at hand."""


@dataclass
class RunContext:
    """What stages leave for the ones after them.

    Attributes:
        model: the architecture.
        layout: of the devices.
        documents: by section of text and split, those that stages read.
        tokenizer: makes the tokens of `documents`.
        workdir: the work directory.
        trained: by the stages that make parameters, in order: what they trained with last.
        read_params: by the same: reads their parameters from where they are kept.
        factors: by search, table and load stages.
        targets: by search stage and the best seed of one: up to how many tokens its factors are good.
        searches: one summary a search stage.
        evaluations: by evaluate stage: its settings and its records.
        retrievals: by retrieval stage: the same.
        exports: one summary an export stage.
    """

    model: Llama
    layout: Layout
    documents: dict[str, dict[str, Sequence[Document]]]
    tokenizer: Tokenizer
    workdir: epath.Path
    trained: dict[str, Trained] = field(default_factory=dict)
    read_params: dict[str, Callable[[], dict]] = field(default_factory=dict)
    factors: dict[str, RopeFactors | FactorTable] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    searches: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, tuple[EvaluationSettings, list[dict[str, Any]]]] = field(default_factory=dict)
    retrievals: dict[str, tuple[RetrievalSettings, list[dict[str, Any]]]] = field(default_factory=dict)
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    _loaded: tuple[str, dict] | None = None

    def model_stage(self, name: str) -> str:
        """The stage that `name` means; "" is the latest so far."""
        return name or list(self.trained)[-1]

    def params(self, stage: str) -> dict:
        """Parameters that a stage left; only one stage's are in memory at a time."""
        stage = self.model_stage(stage)
        if self._loaded is None or self._loaded[0] != stage:
            self._loaded = None
            self._loaded = stage, self.read_params[stage]()
        return self._loaded[1]

    def forget_params(self) -> None:
        """Frees what is in memory; who needs parameters again reads them again."""
        self._loaded = None

    def give_away_params(self, stage: str) -> dict:
        """The same to someone who overwrites them: they are not kept here."""
        params, self._loaded = self.params(stage), None
        return params

    def table(self, source: str, model: str) -> FactorTable:
        """Factors by length: a table or load stage's, a search's for all up to its target; "" for those that a stage's
        model was last trained with, or came with.
        """
        source = source or self.model_stage(model)
        if source not in self.factors:
            trained = self.trained[source]
            return FactorTable.of({trained.length: trained.factors})
        found = self.factors[source]
        return found if isinstance(found, FactorTable) else FactorTable.of({self.targets[source]: found})

    def source(self, name: str, model: str, target: int) -> Callable[[int], RopeFactors]:
        """Length (tokens) -> the factors that a source of factors has for it, on a stage's model."""
        config, trained = self.model.config, self.trained[self.model_stage(model)]
        if name in self.factors:
            found = self.factors[name]
            return found.select if isinstance(found, FactorTable) else lambda length: found
        if name == DYNAMIC:
            return lambda length: extend("ntk", trained, length, config.head_dim, config.rope_theta)
        if name == ORIGINAL:
            fixed = unscaled(config.head_dim)
        else:
            fixed = extend(name, trained, target, config.head_dim, config.rope_theta)
        return lambda length: fixed


def save_stage_factors(context: RunContext, name: str, factors: RopeFactors, target: int, **metadata: Any) -> None:
    """Writes one set of factors, for windows of up to `target` tokens."""
    if processes.is_first():
        config = context.model.config
        save_factors(
            _new_file(context, name),
            factors,
            **records.finite(metadata),
            stage=name,
            model=dataclasses.asdict(config),
            original_length=config.original_length,
            target_length=target,
        )


def load_stage_factors(context: RunContext, name: str) -> RopeFactors:
    """What `save_stage_factors` wrote; raises LookupError if it is gone."""
    return load_factors(_found(context, name), context.model.config.head_dim)


def save_stage_table(context: RunContext, name: str, table: FactorTable, **metadata: Any) -> None:
    """Writes factors by length."""
    if processes.is_first():
        model = dataclasses.asdict(context.model.config)
        save_table(_new_file(context, name), table, stage=name, model=model, **metadata)


def load_stage_table(context: RunContext, name: str) -> FactorTable:
    """What `save_stage_table` wrote; raises LookupError if it is gone."""
    return load_table(_found(context, name), context.model.config.head_dim)


def _new_file(context: RunContext, name: str) -> epath.Path:
    path = _file(context, name)
    path.parent.mkdir(exist_ok=True)
    return path


def _found(context: RunContext, name: str) -> epath.Path:
    path = _file(context, name)
    if not path.exists():
        raise LookupError(f"{path} is gone")
    return path


def _file(context: RunContext, name: str) -> epath.Path:
    return context.workdir / "factors" / f"{name}.json"
