"""A search as a stage of an experiment, with checkpoints, a progress bar and a log in search.jsonl."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import by_document, perplexity, token_nll
from longrope_jax.model import Llama
from longrope_jax.rope import RopeFactors, Trained
from longrope_jax.runtime import json_lines, preemption
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.candidates import SearchState, describe
from longrope_jax.search.find import prepare, progress_bar
from longrope_jax.search.gradient import RefinementCheckpoint
from longrope_jax.search.methods import search, search_steps
from longrope_jax.search.racing import cached, score_with
from longrope_jax.search.settings import SearchSettings


class SearchResult(NamedTuple):
    """What a search found, and how.

    Attributes:
        factors: of the best candidate.
        best_seed: the best seed.
        best_nll: its score, nats per token.
        curve: the best score so far after every candidate.
        costs: forward equivalents spent so far, after every candidate.
        seeds: score of every seed.
        dropped: candidates that were not read in full.
        screening: forward equivalents of a candidate on skipped positions; 0 without them.
        held_out: (forward equivalents, score, NLL on held-out documents) of the best so far, after every iteration
            that found a better one.
        yarn: (beta_fast, beta_slow, scale, with YaRN's temperature) of the factors, if a grid of YaRNs has them.
        documents: names of the search documents, by term of the objective.
        seconds: wall time, over all runs of the process.
        objective_seconds: the part that scored candidates.
    """

    factors: RopeFactors
    best_seed: RopeFactors
    best_nll: float
    curve: list[float]
    costs: list[float]
    seeds: dict[str, float]
    dropped: int
    screening: float
    held_out: list[tuple[float, float, float]]
    yarn: tuple[float, float, float, bool] | None
    documents: dict[str, list[str]]
    seconds: float
    objective_seconds: float


def run_search(
    model: Llama,
    layout: Layout,
    params: dict,
    trained: Trained,
    settings: SearchSettings,
    documents: Mapping[str, Sequence[Document]],
    tokenizer: Tokenizer,
    own_seeds: Mapping[str, RopeFactors],
    workdir: epath.Path,
    stage: str,
) -> SearchResult:
    """Runs a search, or continues the one in `workdir/checkpoints/<stage>`.

    The state is saved after every iteration, and every candidate is a line of `workdir/search.jsonl` with its parents,
    operator, genes, score and cost. Within an iteration, scores (see `racing.cached`) and gradient steps (see
    `gradient.RefinementCheckpoint`) are saved too.

    Args:
        trained: what the model was last trained with; see `paper_seeds`.
        documents: by split; "search" is searched on, "evaluation" has the held-out documents.

    Raises:
        preemption.Preempted: the process was asked to stop; scores, steps and finished iterations are saved.
        FloatingPointError: no candidate has a finite score.
    """
    space, names, seeds, terms, objective, grid = prepare(
        model, layout, params, trained, settings, documents["search"], tokenizer, own_seeds
    )
    log = workdir / "search.jsonl"
    directory = workdir / "checkpoints" / stage

    with (
        preemption.watch(),
        Checkpoints(directory) as checkpoints,
        RefinementCheckpoint(workdir / "refinements" / stage, stage) as refinement,
    ):
        state, spent = None, {"seconds": 0.0, "objective_seconds": 0.0}
        if (latest := checkpoints.latest()) is not None:
            items, spent = checkpoints.restore(latest)
            state = SearchState(**jax.tree.map(np.asarray, items["population"]))
        known = 0 if state is None else len(state)
        json_lines.keep(log, lambda record: record["stage"] != stage or record["candidate"] < known, {"candidate": int})
        total = settings.forward_equivalents(len(objective.blocks), len(space.n_hat))
        with progress_bar(stage, total, 0.0 if state is None else float(state.cost.sum())) as bar:
            losses = cached(objective.block_nll, workdir / "scores.jsonl", stage, settings.documents_at_once)
            score = score_with(objective, settings.racing, losses, bar.advance, settings.screening.reduction_factor)
            clock = time.monotonic()

            def timed(population, incumbents):
                started = time.monotonic()
                scores = score(population, incumbents)
                spent["objective_seconds"] += time.monotonic() - started
                return scores

            def save(state):
                nonlocal clock, known
                now = time.monotonic()
                spent["seconds"], clock = spent["seconds"] + now - clock, now
                # The log first: a resumed search drops lines beyond the checkpoint, but cannot add missing ones.
                json_lines.append(log, ({"stage": stage, **record} for record in describe(state, names, known)))
                iteration = int(state.iteration[-1])
                checkpoints.save(iteration, {"population": state.__dict__}, spent)
                known = len(state)
                bar.show_best(state.nll.min())
                if preemption.requested() and iteration + 1 < len(steps):
                    raise preemption.Preempted(stage, f"iteration {iteration} of {len(steps) - 1} is saved")

            key = jax.random.key(settings.seed)
            steps = search_steps(settings, key, seeds, space, objective, timed, refinement, bar.advance, grid.values())
            try:
                state = search(steps, state, save)
            except FloatingPointError as error:
                raise FloatingPointError(f"{stage}: {error}") from None
    json_lines.keep(workdir / "scores.jsonl", lambda record: record["stage"] != stage)
    is_seed = state.operator == 0
    return SearchResult(
        state.best(),
        jax.tree.map(lambda leaf: leaf[is_seed][np.argmin(state.nll[is_seed])], state.factors),
        float(state.nll.min()),
        np.minimum.accumulate(state.nll).tolist(),
        np.cumsum(state.cost).tolist(),
        dict(zip(names, state.nll[is_seed].tolist(), strict=True)),
        int(np.isnan(state.documents).any(1).sum()),
        sum(block.flops for block in objective.screens) / sum(block.flops for block in objective.blocks),
        _held_out(model, layout, params, state, settings, documents, tokenizer.window_bos)
        if settings.held_out_documents
        else [],
        next((key for key, yarn in grid.items() if np.allclose(yarn.lam, state.best().lam)), None),
        {name: term.names for name, term in terms.items()},
        **spent,
    )


def _held_out(model, layout, params, state, settings, documents, bos) -> list[tuple[float, float, float]]:
    """The best after every iteration that found a better one, on documents that the search does not read."""
    windows = fixed_windows(
        documents["evaluation"], settings.target_length, settings.held_out_documents, settings.seed
    ).tokens
    costs, curve = np.cumsum(state.cost), np.minimum.accumulate(state.nll)
    found: list[tuple[float, float, float]] = []
    ends = np.flatnonzero(np.diff(state.iteration, append=state.iteration[-1] + 1))
    for end in ends:
        if found and curve[end] == found[-1][1]:
            continue
        factors = state.take(np.arange(end + 1)).best()
        nll = token_nll(model, layout, params, factors, windows, settings.target_length, bos=bos)
        found.append((float(costs[end]), float(curve[end]), perplexity(by_document(nll)).nll))
    return found
