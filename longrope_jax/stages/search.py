"""The stage `search`: factors for a length, asked of a stage's model."""

import dataclasses
from typing import Any

from longrope_jax.data.windows import fixed_windows
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.run import SearchSettings, run_search
from longrope_jax.stages.carried import BEST_SEED, Carried, load_stage_factors, save_stage_factors
from longrope_jax.stages.kind import Before, Stage, model_stage
from longrope_jax.stages.programs import search_programs


def _check_search(settings: SearchSettings, config: LlamaConfig, before: Before) -> None:
    model_stage(settings.model, before)
    if settings.target_length < config.original_length:
        raise ValueError(
            f"target_length = {settings.target_length} must not be below the model's original_length = "
            f"{config.original_length}"
        )
    settings.space(config.original_length)


def _check_search_data(settings: SearchSettings, carried: Carried) -> None:
    fixed_windows(carried.documents[settings.data]["search"], settings.target_length, settings.documents, settings.seed)


def _check_search_layout(settings: SearchSettings, config: LlamaConfig, layout: Layout) -> None:
    settings.check_layout(layout)


def _run_search(settings: SearchSettings, carried: Carried, name: str) -> dict[str, Any]:
    start = carried.model_stage(settings.model)
    result = run_search(
        carried.model,
        carried.layout,
        carried.params(start),
        carried.trained[start],
        settings,
        carried.documents[settings.data]["search"],
        carried.workdir,
        name,
    )
    scores = {"search_nll": result.best_nll, "seeds_nll": result.seeds}
    provenance = {
        "evaluations": len(result.curve),
        "documents": result.documents,
        "settings": dataclasses.asdict(settings),
    }
    save_stage_factors(
        carried,
        name,
        result.factors,
        settings.target_length,
        method="longrope",
        model_stage=start,
        scores=scores,
        provenance=provenance,
    )
    save_stage_factors(carried, name + BEST_SEED, result.best_seed, settings.target_length, model_stage=start)
    return {
        "target_length": settings.target_length,
        "model": start,
        "documents": result.documents,
        "evaluations": len(result.curve),
        "population": settings.evolution.population,
        "seconds": result.seconds,
        "objective_seconds": result.objective_seconds,
        "best_nll": result.best_nll,
        "seeds": result.seeds,
        "curve": result.curve,
    }


def _load_search(settings: SearchSettings, carried: Carried, name: str, summary: dict[str, Any]) -> None:
    factors = carried.factors[name] = load_stage_factors(carried, name)
    carried.factors[name + BEST_SEED] = load_stage_factors(carried, name + BEST_SEED)
    carried.targets |= {name: settings.target_length, name + BEST_SEED: settings.target_length}
    told = {"lam": factors.lam.tolist(), "n_hat": int(factors.n_hat), "mscale": float(factors.mscale)}
    carried.searches.append({"stage": name, **summary, "factors": told})


SEARCH = Stage(
    SearchSettings,
    _check_search,
    _check_search_data,
    _check_search_layout,
    _run_search,
    _load_search,
    inputs=lambda s, before: [model_stage(s.model, before)],
    programs=search_programs,
    splits=lambda settings: ("search",),
)
