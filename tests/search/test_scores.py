import numpy as np
import pytest
from etils import epath

from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import preemption, records
from longrope_jax.search import scores


class Counting:
    """A score that anyone can check, of candidates that it remembers."""

    def __init__(self):
        self.asked = []

    def __call__(self, population):
        self.asked.append(len(population.lam))
        return np.where(population.lam[:, 0] > 8, np.inf, population.lam.sum(1) / 3 + population.n_hat)


def population(first, last):
    lam = np.arange(first, last, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    return RopeFactors(lam, np.arange(first, last, dtype=np.int32), np.ones(last - first, np.float32))


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path / "scores.jsonl")


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(scores, "_KEEP_EVERY", -1.0)


def test_nothing_is_scored_twice_and_scores_are_the_same_to_the_bit(path, at_once):
    wanted, told = Counting()(population(1, 11)), []
    first = Counting()
    np.testing.assert_array_equal(scores.kept(first, 2, path, "search")(population(1, 6)), wanted[:5])
    assert first.asked == [2, 2, 1]
    with path.open("a") as file:
        file.write('{"stage": "search", "candidate": "cut off by a k')
    again = Counting()
    found = scores.kept(again, 2, path, "search", told.append)(population(1, 11))
    np.testing.assert_array_equal(found, wanted)
    assert again.asked == [2, 2, 2] and told == [2, 2]  # a pair of which one is known is scored again
    other = Counting()
    scores.kept(other, 5, path, "search_again")(population(1, 6))
    assert other.asked == [5]


def test_who_is_asked_to_stop_keeps_what_is_scored(path, monkeypatch):
    asked = iter([False, True])
    monkeypatch.setattr(preemption, "requested", lambda: next(asked))
    with pytest.raises(preemption.Preempted, match="4 of 9 candidates of this iteration are scored"):
        scores.kept(Counting(), 2, path, "search")(population(0, 9))
    assert len(records.read(path)) == 4


def test_a_fast_search_writes_seldom(path):
    scores.kept(Counting(), 1, path, "search")(population(0, 9))
    assert records.read(path) == []
