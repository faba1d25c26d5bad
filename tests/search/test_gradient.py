"""Descent of rescale factors: the parametrisation, the gradient, and what a round makes of a tiny model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from etils import epath

import longrope_jax as lr
from longrope_jax import rope
from longrope_jax.evaluation.perplexity import window_nll
from longrope_jax.runtime import preemption
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.search import gradient
from longrope_jax.search.candidates import Genes, evaluate, new_candidates
from longrope_jax.search.gradient import RefinementCheckpoint, from_lam, make_optimizer, on_grid, refine, to_lam
from longrope_jax.search.racing import score_with
from longrope_jax.search.settings import GradientSettings
from longrope_jax.search.space import SearchSpace, critical_space, paper_space

HALF = 16
PAPER, CRITICAL = paper_space(8.0, 128), critical_space(8.0, 128, 2 * HALF, 1e4)
SPACES = pytest.mark.parametrize("space", [PAPER, CRITICAL], ids=["paper", "critical"])


def critical_pairs(space, rows, rng):
    return rng.choice(space.critical, rows).astype(np.int32)


# --- the parametrisation ----------------------------------------------------------------------------------------------


def plateaus(space, rows, rng):
    """Candidates of the space, most of whose factors are equal to a neighbour's, at the bounds too; and their pairs."""
    critical = critical_pairs(space, rows, rng)
    few = rng.choice([space.low, space.low * 1.1, space.high * 0.7, space.high], (rows, HALF))
    any_one = rng.uniform(space.low, space.high, (rows, HALF))
    lam = np.sort(np.where(rng.uniform(size=(rows, 1)) < 0.5, few, any_one)).astype(np.float32)
    return np.asarray(space.completed(lam, critical)), critical


@SPACES
def test_any_logarithms_are_monotone_factors_within_the_bounds(space):
    rng = np.random.default_rng(0)
    critical = critical_pairs(space, 200, rng)
    logs = rng.uniform(np.log(space.low), np.log(space.high), (200, HALF)).astype(np.float32)
    lam = np.asarray(to_lam(logs, critical, space))
    assert np.isfinite(lam).all() and (np.diff(lam) >= 0).all()
    free = np.arange(HALF) >= critical[:, None]
    assert lam[free].min() >= space.low * (1 - 1e-6) and lam.max() <= space.high * (1 + 1e-6)
    base = np.take_along_axis(lam, critical[:, None], 1).astype(np.float64)
    ntk = base ** (np.arange(HALF) / np.maximum(critical[:, None], 1))
    np.testing.assert_allclose(lam[~free], ntk[~free], rtol=1e-5)
    for row in lam[:20]:
        rope.RopeFactors(row, np.int32(0), np.float32(1)).check(2 * HALF)


@SPACES
def test_factors_come_back_from_their_logarithms_those_of_plateaus_too(space):
    lam, critical = plateaus(space, 100, np.random.default_rng(0))
    assert (np.diff(lam) == 0).mean() > 0.2
    np.testing.assert_allclose(to_lam(from_lam(lam, space), critical, space), lam, rtol=1e-6)


@SPACES
def test_every_free_pair_has_a_gradient_those_of_plateaus_too(space):
    rng = np.random.default_rng(0)
    lam, critical = plateaus(space, 100, rng)
    weights = rng.uniform(0.5, 2, lam.shape).astype(np.float32)
    slopes = jax.grad(lambda logs: (weights * to_lam(logs, critical, space)).sum())(from_lam(lam, space))
    # The critical pair steps those below it too.
    beyond, below = (np.arange(HALF) > critical[:, None]), np.arange(HALF) < critical[:, None]
    np.testing.assert_allclose(slopes[beyond], (weights * lam)[beyond], rtol=1e-5)
    assert (np.take_along_axis(slopes, critical[:, None], 1) > 0).all() and (np.asarray(slopes)[below] == 0).all()


def test_rounding_to_the_grid_is_the_nearest_candidate():
    space = paper_space(8.0, 128, mscale=(0.9, 1.2))
    lam = np.sort(np.random.default_rng(0).uniform(1, 10, (5, HALF))).astype(np.float32)
    genes = Genes(lam, np.zeros(5, np.int32), np.linspace(0.9, 1.2, 5).astype(np.float32), np.zeros(5, np.int32))
    found = on_grid(genes, space)
    assert np.abs(found.lam - lam).max() <= 0.00501 and (np.diff(found.lam) >= 0).all()
    np.testing.assert_allclose(found.lam * 100, np.round(found.lam * 100), atol=1e-3)
    np.testing.assert_allclose(found.mscale, [0.9, 0.98, 1.05, 1.12, 1.2], atol=0.0051)
    assert found.lam.dtype == found.mscale.dtype == np.float32


