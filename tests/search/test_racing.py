"""A race leaves out no one who would have won: on losses that documents, candidates and chance make up."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.search.candidates import Genes, Incumbents, new_candidates
from longrope_jax.search.methods import search, search_steps
from longrope_jax.search.objective import Block
from longrope_jax.search.racing import informative_first, race, score_with
from longrope_jax.search.seeds import as_genes, paper_seeds
from longrope_jax.search.settings import EvolutionSettings, SearchSettings
from longrope_jax.search.space import paper_space

EVEN = np.full(8, 1 / 8)
BLOCKS = [np.array([document]) for document in range(8)]


def best_ones(rng, count=16, documents=8, noise=0.05):
    """Sorted by their means: quality, what makes a document hard, and what a document has to say of a candidate."""
    losses = rng.normal(0, 0.05, (count, 1)) + rng.normal(5, 1, documents) + rng.normal(0, noise, (count, documents))
    return losses[np.argsort(losses.mean(1))]


def incumbents_of(documents, weights=EVEN):
    """The last of them is the one to come under."""
    scores = documents @ weights
    return Incumbents(documents, scores.max(), scores.min())


def known(losses, count):
    """Of the first documents only."""
    return np.where(np.arange(losses.shape[1]) < count, losses, np.nan)


def test_with_all_documents_known_scores_are_exact_and_only_the_best_of_all_is_not_decided():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(8))
    incumbents = incumbents_of(best_ones(rng), weights)
    losses = incumbents.documents[rng.integers(16, size=300)] + rng.normal(0, 0.1, (300, 1))
    score, decided = race(losses, incumbents, weights, 0.99)
    np.testing.assert_allclose(score, losses @ weights, rtol=1e-14)
    np.testing.assert_array_equal(decided, score > incumbents.best)
    assert 20 < decided.sum() < 280 and 20 < (score > incumbents.threshold).sum() < 280


def test_what_makes_a_document_hard_cancels():
    incumbents = incumbents_of(best_ones(np.random.default_rng(0)))
    losses = np.where(np.arange(8) == 3, incumbents.documents[2:3], np.nan)  # one of the best, on one document
    hard = 50 * (np.arange(8) == 3)
    harder = incumbents_of(incumbents.documents + hard)
    (score,), (decided,) = race(losses, incumbents, EVEN, 0.99)
    (shifted,), (decided_then,) = race(losses + hard, harder, EVEN, 0.99)
    assert shifted == pytest.approx(score + 50 / 8) and not decided and not decided_then
    (score,), (decided,) = race(losses + 1, incumbents, EVEN, 0.99)
    assert decided and score > incumbents.threshold


def test_a_higher_confidence_takes_longer_to_be_sure():
    rng = np.random.default_rng(0)
    incumbents = incumbents_of(best_ones(rng, noise=0.2))
    losses = known(incumbents.documents[8] + rng.normal(0, 0.3, (500, 8)), 2)
    found = [race(losses, incumbents, EVEN, confidence) for confidence in (0.6, 0.9, 0.99)]
    decided = [decided for _, decided in found]
    assert 500 > decided[0].sum() > decided[1].sum() > decided[2].sum() > 0
    assert all((loose | ~strict).all() for loose, strict in zip(decided, decided[1:], strict=False))
    for score, _ in found[1:]:
        np.testing.assert_array_equal(score, found[0][0])


@pytest.mark.parametrize("count", [1, 4, 8])
def test_who_looks_like_the_best_of_all_is_never_decided(count):
    rng = np.random.default_rng(0)
    incumbents = incumbents_of(best_ones(rng))
    losses = known(incumbents.documents[0] + rng.normal(0, 0.1, (200, 1)), count)
    score, decided = race(losses, incumbents, EVEN, 0.51)
    assert 20 < (score <= incumbents.best).sum() < 180 and decided.any()
    assert (score[decided] > incumbents.best).all()


def test_the_documents_that_tell_most_of_the_mean_are_read_first():
    rng = np.random.default_rng(0)
    noise = np.array([2, 1, 0.01, 0.5, 3, 1, 2, 1])
    losses = rng.normal(0, 1, (16, 1)) + rng.normal(0, 1, (16, 8)) * noise
    # What a document adds to the mean beyond the quality is part of the mean; large noise of one outweighs.
    order = informative_first(losses, EVEN, BLOCKS)
    differences = losses - losses.mean(0)
    errors = np.square(differences - (differences @ EVEN)[:, None]).sum(0)
    assert order[0] == int(np.argmin(errors)) and sorted(order) == list(range(8))
    losses[:, 5] = np.delete(losses, 5, 1).mean(1)  # the mean of all the others, so the mean of all
    assert informative_first(losses, EVEN, BLOCKS)[0] == 5


def test_blocks_are_ordered_as_a_whole():
    losses = best_ones(np.random.default_rng(1), noise=1.0)
    losses[:, 7] = 2 * losses[:, :6].sum(1) / 6 - losses[:, 6]  # with 6 it is the mean; alone both are noise
    blocks = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5]), np.array([6, 7])]
    assert informative_first(losses, EVEN, blocks)[0] == 3


@pytest.mark.parametrize(("count", "bar", "expected"), [(3, 1.0, False), (4, 1.0, True), (4, np.inf, False)])
def test_there_is_a_race_only_with_enough_to_compare_with(count, bar, expected):
    assert Incumbents(np.ones((count, 3)), bar, 1.0).has_enough == expected


def test_newcomers_race_against_the_best_that_were_read_in_full():
    count, rng = 40, np.random.default_rng(0)
    genes = Genes(np.ones((count, 4)), np.zeros(count), np.ones(count), np.zeros(count))
    documents = rng.normal(5, 1, (count, 3))
    documents[::3, 1], documents[1, 2] = np.nan, np.inf
    nll = np.where(np.arange(count) % 3 == 0, rng.normal(5, 0.1, count), documents.mean(1))
    state = new_candidates(genes, "seed", 3).replace(documents=documents, nll=nll)
    incumbents = state.incumbents(threshold=4.5)
    full = np.flatnonzero(np.isfinite(documents).all(1))
    np.testing.assert_array_equal(incumbents.documents, documents[full[np.argsort(nll[full])[:16]]])
    assert (incumbents.threshold, incumbents.best) == (4.5, nll.min()) and incumbents.has_enough


# --- whole searches ---------------------------------------------------------------------------------------------------

LENGTH, HEAD_DIM, DOCUMENTS, TRIALS = 128, 16, 10, 12
WEIGHTS = np.full(DOCUMENTS, 1 / DOCUMENTS)
SPACE = paper_space(8.0, LENGTH)
NUMBERS = dict(population=32, mutations=12, crossovers=12, parents=16, iterations=8)
SETTINGS = SearchSettings(target_length=8 * LENGTH, evolution=EvolutionSettings.paper(**NUMBERS, reach=4))
TRAINED = rope.Trained(LENGTH, rope.unscaled(HEAD_DIM))
_, SEEDS = as_genes(paper_seeds(HEAD_DIM, 8 * LENGTH, 1e4, LENGTH, TRAINED, SPACE), SPACE)
CONFIDENCES = pytest.mark.parametrize("racing", [0.9, 0.99])


class Simulated:
    """Documents that agree on a candidate up to what each has to say of each pair, as real ones do; some more."""

    screens: list[Block] = []

    def __init__(self, trial, candidates_at_once=4):
        rng = np.random.default_rng(trial)
        self.candidates_at_once, self.weights = candidates_at_once, WEIGHTS
        self.blocks = [Block(np.array([document]), 1, None, ()) for document in range(DOCUMENTS)]
        self._best = np.sort(rng.uniform(0, np.log(10), HEAD_DIM // 2))
        self._difficulty = rng.normal(5, 1, DOCUMENTS)
        self._slopes = rng.normal(0, rng.uniform(0.01, 0.1), (DOCUMENTS, HEAD_DIM // 2))
        self.read = 0

    def block_nll(self, block, population):
        away = np.log(np.asarray(population.lam, np.float64)) - self._best
        chance = [np.random.default_rng([block, *row.view(np.int32)]).normal(0, 0.01) for row in population.lam]
        self.read += len(population.lam)
        return (np.square(away).mean(1) + self._difficulty[block] + away @ self._slopes[block] + chance)[:, None]


@cache
def run_simulated(trial, racing, evolution=SETTINGS.evolution):
    objective, settings = Simulated(trial), replace(SETTINGS, evolution=evolution)
    score = score_with(objective, racing)
    return search(search_steps(settings, jax.random.key(trial), SEEDS, SPACE, objective, score)), objective.read


def until(state, iteration):
    return state.take(np.flatnonzero(state.iteration <= iteration))


@CONFIDENCES
def test_the_best_so_far_was_always_read_in_full(racing):
    for trial in range(TRIALS):
        state, _ = run_simulated(trial, racing)
        exact = score_with(Simulated(trial))(state.factors, None)
        is_full = ~np.isnan(state.documents).any(1)
        assert 0 < is_full.sum() < len(state) and np.isfinite(state.nll).all()
        np.testing.assert_array_equal(state.nll[is_full], (state.documents[is_full] * WEIGHTS).sum(1))
        np.testing.assert_allclose(state.nll[is_full], exact.nll[is_full], rtol=1e-14)
        for iteration in range(SETTINGS.evolution.iterations + 1):
            assert is_full[until(state, iteration).top(1)[0]]
        # An estimate of the others is near what they are.
        assert np.abs(state.nll - exact.nll).mean() < 0.1 * exact.nll.std()


@CONFIDENCES
def test_what_was_read_is_what_is_charged(racing):
    for trial in range(TRIALS):
        state, read = run_simulated(trial, racing)
        np.testing.assert_allclose(state.cost, (~np.isnan(state.documents)).mean(1))
        assert state.cost.sum() * DOCUMENTS == pytest.approx(read, rel=1e-12)
        assert state.cost[state.iteration == 0] == pytest.approx(1)


def test_a_race_never_ranks_the_best_out_and_of_who_would_have_entered_hardly_any():
    """On the way that a search without a race takes: what would a race of every iteration have said?"""
    wrongly, entered = 0, 0
    for trial in range(TRIALS):
        whole, _ = run_simulated(trial, 0.0)
        score = score_with(Simulated(trial), 0.99)
        for iteration in range(1, SETTINGS.evolution.iterations + 1):
            before, after = until(whole, iteration - 1), until(whole, iteration)
            children = np.arange(len(before), len(after))
            threshold = before.nll[before.top(SETTINGS.evolution.parents)[-1]]
            scores = score(after.take(children).factors, before.incumbents(threshold))
            would_enter, is_out = after.nll[children] < threshold, scores.nll >= threshold
            assert not is_out[np.argmin(after.nll[children])] or not would_enter.any(), (trial, iteration)
            wrongly, entered = wrongly + (would_enter & is_out).sum(), entered + would_enter.sum()
    assert entered > 600 and wrongly <= 0.02 * entered


@pytest.mark.parametrize(
    ("racing", "share", "evolution"),
    [(0.9, 0.5, SETTINGS.evolution), (0.99, 0.6, SETTINGS.evolution), (0.9, 0.5, EvolutionSettings(**NUMBERS))],
    ids=["0.9", "0.99", "0.9 with a model of the score"],
)
def test_a_race_reads_less_and_costs_a_search_nothing_in_what_it_finds(racing, share, evolution):
    gains, losses, shares = [], [], []
    for trial in range(TRIALS):
        (whole, all_read), (raced, read) = (run_simulated(trial, given, evolution) for given in (0.0, racing))
        gains.append(whole.nll[:3].min() - whole.nll.min())
        losses.append(raced.nll.min() - whole.nll.min())
        shares.append(read / all_read)
    # Another way leads to another end: the mean of so many trials is sure to 2 % of the gain (one standard error).
    assert np.mean(losses) < 0.05 * np.mean(gains)
    assert np.mean(shares) < share
