"""A search as a stage of an experiment: checkpoints, a progress bar, search.jsonl, and factors in a file at the end."""

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
from longrope_jax.runtime import preemption, records
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.candidates import SearchState, describe
from longrope_jax.search.descents import Descents
from longrope_jax.search.find import prepare
from longrope_jax.search.methods import plan, search
from longrope_jax.search.progress import open_bar
from longrope_jax.search.scores import kept, score_with
from longrope_jax.search.settings import SearchSettings


class SearchResult(NamedTuple):
    """What a search found and how it got there.

    Attributes:
        factors: of the best candidate.
        best_seed: the best of those it started from.
        best_nll: its score, nats per token.
        curve: the best score so far after every candidate.
        costs: forward equivalents spent until then, 1 for a candidate on all documents.
        seeds: score of every seed.
        dropped: candidates that a race did not read in full.
        held_out: (forward equivalents, score, NLL on held-out documents) of the best so far, whenever it changed from
            one iteration to the next.
        documents: names of the search documents, by term of the objective.
        seconds: wall time, over all processes that worked on it.
        objective_seconds: how much of it scored candidates.
    """

    factors: RopeFactors
    best_seed: RopeFactors
    best_nll: float
    curve: list[float]
    costs: list[float]
    seeds: dict[str, float]
    dropped: int
    held_out: list[tuple[float, float, float]]
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
    """Searches as the settings say; goes on from `workdir/checkpoints/<stage>` if there is something.

    The state is saved after every iteration, and every candidate is a line of `workdir/search.jsonl` with its parents,
    operator, genes, score and cost. Within an iteration scores are kept too, see `search/scores.py`, and the steps of a
    descent, see `search/descents.py`.

    Args:
        trained: what the model was last trained with; see `paper_seeds`.
        documents: by split; "search" is searched on, "evaluation" judges the best in the end if the settings say so.

    Raises:
        preemption.Preempted: the process was asked to stop; scores, steps and finished iterations are saved.
        FloatingPointError: no candidate has a finite score.
    """
    space, names, seeds, terms, objective = prepare(
        model, layout, params, trained, settings, documents["search"], tokenizer, own_seeds
    )
    log = workdir / "search.jsonl"
    directory = workdir / "checkpoints" / stage

    with (
        preemption.watch(),
        Checkpoints(directory) as checkpoints,
        Descents(workdir / "descents" / stage, stage) as descents,
    ):
        state, spent = None, {"seconds": 0.0, "objective_seconds": 0.0}
        if (latest := checkpoints.latest()) is not None:
            items, spent = checkpoints.restore(latest)
            state = SearchState(**jax.tree.map(np.asarray, items["population"]))
        known = 0 if state is None else len(state)
        records.keep(log, lambda record: record["stage"] != stage or record["candidate"] < known, {"candidate": int})
        total = settings.forward_equivalents(len(objective.blocks), len(space.n_hat))
        with open_bar(stage, total, 0.0 if state is None else float(state.cost.sum())) as bar:
            losses = kept(objective.block_nll, workdir / "scores.jsonl", stage, settings.documents_at_once)
            score = score_with(objective, settings.racing, losses, bar.advance)
            clock = time.monotonic()

            def timed(population, standing):
                began = time.monotonic()
                scores = score(population, standing)
                spent["objective_seconds"] += time.monotonic() - began
                return scores

            def save(state):
                nonlocal clock, known
                now = time.monotonic()
                spent["seconds"], clock = spent["seconds"] + now - clock, now
                # The log first: lines beyond the checkpoint are dropped on resuming, missing ones would stay missing.
                records.append(log, ({"stage": stage, **record} for record in describe(state, names, known)))
                iteration = int(state.iteration[-1])
                checkpoints.save(iteration, {"population": state.__dict__}, spent)
                known = len(state)
                bar.tell_best(state.nll.min())
                if preemption.requested() and iteration + 1 < len(moves):
                    checkpoints.latest()  # waits, and raises if it could not be saved
                    raise preemption.Preempted(stage, f"iteration {iteration} of {len(moves) - 1} is saved")

            key = jax.random.key(settings.seed)
            moves = plan(settings, key, seeds, space, objective, timed, descents, bar.advance)
            try:
                state = search(moves, state, save)
            except FloatingPointError as error:
                raise FloatingPointError(f"{stage}: {error}") from None
    records.keep(workdir / "scores.jsonl", lambda record: record["stage"] != stage)
    started = state.operator == 0
    return SearchResult(
        state.best(),
        jax.tree.map(lambda leaf: leaf[started][np.argmin(state.nll[started])], state.factors),
        float(state.nll.min()),
        np.minimum.accumulate(state.nll).tolist(),
        np.cumsum(state.cost).tolist(),
        dict(zip(names, state.nll[started].tolist(), strict=True)),
        int((np.isnan(state.documents).any(1) & ~np.isnan(state.documents).all(1)).sum()),
        _judge(model, layout, params, state, settings, documents) if settings.held_out_documents else [],
        {name: term.names for name, term in terms.items()},
        **spent,
    )


def _judge(model, layout, params, state, settings, documents) -> list[tuple[float, float, float]]:
    """The best after every iteration that found a better one, on documents that the search has not seen."""
    windows = fixed_windows(
        documents["evaluation"], settings.target_length, settings.held_out_documents, settings.seed
    ).tokens
    costs, curve = np.cumsum(state.cost), np.minimum.accumulate(state.nll)
    judged: list[tuple[float, float, float]] = []
    ends = np.flatnonzero(np.diff(state.iteration, append=state.iteration[-1] + 1))
    for end in ends:
        if judged and curve[end] == judged[-1][1]:
            continue
        factors = state.take(np.arange(end + 1)).best()
        nll = token_nll(model, layout, params, factors, windows, settings.target_length)
        judged.append((float(costs[end]), float(curve[end]), perplexity(by_document(nll)).nll))
    return judged
