"""What stages hand on: models, factors and results, found again by the names of the stages that made them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.evaluation.run import EvaluationSettings
from longrope_jax.model import Llama
from longrope_jax.rope import FactorTable, RopeFactors, Trained, extend, unscaled
from longrope_jax.runtime.mesh import Layout

BEST_SEED = "_best_seed"
"""Added to the name of a search it names the best of what that started from, as a source of factors."""
ORIGINAL = "original"
"""The source of factors that is the rotation of the pretrained model, whatever a model was tuned with since."""
DYNAMIC = "dynamic_ntk"
"""The source of factors that is NTK by the length at hand."""


@dataclass
class Carried:
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
