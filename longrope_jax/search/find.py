"""A search as one function, for notebooks: model, documents and settings in, all candidates out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.rope import RopeFactors, Trained, unscaled
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.candidates import Genes, SearchState
from longrope_jax.search.methods import plan, search
from longrope_jax.search.objective import Objective
from longrope_jax.search.progress import open_bar
from longrope_jax.search.scores import score_with
from longrope_jax.search.seeds import as_genes, critical_seeds, paper_seeds
from longrope_jax.search.settings import SearchSettings
from longrope_jax.search.space import SearchSpace
from longrope_jax.search.terms import Term, make_terms


class Prepared(NamedTuple):
    """What a search needs before its first move.

    Attributes:
        space: all candidates.
        names, seeds: what it starts from.
        terms: what candidates are asked.
        objective: the same on the devices.
    """

    space: SearchSpace
    names: list[str]
    seeds: Genes
    terms: dict[str, Term]
    objective: Objective


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
    """Searches as the settings say, in memory; `.best()` of what comes out are the factors.

    Args:
        documents: to search on, each with a name and its tokens.
        settings: its `model`, `data`, `seeds` and `held_out_documents` are about an experiment and mean nothing here.
        trained: what the model was last trained with; without it that it was pretrained, and nothing else.
        seeds: of one's own, for the target length.
        tokenizer: of the documents, for needles; without it bytes.
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
        with open_bar("search", total) as bar:
            score = score_with(objective, settings.racing, progress=bar.advance)
            moves = plan(settings, key, prepared.seeds, prepared.space, objective, score, progress=bar.advance)
            return search(moves, save=lambda state: bar.tell_best(state.nll.min()))


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
    """Space, seeds and objective of a search; raises ValueError where the text or the space does not suffice."""
    space = settings.search_space(model.config, float(trained.factors.mscale))
    names, seeds = starting_genes(model.config, settings, trained, space, own_seeds)
    terms = make_terms(settings.terms, documents, tokenizer, settings.target_length, settings.documents, settings.seed)
    objective = Objective.of(model, layout, params, terms, settings.candidates_at_once, settings.documents_at_once)
    return Prepared(space, names, seeds, terms, objective)


def starting_genes(
    config: LlamaConfig,
    settings: SearchSettings,
    trained: Trained,
    space: SearchSpace,
    own: Mapping[str, RopeFactors],
) -> tuple[list[str], Genes]:
    """Names and genes of what a search starts from; `own` are the seeds that the settings name, as they are used."""
    if settings.space == "critical_dimension":
        constants, critical = critical_seeds(
            space, config.head_dim, settings.evolution.population, float(trained.factors.mscale), settings.seed
        )
        return as_genes(dict(own) | constants, space, [space.critical[-1]] * len(own) + critical)
    published = paper_seeds(
        *(config.head_dim, settings.target_length, config.rope_theta, config.original_length, trained, space),
        settings.published,
    )
    return as_genes(published | dict(own), space)
