"""A search as a stage of an experiment: checkpoints, a progress bar, search.jsonl, and factors in a file at the end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from longrope_jax.data.corpus import Document
from longrope_jax.data.windows import fixed_windows
from longrope_jax.model import Llama
from longrope_jax.rope import RopeFactors, Trained
from longrope_jax.runtime import preemption, processes, records
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.evolution import EvolutionSettings, SearchState, describe, search
from longrope_jax.search.objective import fitting_candidates, perplexity_objective
from longrope_jax.search.scores import kept
from longrope_jax.search.space import N_HAT, SearchSpace, paper_seeds, paper_space


@dataclass(frozen=True)
class SearchSettings:
    """What is searched for, on what, and how.

    Attributes:
        target_length: L', tokens.
        model: the stage whose parameters are asked; "" is the latest before this one.
        documents: how many windows of the target length a candidate is scored on, from different documents as far as
            there are enough.
        seed: of the windows and of the search.
        lower_bound: smallest lam (1.0 in table 4).
        upper_bound: largest lam in units of the scale L'/L (1.25 in table 4); seeds are clipped to it.
        step: of lam (0.01 in table 4).
        n_hat: numbers of start tokens to choose from; those above the original length are left out.
        candidates_at_once: how many candidates are a batch axis of the model: 1 is best on a CPU, more on an
            accelerator that one candidate does not fill.
        documents_at_once: how many documents of one candidate are evaluated together.
        evolution: the numbers of Algorithm 1.
        data: the section of the text.
    """

    target_length: int
    model: str = ""
    documents: int = 5
    seed: int = 0
    lower_bound: float = 1.0
    upper_bound: float = 1.25
    step: float = 0.01
    n_hat: tuple[int, ...] = N_HAT
    candidates_at_once: int = 1
    documents_at_once: int = 1
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    data: str = "data"

    def __post_init__(self):
        for name in ("target_length", "documents", "candidates_at_once", "documents_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError if documents can't be spread over the devices."""
        layout.check_length(self.target_length, "target_length")

    def space(self, original_length: int) -> SearchSpace:
        """All candidates for a model of this original length; raises ValueError where there are none."""
        scale = self.target_length / original_length
        return paper_space(scale, original_length, self.lower_bound, self.upper_bound, self.step, self.n_hat)


class SearchResult(NamedTuple):
    """What a search found and what it took.

    Attributes:
        factors: the best candidate.
        best_seed: the best of the seeds, what the search has to be better than.
        best_nll: its score on the search documents, nats per token.
        curve: best score so far by number of evaluations.
        seeds: score of every seed.
        documents: names of the documents that candidates were scored on.
        seconds: wall time, all processes that worked on it together; objective_seconds is the part spent scoring.
    """

    factors: RopeFactors
    best_seed: RopeFactors
    best_nll: float
    curve: list[float]
    seeds: dict[str, float]
    documents: list[str]
    seconds: float
    objective_seconds: float


def run_search(
    model: Llama,
    layout: Layout,
    params: dict,
    trained: Trained,
    settings: SearchSettings,
    documents: Sequence[Document],
    workdir: epath.Path,
    stage: str,
) -> SearchResult:
    """Algorithm 1 on the model's own perplexity; goes on from `workdir/checkpoints/<stage>` if there is something.

    The state is saved after every iteration, and every candidate is a line of `workdir/search.jsonl` with its parents,
    operator, genes and score. Scores within an iteration are kept too, see `search/scores.py`.

    Args:
        trained: what the model was last trained with; see `paper_seeds`.

    Raises:
        preemption.Preempted: the process was asked to stop; scores and finished iterations are saved.
    """
    config = model.config
    space = settings.space(config.original_length)
    seeds = paper_seeds(
        config.head_dim, settings.target_length, config.rope_theta, config.original_length, trained, space
    )
    mscale = np.float32(trained.factors.mscale)
    windows = fixed_windows(documents, settings.target_length, settings.documents, settings.seed)
    log = workdir / "search.jsonl"

    with preemption.watch(), Checkpoints(workdir / "checkpoints" / stage) as checkpoints:
        state, spent = None, {"seconds": 0.0, "objective_seconds": 0.0}
        if checkpoints.latest() is not None:
            items, spent = checkpoints.restore(checkpoints.latest())
            state = SearchState(**jax.tree.map(np.asarray, items["population"]))
        known = 0 if state is None else len(state.nll)
        records.keep(log, lambda record: record["stage"] != stage or record["candidate"] < known)
        with tqdm(
            total=settings.evolution.evaluations,
            initial=known,
            desc=stage,
            unit="candidate",
            dynamic_ncols=True,
            disable=not processes.is_first(),
        ) as bar:
            objective = perplexity_objective(
                model,
                layout,
                params,
                windows.tokens,
                settings.candidates_at_once,
                settings.documents_at_once,
                bar.update,
            )
            together = fitting_candidates(layout, settings.candidates_at_once, settings.documents_at_once)
            objective = kept(objective, together, workdir / "scores.jsonl", stage, bar.update)
            clock = time.monotonic()

            def score(population):
                began = time.monotonic()
                nll = objective(population.replace(mscale=np.full(len(population.n_hat), mscale)))
                spent["objective_seconds"] += time.monotonic() - began
                return nll

            def save(state):
                nonlocal clock, known
                now = time.monotonic()
                spent["seconds"], clock = spent["seconds"] + now - clock, now
                # The log first: lines beyond the checkpoint are dropped on resuming, missing ones would stay missing.
                records.append(log, ({"stage": stage, **record} for record in describe(state, list(seeds), known)))
                iteration = int(state.iteration[-1])
                checkpoints.save(iteration, {"population": state.__dict__}, spent)
                known = len(state.nll)
                bar.set_postfix(best_perplexity=f"{np.exp(state.nll.min()):.3f}")
                if preemption.requested() and iteration < settings.evolution.iterations:
                    checkpoints.latest()  # waits, and raises if it could not be saved
                    raise preemption.Preempted(
                        stage, f"iteration {iteration} of {settings.evolution.iterations} is saved"
                    )

            state = search(jax.random.key(settings.seed), seeds, space, settings.evolution, score, state, save)
    if not np.isfinite(state.nll.min()):
        raise FloatingPointError(f"{stage}: not one of {len(state.nll)} candidates has a finite score")

    return SearchResult(
        state.best().replace(mscale=mscale),
        list(seeds.values())[int(np.argmin(state.nll[: len(seeds)]))],
        float(state.nll.min()),
        np.minimum.accumulate(state.nll).tolist(),
        {name: float(nll) for name, nll in zip(seeds, state.nll, strict=False)},
        windows.names,
        **spent,
    )
