"""Skipped positions: what is read of a document, what it says of a score, and who is left out by it."""

import jax
import numpy as np
import pytest
import tiny_model

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.model.flops import count_flops
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.search.candidates import Genes, Incumbents, new_candidates
from longrope_jax.search.objective import Block, Objective, ScreeningSettings, TermSettings, perplexity_term
from longrope_jax.search.racing import estimate, score_with
from longrope_jax.search.settings import SearchSettings

POPULATION = tiny_model.population()


def test_the_pieces_are_evenly_spread_from_the_first_token_to_the_last():
    positions = ScreeningSettings(share=0.25, pieces=4).positions(80)
    pieces = positions.reshape(4, 5)
    assert (np.diff(pieces) == 1).all() and pieces[0, 0] == 0 and pieces[-1, -1] == 79
    assert set(np.diff(pieces[:, 0])) == {25}
    assert len(np.unique(ScreeningSettings(share=0.5, pieces=8).positions(1152))) == 576


def test_what_cannot_be_screened_is_refused():
    tenth = ScreeningSettings(share=0.1, pieces=6)
    with pytest.raises(ValueError, match=r"share = 0.01 of 72 tokens has none for each of pieces = 8"):
        SearchSettings(target_length=64, screening=ScreeningSettings(share=0.01))
    with pytest.raises(ValueError, match=r"screening.share = 0.1 is not for method = 'cma_es'"):
        SearchSettings(target_length=64, method="cma_es", screening=tenth)
    with pytest.raises(ValueError, match=r"not for objective.far.kind = 'needle'"):
        SearchSettings(target_length=640, objective={"far": TermSettings("needle")}, screening=tenth)
    layout = Layout.of(MeshSettings("seq:4"))
    with pytest.raises(ValueError, match=r"screening: tokens of all pieces = 114 can't be split over seq:4"):
        SearchSettings(target_length=1024, screening=tenth).check_layout(layout)


def losses_at(positions, term):
    """Of every candidate on every document, from the logits of one sequence with gaps, in float64."""
    model, params = tiny_model.make()
    apply = jax.jit(lambda tokens, factors, places: model.apply({"params": params}, tokens, factors, places))
    places = np.broadcast_to(positions, (len(term.tokens), len(positions)))
    found = []
    for row in range(len(POPULATION.lam)):
        factors = jax.tree.map(lambda leaf, row=row: np.asarray(leaf)[row], POPULATION)
        logits = np.asarray(apply(term.tokens[:, positions], factors, places), np.float64)
        likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found.append(-np.take_along_axis(likely, term.tokens[:, positions + 1, None], axis=-1)[..., 0].mean(1))
    return np.array(found)


@pytest.mark.parametrize("mesh", ["data:1", "data:2,seq:2", "seq:4"])
def test_a_screen_is_the_loss_of_the_pieces_at_their_true_positions(mesh):
    model, params = tiny_model.make()
    term = tiny_model.make_term(3, 64)
    screening, layout = ScreeningSettings(share=0.25, pieces=4), Layout.of(MeshSettings(mesh))
    with layout.active():
        objective = Objective.of(model, layout, params, {"text": term}, 2, 2, screening)
        scores = score_with(objective)(POPULATION, None)
    expected = losses_at(screening.positions(64), term)
    np.testing.assert_allclose(scores.screens, expected.mean(1), rtol=1e-5)
    near = losses_at(np.arange(16), term)
    assert np.abs(near - expected).max() > 1e-3
    whole, part = (count_flops(model.config, 1, length).total for length in (64, 16))
    np.testing.assert_allclose(scores.cost, 1 + part / whole)


def test_scores_and_screens_with_bos_are_the_loss_of_text_after_it():
    rng, documents = np.random.default_rng(3), []
    for name in "ab":
        documents.append(Document(name, rng.integers(0, tiny_model.VOCABULARY - 1, 200).astype(np.uint16), 200))
    tokenizer = ByteTokenizer()
    tokenizer.window_bos = tiny_model.VOCABULARY - 1
    term = perplexity_term(documents, tokenizer, 64, 2, seed=0)
    assert (term.tokens == tokenizer.window_bos).sum() == (term.tokens[:, 0] == tokenizer.window_bos).sum() == 2
    model, params = tiny_model.make()
    screening = ScreeningSettings(share=0.25, pieces=4)
    scores = score_with(Objective.of(model, Layout(), params, {"text": term}, 2, 2, screening))(POPULATION, None)
    np.testing.assert_allclose(scores.documents, losses_at(np.arange(64), term), rtol=1e-5)
    np.testing.assert_allclose(scores.screens, losses_at(screening.positions(64), term).mean(1), rtol=1e-5)


def factors(*lam):
    """Candidates whose lambda is the same for all pairs."""
    lam = np.repeat(np.array(lam, np.float32)[:, None], 4, axis=1)
    return RopeFactors(lam, np.zeros(len(lam), int), np.ones(len(lam), np.float32))


