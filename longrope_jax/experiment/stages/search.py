"""The stage `search`: factors for a length, asked of a stage's model."""

import dataclasses
from typing import Any

from longrope_jax import json_files
from longrope_jax.data.windows import fixed_windows
from longrope_jax.experiment.context import BEST_SEED, RunContext, factor_file, save_factors_of, table_entry
from longrope_jax.experiment.stage import Before, Stage, factors_target, is_stage, model_stage, sources
from longrope_jax.experiment.stage_programs import search_programs
from longrope_jax.interop.factor_files import factors_for
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable, RopeFactors, load_factors
from longrope_jax.search.objective import make_terms
from longrope_jax.search.run import run_search
from longrope_jax.search.seeds import rescaled
from longrope_jax.search.settings import SearchSettings, SeedSettings


def _check_search(settings: SearchSettings, config: LlamaConfig, before: Before) -> None:
    model_stage(settings.model, before)
    if settings.target_length < config.original_length:
        raise ValueError(
            f"target_length = {settings.target_length} must not be below the model's original_length = "
            f"{config.original_length}"
        )
    settings.search_space(config)
    for name, seed in settings.seeds.items():
        if is_stage(seed.factors, before):
            factors_target(seed.factors, before, f"seeds.{name}.factors")
        else:
            _read_seed(seed, name, config, settings.target_length)


def _check_search_data(settings: SearchSettings, context: RunContext) -> None:
    documents = context.documents[settings.data]
    make_terms(
        settings.terms,
        documents["search"],
        context.tokenizer,
        settings.target_length,
        settings.documents,
        settings.seed,
    )
    if settings.held_out_documents:
        fixed_windows(documents["evaluation"], settings.target_length, settings.held_out_documents, settings.seed)


def _run_search(settings: SearchSettings, context: RunContext, name: str) -> dict[str, Any]:
    start = context.model_stage(settings.model)
    result = run_search(
        context.model,
        context.layout,
        context.params(start),
        context.trained[start],
        settings,
        context.documents[settings.data],
        context.tokenizer,
        {name: _seed(seed, name, context, settings) for name, seed in settings.seeds.items()},
        context.workdir,
        name,
    )
    scores = {"search_nll": result.best_nll, "seeds_nll": result.seeds}
    provenance = {
        "evaluations": len(result.curve),
        "forward_equivalents": result.costs[-1],
        "documents": result.documents,
        "settings": dataclasses.asdict(settings),
    }
    save_factors_of(
        context,
        name,
        result.factors,
        target_length=settings.target_length,
        method="longrope",
        model_stage=start,
        scores=scores,
        provenance=provenance,
    )
    target = settings.target_length
    save_factors_of(context, name + BEST_SEED, result.best_seed, target_length=target, model_stage=start)
    measured = (
        "seconds",
        "objective_seconds",
        "best_nll",
        "seeds",
        "curve",
        "costs",
        "dropped",
        "screening",
        "held_out",
    )
    return {
        "target_length": settings.target_length,
        "model": start,
        "method": settings.method,
        "documents": [document for names in result.documents.values() for document in names],
        "evaluations": len(result.curve),
        "population": max(settings.evolution.population, len(result.seeds) + settings.ramps),
        **{name: getattr(result, name) for name in measured},
        "yarn": list(result.yarn or ()),
    }


def _seed(seed: SeedSettings, name: str, context: RunContext, settings: SearchSettings) -> RopeFactors:
    """A seed of one's own, at the target length of the search."""
    config, target = context.model.config, settings.target_length
    if seed.factors in context.factors:
        factors, made_for = table_entry(context.factors[seed.factors], target)
        made_for = seed.target_length or made_for
    else:
        factors, made_for = _read_seed(seed, name, config, target)
    return rescaled(factors, made_for / config.original_length, target / config.original_length)


def _read_seed(seed: SeedSettings, name: str, config: LlamaConfig, target: int) -> tuple[RopeFactors, int]:
    """Factors in a file, and how long a text they were made for."""
    try:
        return table_entry(factors_for(seed.factors, config, seed.target_length or None), target)
    except ValueError as error:
        raise ValueError(f"seeds.{name}: {error}") from None


# The fields of a summary that reports read.
_SUMMARY = {
    "target_length": int,
    "model": str,
    "documents": [str],
    "evaluations": int,
    "method": str,
    "best_nll": float,
    "seeds": {str: float},
    "curve": [float],
    "costs": [float],
    "dropped": int,
    "screening": float,
    "held_out": [[float]],
    "yarn": list,
    "objective_seconds": float,
}


def _load_search(settings: SearchSettings, context: RunContext, name: str, summary: dict[str, Any]) -> None:
    json_files.check(summary, _SUMMARY)
    best, seed = (
        load_factors(factor_file(context, source), context.model.config.head_dim) for source in (name, name + BEST_SEED)
    )
    context.factors[name] = FactorTable.of({settings.target_length: best})
    context.factors[name + BEST_SEED] = FactorTable.of({settings.target_length: seed})
    found = {"lam": best.lam.tolist(), "n_hat": int(best.n_hat), "mscale": float(best.mscale)}
    context.searches.append({"stage": name, **summary, "factors": found})


def _inputs(settings: SearchSettings, before: Before) -> list[str]:
    own = tuple(seed.factors for seed in settings.seeds.values())
    return [model_stage(settings.model, before), *sources(own, before)]


SEARCH = Stage(
    settings=SearchSettings,
    check=_check_search,
    check_data=_check_search_data,
    check_layout=lambda settings, config, layout: settings.check_layout(layout),
    run=_run_search,
    load=_load_search,
    inputs=_inputs,
    programs=search_programs,
    splits=lambda settings: ("search", "evaluation") if settings.held_out_documents else ("search",),
)
