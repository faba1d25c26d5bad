"""The stage `export`: a model and its factors as a Hugging Face folder."""

import itertools
import time
from dataclasses import dataclass
from typing import Annotated, Any

from absl import logging
from flax.traverse_util import flatten_dict

from longrope_jax import json_files
from longrope_jax.evaluation.evaluate import recorded_nll
from longrope_jax.evaluation.factor_switching import Cost, cost_windows, replacement_cost
from longrope_jax.evaluation.perplexity import perplexity
from longrope_jax.experiment.context import RunContext, finished_file, started_file
from longrope_jax.experiment.stage import Before, Stage, factors_target, model_stage, sources
from longrope_jax.experiment.stages.settings import LoadSettings, TableSettings
from longrope_jax.interop.export import UnsupportedByFormat, check_architecture, export_checkpoint, fit_to_format
from longrope_jax.model import LlamaConfig
from longrope_jax.model.config import FLOAT_TYPES
from longrope_jax.report.model_card import Card, model_card
from longrope_jax.rope import FactorTable
from longrope_jax.rope.huggingface import DROPPABLE
from longrope_jax.runtime import processes
from longrope_jax.search.settings import SearchSettings
from longrope_jax.settings import DocumentCount, Rule, Seed, Settings, one_of

# Fields of a stage's summary that a model card shows, and fields of its settings that it omits.
_RESULTS = ("parameters", "evaluations", "best_nll", "seconds")
_HOUSEKEEPING = ("dtype", "param_dtype", "attention", "log_every", "checkpoint_every", "data")


_POSITIVE = Rule(lambda lengths: min(lengths, default=1) > 0, "must be positive numbers of tokens")


@dataclass(frozen=True)
class ExportSettings(Settings):
    """What is handed on to others, as the folder of the stage's name in the work directory.

    The format has two sets of factors, up to and beyond one length, and no start tokens. What else the factors have
    stops the export unless it may be dropped; what that costs is then measured on the evaluation documents.

    Attributes:
        factors: a table, search or load stage; "" for what the model came with or was last trained with, at every
            length.
        model: the stage whose parameters are exported; "" is the latest.
        architecture: the class of Transformers that reads them, "LlamaForCausalLM", "MistralForCausalLM" or
            "Phi3ForCausalLM". All are the same computation; llama.cpp converts factors by length from the last only.
        dtype: "float32" or "bfloat16"; "" for that of the parameters.
        allow_dropping_start_tokens: n_hat becomes 0.
        allow_dropping_lengths: only the factors of the original length and of the longest remain.
        allow_dropping_temperatures: that of the longest is used at all lengths.
        cost_lengths: where the cost is measured, tokens; () for every boundary of the table up to which it changes.
        cost_documents: on how many windows of each.
        seed: of the windows.
        data: the section of the text that it is measured on.
    """

    factors: str = ""
    model: str = ""
    architecture: str = "LlamaForCausalLM"
    dtype: Annotated[str, one_of(FLOAT_TYPES, "")] = ""
    allow_dropping_start_tokens: bool = False
    allow_dropping_lengths: bool = False
    allow_dropping_temperatures: bool = False
    cost_lengths: Annotated[tuple[int, ...], _POSITIVE] = ()
    cost_documents: DocumentCount = 8
    seed: Seed = 0
    data: str = "data"

    @property
    def allowed(self) -> tuple[str, ...]:
        """What may be dropped."""
        return tuple(kind for kind in DROPPABLE if getattr(self, f"allow_dropping_{kind}"))


def _check_export(settings: ExportSettings, config: LlamaConfig, before: Before) -> None:
    model = model_stage(settings.model, before)
    check_architecture(settings.architecture, config)
    source = before[settings.factors or model] if settings.factors in ("", *before) else None
    if isinstance(source, LoadSettings):
        fit_to_format(source.factors, config.original_length, settings.allowed)
    if not settings.factors:
        return
    target = factors_target(settings.factors, before, "factors")
    if target is None:
        raise ValueError(f"factors = {settings.factors!r} must be a stage; a table stage makes one of a method")
    if target < config.original_length:
        raise ValueError(
            f"factors = {settings.factors!r} end at {target} tokens, below the original length, "
            f"{config.original_length}"
        )
    if settings.cost_lengths and max(settings.cost_lengths) > target:
        raise ValueError(f"cost_lengths = {settings.cost_lengths} goes beyond {target}, where {settings.factors} ends")
    # Neighbours from one stage are one; what methods make of different lengths differs.
    if isinstance(source, TableSettings) and "lengths" not in settings.allowed and _entries(source, before) > 2:
        raise ValueError(
            f"factors = {settings.factors!r} has the lengths {', '.join(map(str, source.lengths))}, and the format has "
            "room for two; allow_dropping_lengths keeps those of the original length and of the longest"
        )
    if "start_tokens" not in settings.allowed:
        _warn_of_start_tokens(settings, source, before)


def _entries(table: TableSettings, before: Before) -> int:
    pairs = itertools.pairwise(table.factors)
    return 1 + sum(first != second or first not in before for first, second in pairs)