# Sixteen candidates that were read both ways: eight with small factors, whose screens are 1 too low, and eight with
# large ones, whose screens are 3 too low.
READ = factors(*np.linspace(1, 1.1, 8), *np.linspace(6, 7, 8))
INCUMBENTS = Incumbents(np.arange(16)[:, None] + np.full(4, 5.0), 20.0, 5.0, READ, np.repeat([1.0, 3.0], 8))


def test_a_screen_is_corrected_by_the_candidates_nearest_to_it():
    found = estimate(np.array([4.0, 4.0, 2.0]), factors(1.05, 6.4, 6.1), INCUMBENTS)
    np.testing.assert_allclose(found, [5.0, 7.0, 5.0])


def test_all_that_were_read_correct_screens_and_only_the_full_ones_are_incumbents():
    state = new_candidates(Genes(*jax.tree.leaves(READ), np.zeros(16, int)), "seed", 2)
    documents = np.full((16, 2), 6.0)
    documents[8:12, 1] = np.nan  # a race decided
    documents[12:] = np.nan  # a screen did
    nll = np.linspace(6, 7, 16)
    found = state.replace(documents=documents, nll=nll, screens=nll - np.arange(16)).incumbents(6.5)
    assert found.documents.shape == (8, 2)
    np.testing.assert_allclose(found.bias, np.arange(12), atol=1e-9)
    np.testing.assert_array_equal(found.read.lam, READ.lam[:12])
    assert len(state.incumbents(6.5).bias) == 0


class Made:
    """Losses in numbers: four blocks of a document each, and their skipped positions at a tenth of the cost."""

    candidates_at_once, weights = 2, np.full(4, 1 / 4)

    def __init__(self, losses, screens):
        self.losses = np.concatenate([losses, screens], axis=1)
        self.blocks = [Block(np.array([document]), 10, None, ()) for document in range(4)]
        self.screens = [Block(np.array([document]), 1, None, ()) for document in range(4)]
        self.asked = []

    def block_nll(self, block, population):
        self.asked += [(block, int(row)) for row in population.n_hat]
        return self.losses[np.asarray(population.n_hat)][:, [block]]


def test_one_of_so_many_candidates_is_read_and_no_other_ranks_before_them():
    losses = np.repeat([[5.0], [6.0], [4.9], [np.inf], [7.0], [4.0]], 4, axis=1)
    screens = losses - 1
    screens[5] = 8  # looks bad, but is not: that is the risk
    screens[1] = 3.5  # looks best
    made, progress = Made(losses, screens), []
    candidates = factors(*[1.05] * 6).replace(n_hat=np.arange(6))
    found = score_with(made, progress=progress.append, reduction_factor=3)(candidates, INCUMBENTS)
    np.testing.assert_array_equal(np.isnan(found.documents).all(1), [True, False, False, True, True, True])
    np.testing.assert_allclose(found.screens, [4.0, 3.5, 3.9, np.inf, 6.0, 8.0])
    # The first has an estimate of 5, below 5.45, the median of those that were read.
    np.testing.assert_allclose(found.nll, [5.45, 6.0, 4.9, np.inf, 7.0, 9.0])
    np.testing.assert_allclose(found.cost, [0.1, 1.1, 1.1, 0.1, 0.1, 0.1])
    assert sum(progress) == pytest.approx(6) and len(made.asked) == 4 * 6 + 2 * 4
    # Without candidates that were read both ways all are read, and both scores are known of all.
    unknown = INCUMBENTS._replace(read=factors(), bias=np.zeros(0)), INCUMBENTS._replace(read=None, bias=None)
    for incumbents in (None, *unknown):
        everyone = score_with(Made(losses, screens), reduction_factor=3)(candidates, incumbents)
        assert not np.isnan(everyone.documents).any() and not np.isnan(everyone.screens).any()


def test_the_first_ramps_are_screened_too():
    """As soon as the seeds were read; there are too few incumbents for a race then, and no threshold."""
    few = INCUMBENTS._replace(documents=INCUMBENTS.documents[:3], threshold=np.inf)
    losses = np.arange(5.0, 69.0)[:, None] + np.zeros(4)
    made = Made(losses, losses - 1)
    found = score_with(made, racing=0.9, reduction_factor=16)(factors(*[1.05] * 64).replace(n_hat=np.arange(64)), few)
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(found.documents).any(1)), np.arange(4))
    np.testing.assert_array_equal(found.nll[:4], losses[:4, 0])


def test_the_best_candidate_was_read_even_if_a_single_one_was_promoted():
    screens = np.repeat([[3.0], [2.0]], 4, axis=1)
    made = Made(np.repeat([[5.0], [6.0]], 4, axis=1), screens)
    found = score_with(made, reduction_factor=2)(factors(1.05, 1.05).replace(n_hat=np.arange(2)), INCUMBENTS)
    assert np.isnan(found.documents[0]).all() and found.nll[1] == 6.0  # the first has an estimate of 4
    assert np.argmin(found.nll) == 1 and found.nll[0] == pytest.approx(6.0)
