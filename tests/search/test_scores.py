"""What is written down of scores, so that nothing is asked for twice, and what scores cost."""

import jax
import numpy as np
import pytest
import tiny_model
from etils import epath

from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import json_lines, preemption
from longrope_jax.search import racing
from longrope_jax.search.candidates import Incumbents
from longrope_jax.search.objective import Block


class Counting:
    """Losses that anyone can check, of candidates that it remembers."""

    def __init__(self):
        self.asked = []

    def __call__(self, block, population):
        self.asked.append((block, len(population.lam)))
        nll = np.where(population.lam[:, 0] > 8, np.inf, population.lam.sum(1) / 3 + population.n_hat)
        return np.stack([nll, nll + block], axis=1)


def population(first, last):
    lam = np.arange(first, last, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    return RopeFactors(lam, np.arange(first, last, dtype=np.int32), np.ones(last - first, np.float32))


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path / "scores.jsonl")


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(racing, "_WRITE_EVERY", -1.0)


def test_nothing_is_scored_twice_and_scores_are_the_same_to_the_bit(path, at_once):
    first, wanted = Counting(), [Counting()(block, population(1, 11)) for block in range(2)]
    cached = racing.cached(first, path, "search")
    for block in range(2):
        np.testing.assert_array_equal(cached(block, population(1, 6)), wanted[block][:5])
        np.testing.assert_array_equal(cached(block, population(2, 5)), wanted[block][1:4])
    assert first.asked == [(0, 5), (1, 5)]
    with path.open("a") as file:
        file.write('{"stage": "search", "candidate": "cut off by a k')
    again = Counting()
    cached = racing.cached(again, path, "search")
    np.testing.assert_array_equal(cached(1, population(1, 6)), wanted[1][:5])
    assert again.asked == []
    np.testing.assert_array_equal(cached(1, population(5, 11)), wanted[1][4:])  # inf among them
    assert again.asked == [(1, 6)]  # one of them is known, the others are scored with it
    np.testing.assert_array_equal(racing.cached(again, path, "search")(1, population(1, 11)), wanted[1])
    assert again.asked == [(1, 6)]
    other = Counting()
    racing.cached(other, path, "search_again")(0, population(1, 6))
    assert other.asked == [(0, 5)]


def test_candidates_that_differ_in_one_gene_are_not_taken_for_each_other(path):
    asked = Counting()
    cached, one = racing.cached(asked, path, "search"), population(1, 2)
    cached(0, one)
    for other in (
        one.replace(lam=one.lam + np.float32(1e-6)),
        one.replace(n_hat=one.n_hat + 1),
        one.replace(mscale=one.mscale + np.float32(1e-6)),
    ):
        cached(0, other)
    assert len(asked.asked) == 4


def test_who_is_asked_to_stop_keeps_what_is_scored(path, monkeypatch):
    asked = iter([False, True])
    monkeypatch.setattr(preemption, "requested", lambda: next(asked))
    cached = racing.cached(Counting(), path, "search")
    cached(0, population(0, 2))
    with pytest.raises(preemption.Preempted, match="4 scores of candidates on documents are saved"):
        cached(0, population(2, 4))
    assert len(json_lines.read(path)) == 4


def test_a_fast_search_writes_seldom(path):
    racing.cached(Counting(), path, "search")(0, population(0, 9))
    assert json_lines.read(path) == []


def test_a_search_that_goes_on_with_other_blocks_asks_again(path, at_once):
    """`documents_at_once` may change with the mesh; then blocks of the same number hold other documents."""
    terms, candidates = {"perplexity": tiny_model.make_term(4, 16)}, tiny_model.population()
    wanted = racing.score_with(tiny_model.make_objective(terms))(candidates, None)
    for documents_at_once in (1, 2, 1):
        objective = tiny_model.make_objective(terms, 1, documents_at_once)
        losses = racing.cached(objective.block_nll, path, "search", objective.documents_at_once)
        found = racing.score_with(objective, losses=losses)(candidates, None)
        np.testing.assert_allclose(found.documents, wanted.documents, rtol=1e-6)


# --- a race -----------------------------------------------------------------------------------------------------------


