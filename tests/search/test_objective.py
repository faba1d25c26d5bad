"""The score of candidates by a real, tiny model: the same on any devices and in any chunks, compiled once a length."""

import jax
import numpy as np
import pytest
import tiny_model

from longrope_jax import rope
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.search import objective as objectives
from longrope_jax.search.methods import search, search_steps
from longrope_jax.search.racing import score_with
from longrope_jax.search.seeds import as_genes, paper_seeds
from longrope_jax.search.settings import EvolutionSettings, SearchSettings
from longrope_jax.search.space import paper_space

POPULATION = tiny_model.population()
ONE = {"perplexity": tiny_model.make_term(3, 64, seed=1)}
# Other lengths, numbers of documents and weights; the second one counts three times as much as the first.
MIX = {
    "perplexity": tiny_model.make_term(3, 64, seed=1),
    "needle": tiny_model.make_term(2, 32, seed=2, share=3.0, last=5),
}


@pytest.fixture(scope="module")
def expected():
    """Losses of both terms on all documents, straight from the logits."""
    losses = tiny_model.losses_by_hand(MIX, POPULATION)
    assert len(set(np.round(losses[:, :3].mean(1), 5))) == 4
    return losses


def part(population, rows):
    return jax.tree.map(lambda leaf: leaf[rows], population)


@pytest.mark.parametrize(("candidates", "documents"), [(1, 1), (3, 1), (1, 2), (3, 2), (1, 5), (5, 5)])
def test_objective_is_the_mean_nll_whatever_is_scored_at_once(expected, candidates, documents):
    progress, expected = [], expected[:, :3]
    score = score_with(tiny_model.make_objective(ONE, candidates, documents), progress=progress.append)
    scores = score(POPULATION, None)
    np.testing.assert_allclose(scores.nll, expected.mean(1), rtol=1e-6)
    np.testing.assert_allclose(scores.documents, expected, rtol=1e-6)
    np.testing.assert_allclose(scores.cost, 1)
    assert sum(progress) == pytest.approx(4)
    alone = score(part(POPULATION, slice(2, 3)), None)
    np.testing.assert_allclose(alone.nll, expected.mean(1)[2:3], rtol=1e-6)


@pytest.mark.parametrize(("candidates", "documents"), [(1, 1), (3, 2)])
def test_a_mix_is_the_weighted_mean_of_its_terms(expected, candidates, documents):
    objective = tiny_model.make_objective(MIX, candidates, documents)
    np.testing.assert_allclose(objective.weights, [1 / 12] * 3 + [3 / 8] * 2)
    scores = score_with(objective)(POPULATION, None)
    np.testing.assert_allclose(scores.documents, expected, rtol=1e-5)
    np.testing.assert_allclose(scores.nll, expected[:, :3].mean(1) / 4 + 3 * expected[:, 3:].mean(1) / 4, rtol=1e-5)


@pytest.mark.parametrize(("candidates", "documents"), [(1, 2), (3, 2)])
def test_objective_on_a_mesh_is_the_same(expected, candidates, documents):
    layout = Layout.of(MeshSettings("data:2,seq:2"))
    with layout.active():
        scores = score_with(tiny_model.make_objective(MIX, candidates, documents, layout))(POPULATION, None)
    np.testing.assert_allclose(scores.documents, expected, rtol=1e-5)
    np.testing.assert_allclose(scores.nll, expected @ ([1 / 12] * 3 + [3 / 8] * 2), rtol=1e-5)


def test_a_whole_search_compiles_the_objective_once_a_length():
    lengths = {"perplexity": 24, "needle": 40}  # shapes of this test's own
    terms = {name: tiny_model.make_term(3, length) for name, length in lengths.items()}
    objective, progress, space = tiny_model.make_objective(terms, 4, 2), [], paper_space(2.0, 16)
    before = objectives.rows_nll._cache_size()
    settings = SearchSettings(
        target_length=32,
        evolution=EvolutionSettings(population=16, mutations=6, crossovers=6, parents=8, iterations=2),
    )
    _, seeds = as_genes(paper_seeds(8, 32, 10000.0, 16, rope.Trained(16, rope.unscaled(8)), space), space)
    score = score_with(objective, progress=progress.append)
    state = search(search_steps(settings, jax.random.key(0), seeds, space, objective, score))
    assert objectives.rows_nll._cache_size() == before + 2
    assert len(state) == settings.evolution.evaluations and sum(progress) == pytest.approx(len(state))
    assert state.nll.min() <= state.nll[:3].min()


def test_a_score_that_is_no_number_is_the_worst_and_reported(caplog):
    _, params = tiny_model.make()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    scores = score_with(tiny_model.make_objective(ONE, params=broken))(POPULATION, None)
    assert (scores.nll == np.inf).all() and (scores.documents == np.inf).all()
    assert "1 of 1 candidates have a loss that is not a number on documents [2]" in caplog.text


def test_a_candidate_that_overflows_does_not_spoil_the_others(expected, caplog):
    spoilt = POPULATION.replace(mscale=np.array([1, np.inf, 1, 1.3], np.float32))
    scores = score_with(tiny_model.make_objective(MIX, 4, 2))(spoilt, None)
    assert scores.nll[1] == np.inf
    np.testing.assert_allclose(scores.documents[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-5)
    assert "1 of 4 candidates have a loss that is not a number" in caplog.text


@pytest.mark.parametrize("what", ["replicate", "place"])
def test_scoring_takes_nothing_from_the_host_unasked(monkeypatch, what):
    monkeypatch.setattr(Layout, what, lambda self, tree: tree)
    score = score_with(tiny_model.make_objective(ONE))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        score(POPULATION, None)
