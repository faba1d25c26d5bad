"""Random ramps: candidates of the space, the same for the same key, of which the later ones race."""

import jax
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.search.candidates import OPERATORS, Scores, evaluate, new_candidates
from longrope_jax.search.seeds import as_genes, draw_ramps, scan_ramps
from longrope_jax.search.space import critical_space, paper_space

HALF = 16
PAPER, CRITICAL = paper_space(8.0, 128), critical_space(8.0, 128, 2 * HALF, 1e4)
SPACES = pytest.mark.parametrize("space", [PAPER, CRITICAL], ids=["paper", "critical"])
BEST = np.exp(np.log(9.0) * np.clip((np.arange(HALF) - 3) / 8, 0, 1))


class Watched:
    """Two documents that agree on how far a candidate is from a ramp; it remembers who raced against whom."""

    def __init__(self):
        self.asked = []

    def __call__(self, population, incumbents):
        self.asked.append((len(population.lam), incumbents))
        nll = 3 + np.square(np.log(np.asarray(population.lam, np.float64) / BEST)).mean(1)
        return Scores(nll, np.stack([nll, nll], axis=1), np.ones(len(nll)))


def scanned(space, count, key=0, score=None):
    """After two seeds."""
    score = score or Watched()
    seeds = {
        "linear": rope.linear(2 * HALF, 8.0).replace(n_hat=np.int32(2)),
        "ntk": rope.ntk(2 * HALF, 8.0).replace(n_hat=np.int32(4)),
    }
    _, genes = as_genes(seeds, space)
    state = evaluate(new_candidates(genes, "seed", 2), score, None, 0)
    return scan_ramps(jax.random.key(key), state, 1, space, count, score)


def on_grid(lam, space):
    steps = np.asarray(lam, np.float64) / space.step
    return np.abs(steps - np.round(steps)) < 1e-3


@SPACES
def test_ramps_climb_on_the_grid_within_the_space(space):
    lam = np.asarray(draw_ramps(jax.random.key(0), 300, HALF, space))
    assert lam.shape == (300, HALF) and (np.diff(lam, axis=1) >= 0).all() and on_grid(lam, space).all()
    assert lam.min() >= np.float32(space.low) and lam.max() <= np.float32(space.high)
    assert len(np.unique(lam, axis=0)) > 290
    # All over the space: some leave most pairs alone, some hardly any, and some end at the top.
    alone = (lam == np.float32(space.low)).sum(1)
    assert alone.min() == 0 and alone.max() >= HALF / 2
    reached = (np.log(lam[:, -1]) - np.log(space.low)) / np.log(space.high / space.low)
    assert reached.max() > 0.95 and 0.7 < np.median(reached) < 0.95


@SPACES
def test_a_scan_adds_so_many_candidates_of_the_space(space):
    state = scanned(space, 50)
    seeds, found = state.take(np.arange(2)), state.take(np.arange(2, len(state)))
    assert 48 <= len(found) <= 50  # none comes twice
    assert (found.operator == OPERATORS.index("ramp")).all() and (found.iteration == 1).all()
    assert (found.parents == -1).all() and (found.mscale == 1).all()
    assert (found.n_hat == seeds.n_hat[np.argmin(seeds.nll)]).all()
    assert set(found.critical.tolist()) == set(space.critical)
    for lam, critical in zip(found.lam.astype(float), found.critical, strict=True):
        assert (np.diff(lam) >= 0).all() and on_grid(lam[critical:], space).all()
        assert lam[critical] >= np.float32(space.low) and lam[-1] <= np.float32(space.high)
        np.testing.assert_allclose(lam[:critical], lam[critical] ** (np.arange(critical) / max(critical, 1)), rtol=1e-5)
    assert space is CRITICAL or found.nll.min() < seeds.nll.min()


def test_a_scan_is_the_same_for_the_same_key_only():
    first, again, other = scanned(PAPER, 10), scanned(PAPER, 10), scanned(PAPER, 10, key=1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.lam[2:], other.lam[2:])


def test_later_ramps_race_for_a_place_among_the_best_eight():
    score = Watched()
    state = scanned(PAPER, 70, score=score)
    (_, nothing), (size, first), *others = score.asked  # the seeds, and the first ramps
    assert nothing is None and not first.has_enough and size == 32 and len(others) == 2
    done = 2 + size
    for count, incumbents in others:
        before = state.take(np.arange(done))
        assert (incumbents.threshold, incumbents.best) == (
            np.sort(before.nll)[7],
            before.nll.min(),
        ) and incumbents.has_enough
        np.testing.assert_array_equal(incumbents.documents, before.documents[before.top(16)])
        done += count
    assert done == len(state)