class Made:
    """An objective in numbers: blocks of some costs, losses that are given, the same on skipped positions."""

    screens: list[Block] = []

    def __init__(self, losses, blocks, at_once=2):
        self.losses, self.candidates_at_once, self.weights = losses, at_once, np.full(losses.shape[1], 1.0)
        self.weights /= self.weights.sum()
        self.blocks = [Block(np.array(documents), tokens, None, ()) for documents, tokens in blocks]
        self.asked = []

    def block_nll(self, block, population):
        rows = np.asarray(population.n_hat)
        self.asked += [(block, row) for row in rows]
        return self.losses[np.ix_(rows, self.blocks[block].documents)]


def numbered(count):
    return RopeFactors(np.ones((count, 4), np.float32), np.arange(count), np.ones(count, np.float32))


# The incumbents differ by the same on all documents: all blocks tell the same, so they are read in order, and the first
# one decides whether a candidate is behind the last of them, or between the last and the best.
INCUMBENTS = Incumbents(np.arange(1, 6)[:, None] + np.array([1.0, 2, 3, 4]), threshold=7.5, best=3.5)
LOSSES = np.array([[1.0, 2, 3, 4], [9, 2, 3, 4], [1, 2, 30, 4], [1, np.inf, 3, 4], [4, 5, 6, 70]])
BLOCKS = [([0], 100), ([1, 2], 200), ([3], 700)]


def test_a_race_reads_no_more_of_who_is_plain_and_counts_what_it_read():
    made, progress, unread = Made(LOSSES, BLOCKS), [], np.nan
    found = racing.score_with(made, racing=0.99, progress=progress.append)(numbered(5), INCUMBENTS)
    np.testing.assert_array_equal(
        found.documents,
        [
            [1, 2, 3, 4],
            [9, unread, unread, unread],
            [1, 2, 30, unread],
            [1, np.inf, 3, unread],
            [4, unread, unread, unread],
        ],
    )
    np.testing.assert_allclose(found.cost, [1, 0.1, 0.3, 0.3, 0.1])
    # The mean of the incumbents ones, 5.5, and the mean difference to them.
    np.testing.assert_allclose(found.nll, [2.5, 5.5 + 5, 5.5 + (24 - 3 - 3) / 3, np.inf, 5.5])
    assert sum(progress) == pytest.approx(5)  # who is left alone is dealt with
    assert sorted(made.asked) == [*((0, row) for row in range(5)), (1, 0), (1, 2), (1, 3), (2, 0)]


def test_who_is_left_alone_has_an_estimate_even_if_it_would_have_caught_up():
    """That is the risk which is taken; here the rest of it would have been good enough."""
    losses = np.array([[9.0, 0, 0, 0]])
    found = racing.score_with(Made(losses, BLOCKS), racing=0.99)(numbered(1), INCUMBENTS)
    assert found.nll == pytest.approx(10.5) and losses.mean() < INCUMBENTS.best


def test_the_last_block_makes_a_score_exact():
    losses = np.array([[1.0, 2, 3, 400]])  # the best of all until then
    found = racing.score_with(Made(losses, BLOCKS), racing=0.99)(numbered(1), INCUMBENTS)
    assert found.nll == losses.mean() and found.cost == pytest.approx(1)


FEW = INCUMBENTS._replace(documents=INCUMBENTS.documents[:3])


@pytest.mark.parametrize(
    "incumbents", [None, FEW, INCUMBENTS._replace(threshold=np.inf)], ids=["none", "few", "no threshold"]
)
def test_without_enough_to_compare_with_there_is_no_race(incumbents):
    found = racing.score_with(Made(LOSSES, BLOCKS), racing=0.99)(numbered(5), incumbents)
    np.testing.assert_array_equal(found.documents, LOSSES)
    np.testing.assert_allclose(found.cost, 1)
    np.testing.assert_allclose(found.nll, LOSSES.mean(1))


def test_a_population_of_none_is_no_obstacle():
    found = racing.score_with(Made(LOSSES, BLOCKS), racing=0.99)(numbered(0), INCUMBENTS)
    assert jax.tree.map(np.shape, tuple(found)) == ((0,), (0, 4), (0,), (0,))