# --- the gradient -----------------------------------------------------------------------------------------------------


SPACE = SearchSpace(1.0, 5.0, 0.01, (0, 2, 4), (0.8, 1.3))
# One length, so that there is one step to compile.
TERMS = {"perplexity": tiny_model.make_term(3, 32, seed=1), "end": tiny_model.make_term(2, 32, seed=2, last=8)}


def test_the_gradient_by_logarithms_and_temperature_agrees_with_finite_differences():
    model, params = tiny_model.make()
    term, rng = TERMS["perplexity"], np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(32), (3, 32))

    def loss(logs, place):
        lam = to_lam(logs[None], jnp.zeros(1, jnp.int32), SPACE)
        factors = rope.RopeFactors(lam, jnp.zeros(1, jnp.int32), 0.8 + 0.5 * jax.nn.sigmoid(place)[None])
        return window_nll(model, params, factors, term.tokens[:, :-1], term.tokens[:, 1:], positions).mean()

    differentiate, evaluate = jax.jit(jax.grad(loss, argnums=(0, 1))), jax.jit(loss)
    for _ in range(3):
        point = rng.uniform(0.1, 1.5, 4).astype(np.float32), np.float32(rng.normal())
        slopes = np.concatenate([np.ravel(slope) for slope in differentiate(*point)])
        assert np.abs(slopes[:4]).max() > 1e-3
        way = slopes / np.linalg.norm(slopes)  # where the difference is largest beside float32's noise
        step = 0.002
        ahead, behind = (
            float(evaluate(point[0] + sign * step * way[:4], point[1] + sign * step * way[4])) for sign in (1, -1)
        )
        assert (ahead - behind) / (2 * step) == pytest.approx(float(slopes @ way), rel=0.03)


def test_the_learning_rate_falls_along_a_round_and_steps_are_scaled():
    settings = GradientSettings(steps=10, learning_rate=0.08)

    optimizer, steps = make_optimizer(settings), []
    state = optimizer.init(jnp.zeros(()))
    for _ in range(10):  # along a gradient that stays
        update, state = optimizer.update(jnp.ones(()), state)
        steps.append(-float(update))
    assert steps[0] == pytest.approx(0.08, rel=1e-3) and steps[-1] < 0.1 * steps[0] and (np.diff(steps) < 0).all()
    objective = tiny_model.make_objective(TERMS)
    logs, place = np.array([[0.1, 0.5, 1, 1.2]], np.float32), np.zeros(1, np.float32)
    whole, half = (step_with(objective, logs, place, scale)["logs"] - logs for scale in (1, 0.5))
    np.testing.assert_allclose(half, whole / 2, rtol=1e-3)


# --- a round ----------------------------------------------------------------------------------------------------------

SETTINGS = GradientSettings(starts=2, steps=24, learning_rate=0.05)


def started(objective, space=SPACE):
    """The tiny model's population, scored."""
    factors = tiny_model.population()
    genes = Genes(np.clip(factors.lam, 1, 5), factors.n_hat, np.clip(factors.mscale, *np.float32(space.mscale)),
                  np.zeros(4, np.int32))  # fmt: skip
    return evaluate(new_candidates(genes, "seed", len(objective.weights)), score_with(objective), None, 0)


def one_round(objective, settings=SETTINGS, space=SPACE, **more):
    score = score_with(objective)
    return refine(jax.random.key(0), started(objective, space), 1, space, settings, objective, score, **more)


@pytest.fixture(scope="module")
def one_by_one():
    """A round whose candidates descend one after the other, on single documents."""
    progress = []
    return one_round(tiny_model.make_objective(TERMS), progress=progress.append), progress