def _warn_of_start_tokens(settings: ExportSettings, source: Any, before: Before) -> None:
    """What a search will find is not known yet; that it may find something which has no place is."""
    names = source.factors if isinstance(source, TableSettings) else (settings.factors,)
    searches = [name for name in names if isinstance(before.get(name), SearchSettings)]
    if risky := [name for name in searches if max(before[name].n_hat, default=0) > 1]:
        logging.warning(
            "%s may find start tokens (n_hat > 0), which no Hugging Face folder can carry: the export would stop. Its "
            "n_hat = (0,) leaves them out, allow_dropping_start_tokens drops them at a cost that is measured",
            " and ".join(risky),
        )  # fmt: skip


def _run_export(settings: ExportSettings, context: RunContext, name: str) -> dict[str, Any]:
    started = time.monotonic()
    config = context.model.config
    dtype = settings.dtype or config.param_dtype
    found = context.table(settings.factors, settings.model)
    exported, dropped = fit_to_format(found, config.original_length, settings.allowed)
    costs = _costs(settings, context, found, exported) if dropped else []
    if dropped and processes.is_first():
        logging.warning(
            "%s: dropped %s; %s", name, "; ".join(dropped.values()), "; ".join(map(str, costs)) or "no cost"
        )
    card = Card(
        title=f"{config.original_length:,} to {int(exported.boundaries[-1]):,} tokens",
        config=config,
        form=f"{settings.architecture}, {dtype}",
        factors=found,
        exported=exported,
        dropped=dropped,
        costs=costs,
        text="evaluation documents of the experiment, which neither training nor search has seen",
        steps=_history(context, name),
        **_evaluated(settings, context),
    )
    export_checkpoint(
        context.workdir / name,
        config,
        context.params(settings.model),
        exported,
        context.tokenizer,
        model_card(card),
        architecture=settings.architecture,
        dtype=dtype,
    )
    return {
        "folder": name,
        "architecture": settings.architecture,
        "dtype": dtype,
        "files": sorted(path.name for path in (context.workdir / name).iterdir()),
        "lengths": [int(boundary) for boundary in exported.boundaries],
        "dropped": dropped,
        "costs": [cost.to_record() for cost in costs],
        "seconds": time.monotonic() - started,
    }


def _costs(settings: ExportSettings, context: RunContext, found: FactorTable, exported: FactorTable) -> list[Cost]:
    documents = context.documents[settings.data]["evaluation"]
    try:
        windows = cost_windows(
            found, exported, documents, settings.cost_lengths, settings.cost_documents, settings.seed
        )
    except ValueError as error:
        raise UnsupportedByFormat(str(error)) from None
    if not windows:
        return []
    params, bos = context.params(settings.model), context.tokenizer.window_bos
    return replacement_cost(context.model, context.layout, params, found, exported, windows, bos)


def _evaluated(settings: ExportSettings, context: RunContext) -> dict[str, Any]:
    """The latest evaluation of the exported model: perplexity by method and length, and which are the export."""
    model = context.model_stage(settings.model)
    for stage, (evaluation, made) in reversed(context.evaluations.items()):
        inputs = _recorded(context, stage)[f"stages before {stage}"]
        # What a method that names no model meant then.
        latest = [name for name in context.trained if name in inputs][-1]
        mine = [name for name, method in evaluation.methods.items() if (method.model or latest) == model]
        if mine:
            return {
                "perplexity": {
                    name: {r["length"]: perplexity(recorded_nll(r)) for r in made if r["method"] == name}
                    for name in evaluation.methods
                },
                "exported_methods": [name for name in mine if evaluation.methods[name].factors == settings.factors],
            }
    return {}


def _history(context: RunContext, name: str) -> dict[str, dict[str, Any]]:
    """The stages that the model and its factors come from, in order: their settings, and what they took."""
    steps: dict[str, dict[str, Any]] = {}

    def add(stage: str) -> None:
        if stage in steps:
            return
        fingerprint = _recorded(context, stage)
        for earlier in fingerprint[f"stages before {stage}"]:
            add(earlier)
        summary = json_files.read_object(finished_file(context.workdir, stage))
        settings = flatten_dict(fingerprint[stage], sep=".")
        shown = {key: value for key, value in settings.items() if value not in ("", None) and key not in _HOUSEKEEPING}
        steps[stage] = shown | {key: summary[key] for key in _RESULTS if key in summary}

    for stage in _recorded(context, name)[f"stages before {name}"]:
        add(stage)
    return steps


def _recorded(context: RunContext, stage: str) -> dict[str, Any]:
    """The fingerprint of a stage: its settings and its input stages."""
    return json_files.read_object(started_file(context.workdir, stage))


# What a report says of an export.
_SUMMARY = {
    "folder": str,
    "architecture": str,
    "dtype": str,
    "files": [str],
    "lengths": [int],
    "dropped": {str: str},
    "costs": [dict],
}


def _load_export(settings: ExportSettings, context: RunContext, name: str, summary: dict[str, Any]) -> None:
    json_files.check(summary, _SUMMARY)
    lost = [file for file in summary["files"] if not (context.workdir / name / file).exists()]
    if lost:
        raise LookupError(f"{context.workdir / name} has lost {', '.join(lost)}")
    context.exports[name] = summary


EXPORT = Stage(
    settings=ExportSettings,
    check=_check_export,
    run=_run_export,
    load=_load_export,
    inputs=lambda s, before: [model_stage(s.model, before), *sources((s.factors,), before)],
    splits=lambda s: ("evaluation",) if s.allowed else (),
    resumes=False,
)
