"""The model of the score that chooses among children."""

import jax
import numpy as np
import scipy.optimize
import scipy.stats

from longrope_jax.search import surrogate
from longrope_jax.search.candidates import Genes, SearchState, new_candidates
from longrope_jax.search.seeds import draw_ramps
from longrope_jax.search.space import paper_space

SPACE = paper_space(8.0, 128)
HALF = 16
MATTERS = np.arange(HALF) < 4  # the pairs that the score below depends on


def candidates(count: int, seed: int = 0) -> SearchState:
    lam = draw_ramps(jax.random.key(seed), count, HALF, SPACE)
    rng = np.random.default_rng(seed)
    genes = Genes(lam, rng.choice(SPACE.n_hat, count), np.ones(count), np.zeros(count))
    return new_candidates(genes, "ramp", 5)


def score(state: SearchState) -> np.ndarray:
    """Of the first pairs and a little of the start tokens, with its best at a frequency share of 0.6."""
    away = (1 / state.lam.astype(float) - 0.6) * MATTERS
    return 2 + np.square(away).sum(1) + 0.3 * np.sin(9 * away).sum(1) ** 2 + 0.001 * np.log2(1 + state.n_hat)


def known(count: int, seed: int = 0) -> SearchState:
    state = candidates(count, seed)
    return state.replace(nll=score(state))


def test_it_ranks_candidates_that_it_has_not_seen():
    others = candidates(200, seed=1)
    expected, _ = surrogate.posterior(surrogate.fitted(known(200)), others)
    assert scipy.stats.spearmanr(expected, score(others))[0] > 0.9


def test_it_learns_which_pairs_matter():
    lengths = surrogate.fitted(known(200)).lengths[:HALF]
    assert lengths[MATTERS].max() < lengths[~MATTERS].min()


def test_its_posterior_is_the_textbooks():
    state, others = known(60), candidates(20, seed=1)
    fitted = surrogate.fitted(state)
    x, y = (surrogate.features(some) / fitted.lengths for some in (state, others))

    def kernel(a, b):
        r = np.sqrt(5 * np.square(a[:, None] - b[None]).sum(-1))
        return (1 + r + r**2 / 3) * np.exp(-r)

    z = np.log(state.nll - state.nll.min() + 0.02)
    weights = np.linalg.solve(kernel(x, x) + fitted.noise * np.eye(60), z - np.median(z))
    mean, covariance = surrogate.posterior(fitted, others)
    np.testing.assert_allclose(mean, np.median(z) + kernel(y, x) @ weights, rtol=1e-6)
    explained = kernel(y, x) @ np.linalg.solve(kernel(x, x) + fitted.noise * np.eye(60), kernel(x, y))
    np.testing.assert_allclose(covariance, kernel(y, y) - explained, atol=1e-7)
    assert np.isclose(fitted.variance, (z - np.median(z)) @ weights / 60)


def test_the_gradient_of_its_likelihood_is_that_of_finite_differences():
    state = known(40)
    points = surrogate.features(state)
    z = np.log(state.nll - state.nll.min() + 0.02)
    prior = np.log(np.append(np.full(points.shape[1], 0.1) ** -2, 3e-3))
    at = prior + 0.5 * np.random.default_rng(0).normal(size=len(prior))
    numbers = (points, z - np.median(z), prior)
    finite = scipy.optimize.approx_fprime(at, lambda logs: surrogate.negative_log_posterior(logs, *numbers)[0], 1e-6)
    np.testing.assert_allclose(surrogate.negative_log_posterior(at, *numbers)[1], finite, atol=1e-4)


def test_what_it_chooses_is_better_than_most_and_chosen_once():
    children = candidates(400, seed=1)
    state = known(200)
    rows = surrogate.select_by_expected_improvement(state, children, 32, goal=state.nll.min())
    assert len(set(rows.tolist())) == 32
    ranks = scipy.stats.rankdata(score(children))
    assert np.median(ranks[rows]) < 100  # of 400


def test_scores_that_are_no_numbers_are_left_out():
    state = known(100)
    broken = jax.tree.map(lambda *rows: np.concatenate(rows), state, candidates(10, seed=3))  # nll is inf
    children = candidates(50, seed=1)
    chosen = [
        surrogate.select_by_expected_improvement(some, children, 8, goal=state.nll.min()) for some in (broken, state)
    ]
    np.testing.assert_array_equal(*chosen)


def test_one_score_and_equal_scores_are_no_obstacle():
    children = candidates(20, seed=1)
    assert len(surrogate.select_by_expected_improvement(known(1), children, 4, goal=known(1).nll[0])) == 4
    state = known(10)
    assert (
        len(surrogate.select_by_expected_improvement(state.replace(nll=np.full(10, 2.0)), children, 4, goal=2.0)) == 4
    )


def test_the_best_may_be_older_than_what_is_fitted(monkeypatch):
    state = known(100)
    state = state.take(np.argsort(state.nll))
    monkeypatch.setattr(surrogate, "_MAX_FITTED", 50)
    rows = surrogate.select_by_expected_improvement(state, candidates(50, seed=1), 8, goal=state.nll[0])
    assert len(set(rows.tolist())) == 8 and np.isfinite(surrogate.fitted(state).mean)


def test_improvement_is_what_the_formula_says_and_ordered_where_it_is_tiny():
    mean, deviation = np.array([0.0, 1.0, 2.0, 30.0, 40.0]), np.array([1.0, 0.5, 1.0, 1.0, 1.0])
    found = surrogate._log_improvement(mean, deviation, 0.5)
    drawn = mean[:3, None] + deviation[:3, None] * np.random.default_rng(0).normal(size=400_000)
    np.testing.assert_allclose(np.exp(found[:3]), np.maximum(0.5 - drawn, 0).mean(1), rtol=0.03)
    assert np.isfinite(found).all() and found[3] > found[4]
