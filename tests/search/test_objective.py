"""The score of candidates by a real, tiny model: the same on any devices and in any chunks, compiled once."""

import jax
import numpy as np
import pytest

import longrope_jax as lr
from longrope_jax import rope
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.search import objective as objectives
from longrope_jax.search.evolution import EvolutionSettings, search
from longrope_jax.search.space import paper_seeds, paper_space

SETTINGS = EvolutionSettings(population=16, mutations=6, crossovers=6, parents=8, iterations=2)
POPULATION = rope.stack(
    [
        rope.unscaled(8),
        rope.linear(8, 4.0),
        rope.ntk(8, 4.0).replace(n_hat=np.int32(4)),
        rope.yarn(8, 4.0, original_length=16).replace(mscale=np.float32(1.3)),
    ]
)


@pytest.fixture(scope="module")
def tiny():
    """A model with random parameters, and three documents."""
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1)
    model = lr.Llama(lr.LlamaConfig(**sizes, head_dim=8, original_length=16))
    tokens = np.random.default_rng(1).integers(0, 31, (3, 65))
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :-1], rope.unscaled(8))["params"]
    return model, params, tokens


@pytest.fixture(scope="module")
def expected(tiny):
    """Mean NLL of every candidate, straight from the logits."""
    model, params, tokens = tiny
    logits_of = jax.jit(lambda factors: jax.nn.log_softmax(model.apply({"params": params}, tokens[:, :-1], factors)))
    scores = []
    for row in range(4):
        logits = logits_of(jax.tree.map(lambda leaf, row=row: leaf[row], POPULATION))
        scores.append(-np.take_along_axis(np.asarray(logits, np.float64), tokens[:, 1:, None], axis=-1).mean())
    assert len(set(np.round(scores, 5))) == 4
    return scores


@pytest.mark.parametrize(("candidates", "documents"), [(1, 1), (3, 1), (1, 2), (3, 2), (1, 5), (5, 5)])
def test_objective_is_the_mean_nll_whatever_is_scored_at_once(tiny, expected, candidates, documents):
    model, params, tokens = tiny
    progress = []
    score = objectives.perplexity_objective(model, Layout(), params, tokens, candidates, documents, progress.append)
    np.testing.assert_allclose(score(POPULATION), expected, rtol=1e-6)
    assert sum(progress) == 4
    np.testing.assert_allclose(score(jax.tree.map(lambda leaf: leaf[2:3], POPULATION)), expected[2:3], rtol=1e-6)


@pytest.mark.parametrize(("candidates", "documents"), [(1, 2), (3, 2)])
def test_objective_on_a_mesh_is_the_same(tiny, expected, candidates, documents):
    model, params, tokens = tiny
    layout = Layout.of(MeshSettings("data:2,seq:2"))
    with layout.active():
        score = objectives.perplexity_objective(model, layout, params, tokens, candidates, documents)
        np.testing.assert_allclose(score(POPULATION), expected, rtol=1e-5)


def test_a_whole_search_compiles_the_objective_once(tiny):
    model, params, tokens = tiny
    tokens = tokens[:, :33]  # a shape of this test's own
    before, scored = objectives.rows_nll._cache_size(), []
    score = objectives.perplexity_objective(model, Layout(), params, tokens, 4, 1, scored.append)
    space = paper_space(2.0, 16)
    seeds = paper_seeds(8, 32, 10000.0, 16, rope.Trained(16, rope.unscaled(8)), space)
    state = search(jax.random.key(0), seeds, space, SETTINGS, score)
    assert objectives.rows_nll._cache_size() == before + 1
    assert sum(scored) == len(state.nll) == SETTINGS.evaluations
    assert state.nll.min() <= state.nll[:3].min()


def test_a_score_that_is_no_number_is_the_worst(tiny):
    model, params, tokens = tiny
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    score = objectives.perplexity_objective(model, Layout(), broken, tokens, 1, 1)
    assert score(rope.stack([rope.unscaled(8)])) == np.inf


@pytest.mark.parametrize("what", ["replicate", "place"])
def test_scoring_takes_nothing_from_the_host_unasked(tiny, monkeypatch, what):
    model, params, tokens = tiny
    monkeypatch.setattr(Layout, what, lambda self, tree: tree)
    score = objectives.perplexity_objective(model, Layout(), params, tokens, 1, 1)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        score(POPULATION)
