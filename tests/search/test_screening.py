"""Skipped positions: what is read of a document, what it says of a score, and who is left out by it."""

import jax
import numpy as np
import pytest
import tiny_model

from longrope_jax.model.flops import count_flops
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.search.candidates import Incumbents
from longrope_jax.search.objective import Block, Objective, ScreeningSettings, TermSettings
from longrope_jax.search.racing import score_with, screen
from longrope_jax.search.settings import SearchSettings

POPULATION = tiny_model.population()
EVEN = np.full(4, 1 / 4)


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


def incumbents(bias, spread, count=16):
    """The scores are 5 and more; a screen is as much below as its bias, up to its spread."""
    scores = 5 + np.arange(count) / 100
    noise = spread * np.array([-1, 1] * (count // 2))
    return Incumbents(np.repeat(scores[:, None], 4, axis=1), scores[-1], scores[0], scores - bias + noise)


def test_the_incumbents_tell_the_bias_of_a_screen_and_its_error():
    """Their scores are 5 to 5.15: of candidates above, and of those between, it is known that they are."""
    known = incumbents(bias=1.0, spread=1e-6)
    score, decided = screen(np.array([3.9, 4.1, 4.15, 4.3]), known, EVEN, 0.9)
    np.testing.assert_allclose(score, [4.9, 5.1, 5.15, 5.3], atol=1e-5)
    np.testing.assert_array_equal(decided, [False, True, False, True])
    noisy, screens = incumbents(bias=1.0, spread=0.1), np.linspace(3, 5, 101)
    few = [screen(screens, noisy, EVEN, level)[1].sum() for level in (0.5, 0.8, 0.99)]
    assert few[0] > few[1] > few[2] > 0
    assert few[0] == (screens + 1 > 5).sum()


def test_confidence_is_the_share_of_good_candidates_that_are_read():
    """Screens with normal errors, of candidates that are as good as the best: a fifth is left out."""
    rng = np.random.default_rng(0)
    decided = []
    for _ in range(300):
        scores = np.sort(rng.normal(5, 0.1, 16))
        screens = scores - 1 + rng.normal(0, 0.05, 16)
        known = Incumbents(np.repeat(scores[:, None], 4, axis=1), scores[-1], scores[0], screens)
        decided.append(screen(scores[0] - 1 + rng.normal(0, 0.05, 50), known, EVEN, 0.8)[1].mean())
    assert 0.15 < np.mean(decided) < 0.25


class Made:
    """Losses in numbers: four blocks of a document each, and their skipped positions at a tenth of the cost."""

    candidates_at_once, weights = 2, EVEN

    def __init__(self, losses, screens):
        self.losses = np.concatenate([losses, screens], axis=1)
        self.blocks = [Block(np.array([document]), 10, None, ()) for document in range(4)]
        self.screens = [Block(np.array([document]), 1, None, ()) for document in range(4)]
        self.asked = []

    def block_nll(self, block, population):
        self.asked += [(block, int(row)) for row in population.n_hat]
        return self.losses[np.asarray(population.n_hat)][:, [block]]


def test_a_candidate_that_is_decided_is_not_read_and_has_an_estimate():
    losses = np.array([[5.0] * 4, [6.0] * 4, [4.9] * 4, [np.inf] * 4])
    made, progress = Made(losses, losses - 1), []
    candidates = POPULATION.replace(n_hat=np.arange(4))
    rivals = incumbents(bias=1.0, spread=1e-3)
    found = score_with(made, progress=progress.append, screening=0.9)(candidates, rivals)
    np.testing.assert_array_equal(np.isnan(found.documents).all(1), [False, True, False, True])
    np.testing.assert_allclose(found.nll, [5.0, 6.0, 4.9, np.inf], atol=2e-3)
    np.testing.assert_allclose(found.screens, [4.0, 5.0, 3.9, np.inf])
    np.testing.assert_allclose(found.cost, [1.1, 0.1, 1.1, 0.1])
    assert sum(progress) == pytest.approx(4) and len(made.asked) == 4 * 4 + 2 * 4
    # Too few incumbents, or none: all are read, and both scores are known of all.
    everyone = score_with(Made(losses, losses - 1))(candidates, None)
    assert not np.isnan(everyone.documents).any() and not np.isnan(everyone.screens).any()