def test_a_round_finds_better_factors_on_the_grid_with_every_number_of_start_tokens(one_by_one):
    state, progress = one_by_one
    seeds, found = state.take(np.arange(4)), state.take(np.arange(4, len(state)))
    assert len(found) == 2 * 3 and (found.iteration == 1).all() and (found.operator == 3).all()
    assert found.nll.min() < seeds.nll.min() - 1e-3
    assert found.n_hat.tolist() == [0, 2, 4] * 2
    np.testing.assert_array_equal(found.parents, np.stack([np.repeat(seeds.top(2), 3), np.full(6, -1)], 1))
    for lam in found.lam.reshape(2, 3, 4):
        np.testing.assert_array_equal(lam, lam[:1].repeat(3, 0))
    np.testing.assert_allclose(found.lam * 100, np.round(found.lam * 100), atol=1e-3)
    assert (np.diff(found.lam) >= 0).all() and found.lam.min() >= 1 and found.lam.max() <= 5
    assert found.mscale.min() >= np.float32(0.8) and found.mscale.max() <= np.float32(1.3)
    assert not np.isin(found.mscale, seeds.mscale).all()  # it is searched too
    # Twice 24 steps on one of five blocks; and every one of six is scored.
    assert found.cost.sum() == pytest.approx(6 + 2 * 24 * SETTINGS.cost / 5)
    assert sum(progress) == pytest.approx(2 * 24 * SETTINGS.cost / 5)
    by_hand = tiny_model.losses_by_hand(TERMS, found.factors)
    np.testing.assert_allclose(found.nll, by_hand[:, :3].mean(1) / 2 + by_hand[:, 3:].mean(1) / 2, rtol=1e-5)


def test_several_candidates_at_once_descend_as_one_after_the_other(one_by_one):
    alone, _ = one_by_one
    together = one_round(tiny_model.make_objective(TERMS, 3))  # one more than there are
    np.testing.assert_allclose(together.lam, alone.lam, atol=0.021)  # two steps of the grid
    np.testing.assert_allclose(together.nll, alone.nll, atol=1e-3)


def test_a_refinement_on_a_mesh_is_the_same():
    short = GradientSettings(starts=2, steps=4, learning_rate=0.1)
    alone = one_round(tiny_model.make_objective(TERMS, 2, 2), short)
    layout = Layout.of(MeshSettings("data:2,seq:2"))
    with layout.active():
        spread = one_round(tiny_model.make_objective(TERMS, 2, 2, layout), short)
    assert np.abs(alone.lam[4:] - alone.lam[alone.parents[4:, 0]]).max() > 0.1
    np.testing.assert_allclose(spread.lam, alone.lam, atol=0.011)  # a step of the grid
    np.testing.assert_allclose(spread.nll, alone.nll, atol=1e-3)


def test_a_temperature_that_is_fixed_stays():
    space = SearchSpace(1.0, 5.0, 0.01, (0,), (1.1, 1.1))
    state = one_round(tiny_model.make_objective(TERMS), GradientSettings(steps=2, starts=1), space)
    np.testing.assert_array_equal(state.mscale, np.float32(1.1))
    assert len(state) == 5


def test_critical_pairs_and_ntk_below_them_stay_through_a_refinement():
    space = SearchSpace(4.0, 8.0, 0.01, (0,), critical=(1, 2))
    objective = tiny_model.make_objective(TERMS)
    lam = np.asarray(space.completed(np.full((2, 4), 5.0, np.float32), np.array([1, 2])))
    genes = Genes(lam, np.zeros(2, np.int32), np.ones(2, np.float32), np.array([1, 2], np.int32))
    score = score_with(objective)
    state = evaluate(new_candidates(genes, "seed", 5), score, None, 0)
    settings = GradientSettings(starts=2, steps=5, learning_rate=0.05)
    found = refine(jax.random.key(0), state, 1, space, settings, objective, score).take(np.arange(2, 4))
    assert (found.lam != lam[found.parents[:, 0]]).any(1).all()
    assert sorted(found.critical) == [1, 2]
    for row, critical in zip(found.lam, found.critical, strict=True):
        assert (row[critical:] >= 4).all() and (row[critical:] <= 8).all()
        np.testing.assert_allclose(row[:critical], row[critical] ** (np.arange(critical) / critical), rtol=1e-5)


def test_a_gradient_that_is_no_number_is_reported_and_moves_nothing(caplog):
    _, params = tiny_model.make()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    objective = tiny_model.make_objective(tiny_model.make_term(1, 32), params=broken)
    state = one_round(objective)
    assert np.isinf(state.nll).all()
    parents, found = state.take(state.parents[4:, 0]), state.take(np.arange(4, len(state)))
    np.testing.assert_allclose(found.lam, parents.lam, atol=0.0051)  # to the grid
    assert "loss that is not a number" in caplog.text and "ended in something" not in caplog.text


def step_with(objective, logs, place, scale=1.0):
    """One step of the objective's candidates on its first block, from variables that may be anything."""
    model = lr.Llama(dataclasses.replace(objective.model.config, remat=SETTINGS.remat))
    count = len(logs)
    fixed = Genes(np.exp(logs), np.zeros(count, np.int32), np.ones(count, np.float32), np.zeros(count, np.int32))
    optimizer, variables = make_optimizer(SETTINGS), {"logs": logs, "mscale": place}
    variables, fixed, scale = objective.layout.replicate((variables, fixed, np.float32(scale)))
    moments = objective.layout.replicate(optimizer.init(variables))
    block, shares = objective.blocks[0], objective.layout.place(np.ones(count, np.float32))
    found, _ = gradient.step(model, SPACE, optimizer, 1, objective.params, variables, moments, fixed, scale, shares,
                             block.weights, *block.rows)  # fmt: skip
    return jax.device_get(found)


