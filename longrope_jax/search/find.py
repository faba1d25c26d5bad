"""A search as one function, for notebooks: model, documents and settings in, all candidates out."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.rope import RopeFactors, Trained, unscaled
from longrope_jax.runtime import processes
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.candidates import Genes, SearchState
from longrope_jax.search.methods import search, search_steps
from longrope_jax.search.objective import Objective, Term, make_terms
from longrope_jax.search.racing import score_with
from longrope_jax.search.seeds import as_genes, critical_seeds, paper_seeds, start_of_extension, yarn_grid
from longrope_jax.search.settings import SearchSettings
from longrope_jax.search.space import SearchSpace


class Prepared(NamedTuple):
    """What a search needs before its first step.

    Attributes:
        space: all candidates.
        names, seeds: the first candidates.
        terms: of the objective.
        objective: the terms on the devices.
        grid: YaRNs of the method "yarn_grid", by their parameters, see `seeds.yarn_grid`.
    """

    space: SearchSpace
    names: list[str]
    seeds: Genes
    terms: dict[str, Term]
    objective: Objective
    grid: dict[tuple[float, float, float, bool], RopeFactors]


def find_factors(
    model: Llama,
    params: dict,
    documents: Sequence[Document],
    settings: SearchSettings,
    *,
    trained: Trained | None = None,
    seeds: Mapping[str, RopeFactors] | None = None,
    tokenizer: Tokenizer | None = None,
    layout: Layout | None = None,
) -> SearchState:
    """Runs a search in memory. `.best()` of the result are the factors.

    Args:
        documents: to search on, each with a name and its tokens.
        settings: its `model`, `data`, `seeds` and `held_out_documents` are for an experiment and are not used here.
        trained: what the model was last trained with; by default it was only pretrained.
        seeds: of your own, for the target length.
        tokenizer: of the documents; it says whether windows begin with BOS, and encodes needles. The default reads
            bytes, without BOS.
        layout: of the devices.

    Raises:
        ValueError: settings, model, text and devices don't go together.
        FloatingPointError: no candidate has a finite score.
    """
    if not (settings.published or seeds):
        raise ValueError("published = () and no seeds; there is nothing to start from")
    layout, seeds = layout or Layout(), seeds or {}
    trained = trained or Trained(model.config.original_length, unscaled(model.config.head_dim))
    with layout.active():
        settings.check_layout(layout)
        prepared = prepare(model, layout, params, trained, settings, documents, tokenizer or ByteTokenizer(), seeds)
        objective, key = prepared.objective, jax.random.key(settings.seed)
        total = settings.forward_equivalents(len(objective.blocks), len(prepared.space.n_hat))
        with progress_bar("search", total) as bar:
            score = score_with(
                objective, settings.racing, progress=bar.advance, reduction_factor=settings.screening.reduction_factor
            )
            shared = prepared.seeds, prepared.space, objective, score
            steps = search_steps(settings, key, *shared, progress=bar.advance, grid=prepared.grid.values())
            return search(steps, save=lambda state: bar.show_best(state.nll.min()))


def prepare(
    model: Llama,
    layout: Layout,
    params: dict,
    trained: Trained,
    settings: SearchSettings,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    own_seeds: Mapping[str, RopeFactors],
) -> Prepared:
    """Space, seeds and objective of a search; raises ValueError where the text is too short or the space is empty."""
    space = settings.search_space(model.config, float(trained.factors.mscale))
    names, seeds = first_candidates(model.config, settings, trained, space, own_seeds)
    terms = make_terms(settings.terms, documents, tokenizer, settings.target_length, settings.documents, settings.seed)
    at_once = settings.candidates_at_once, settings.documents_at_once
    objective = Objective.of(model, layout, params, terms, *at_once, settings.screening)
    grid = {}
    if settings.method == "yarn_grid":
        start = start_of_extension(trained, model.config.original_length, settings.target_length)
        is_searched = space.mscale[0] < space.mscale[1]
        grid = yarn_grid(start, settings.target_length, model.config.head_dim, model.config.rope_theta, is_searched)
    return Prepared(space, names, seeds, terms, objective, grid)


def first_candidates(
    config: LlamaConfig,
    settings: SearchSettings,
    trained: Trained,
    space: SearchSpace,
    own_seeds: Mapping[str, RopeFactors],
) -> tuple[list[str], Genes]:
    """Names and genes of the seeds: those of the space, and `own_seeds`, at the target length."""
    if settings.space == "critical_dimension":
        constants, critical = critical_seeds(
            space, config.head_dim, settings.evolution.population, float(trained.factors.mscale), settings.seed
        )
        return as_genes(dict(own_seeds) | constants, space, [space.critical[-1]] * len(own_seeds) + critical)
    published = paper_seeds(
        *(config.head_dim, settings.target_length, config.rope_theta, config.original_length, trained, space),
        settings.published,
    )
    return as_genes(published | dict(own_seeds), space)


class ProgressBar:
    """Shows whole candidates; a race and a gradient step advance it by fractions."""

    def __init__(self, bar: tqdm, done: float):
        self._bar, self._done = bar, done

    def advance(self, candidates: float) -> None:
        """Adds finished candidates."""
        self._done += candidates
        self._bar.update(int(self._done + 1e-6) - self._bar.n)

    def show_best(self, nll: float) -> None:
        """Shows the best score so far, nats per token, as a perplexity."""
        self._bar.set_postfix(best_perplexity=f"{np.exp(nll):.3f}")


@contextlib.contextmanager
def progress_bar(name: str, total: float, done: float = 0.0) -> Iterator[ProgressBar]:
    """On the first process, of `total` candidates, of which `done` are finished."""
    with processes.progress_bar(desc=name, total=round(total), initial=int(done), unit="candidate") as bar:
        yield ProgressBar(bar, done)