def test_what_is_no_number_of_one_candidate_spoils_no_other_and_bounds_are_kept():
    objective = tiny_model.make_objective(TERMS, 3)
    high = np.float32(np.log(SPACE.high))
    logs = np.array([[0, 0.5, 1, high], [0, 0.2, high, high], [0, 0, high, high]], np.float32)
    prior, spoilt = (step_with(objective, logs, np.array([0, place, 0], np.float32)) for place in (0, np.nan))
    np.testing.assert_array_equal(spoilt["logs"][1], logs[1])  # it stays
    for name in ("logs", "mscale"):
        np.testing.assert_array_equal(spoilt[name][::2], prior[name][::2])
    moved = prior["logs"] - logs
    assert np.abs(moved).max() == pytest.approx(SETTINGS.learning_rate, rel=1e-2)
    assert prior["logs"].min() >= 0 and prior["logs"].max() <= high
    is_bound = (logs == 0) | (logs == high)
    assert (moved[is_bound] == 0).any()  # some would have gone on beyond


def test_rounds_start_from_the_best_whose_lam_differ_and_are_counted(monkeypatch):
    """One with other start tokens would lead to the same place."""
    objective, rounds = tiny_model.make_objective(TERMS), []
    stay = lambda *arguments: rounds.append(float(arguments[8])) or arguments[5:7]  # noqa: E731
    monkeypatch.setattr(gradient, "step", stay)
    genes = started(objective).take(np.array([0, 0, 1, 2])).genes._replace(n_hat=np.array([0, 1, 3, 3]))
    score = score_with(objective)
    state = evaluate(new_candidates(genes, "seed", 5), score, None, 0).replace(nll=np.array([0.2, 0.1, 0.4, 0.3]))
    settings = GradientSettings(starts=2, steps=1)
    first = refine(jax.random.key(0), state, 1, SPACE, settings, objective, score)
    assert set(first.parents[4:, 0]) == {1, 3} and rounds == [1, 1]
    moved = first.replace(lam=first.lam + np.float32(0.01))  # else there would be nothing new
    refine(jax.random.key(0), moved, 2, SPACE, settings, objective, score)
    assert rounds == [1, 1, 0.5, 0.5]


# --- one that is stopped ----------------------------------------------------------------------------------------------


def open_checkpoint(folder):
    return RefinementCheckpoint(epath.Path(folder / "refinement"), "search")


@pytest.mark.parametrize("after", [10, 37])
def test_a_refinement_that_is_stopped_goes_on_bit_for_bit(one_by_one, tmp_path, monkeypatch, after):
    whole, steps = one_by_one[0], []
    objective, take = tiny_model.make_objective(TERMS), gradient.step

    def counting(*arguments):
        steps.append(1)
        return take(*arguments)

    monkeypatch.setattr(gradient, "step", counting)
    with (
        monkeypatch.context() as patch,
        open_checkpoint(tmp_path) as checkpoint,
    ):
        patch.setattr(preemption, "requested", lambda: len(steps) == after)
        with pytest.raises(preemption.Preempted, match=rf"search: asked to stop, step {(after - 1) % 24 + 1} of grad"):
            one_round(objective, checkpoint=checkpoint)
    assert len(steps) == after
    with open_checkpoint(tmp_path) as checkpoint:
        state = one_round(objective, checkpoint=checkpoint)
    assert len(steps) == 48
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_a_refinement_of_another_number_at_once_begins_again(tmp_path, monkeypatch):
    """It may change with the mesh; shapes and blocks of what is kept are others then."""
    with (
        monkeypatch.context() as patch,
        open_checkpoint(tmp_path) as checkpoint,
    ):
        patch.setattr(preemption, "requested", lambda: True)
        with pytest.raises(preemption.Preempted):
            one_round(tiny_model.make_objective(TERMS, 1), checkpoint=checkpoint)
    whole = one_round(tiny_model.make_objective(TERMS, 3))
    with open_checkpoint(tmp_path) as checkpoint:
        state = one_round(tiny_model.make_objective(TERMS, 3), checkpoint=checkpoint)
    jax.tree.map(np.testing.assert_array_equal, state, whole)
