"""The methods of searching: which steps they make, and that any of them goes on bit for bit from any saved state."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.search import gradient, methods
from longrope_jax.search.candidates import (
    OPERATORS,
    Genes,
    Scores,
    SearchState,
    concatenate,
    describe,
    evaluate,
    gene_keys,
    new_candidates,
    remove_duplicates,
)
from longrope_jax.search.methods import search, search_steps
from longrope_jax.search.seeds import as_genes, paper_seeds
from longrope_jax.search.settings import METHODS, CmaEsSettings, EvolutionSettings, GradientSettings, SearchSettings
from longrope_jax.search.space import critical_space, paper_space

L, HEAD_DIM, DOCUMENTS = 128, 16, 3
SPACE = paper_space(8.0, L, n_hat=(0, 2, 8))
GRID = [rope.linear(HEAD_DIM, scale) for scale in (2.0, 4.0, 6.0)]
NAMES, SEEDS = as_genes(paper_seeds(HEAD_DIM, 8 * L, 1e4, L, rope.Trained(L, rope.unscaled(HEAD_DIM)), SPACE), SPACE)
BEST = np.exp(np.linspace(0, np.log(9.5), HEAD_DIM // 2))


class Analytic:
    """Losses with a known optimum, at BEST and 2 start tokens, of candidates that it remembers."""

    def __init__(self):
        self.asked = []

    def __call__(self, population, incumbents):
        self.asked += gene_keys(Genes(*jax.tree.leaves(population), np.zeros(len(population.lam), int)))
        away = np.square(np.log(np.asarray(population.lam, np.float64) / BEST)).mean(1)
        nll = 3 + away + 0.01 * np.abs(population.n_hat - 2)
        documents = nll[:, None] + np.arange(DOCUMENTS) - 1
        return Scores(nll, documents, np.ones(len(nll)))


def settings_of(method, restarts=1, **changes):
    numbers = dict(population=16, mutations=3, crossovers=3, parents=4, iterations=4, restarts=restarts)
    return SearchSettings(
        target_length=8 * L,
        method=method,
        evolution=EvolutionSettings(**numbers),
        gradient=GradientSettings(rounds=2, starts=1),
        cma_es=CmaEsSettings(population=6, iterations=4),
        **changes,
    )


def refine_halfway(key, state, iteration, space, settings, objective, score, checkpoint, progress, restart=0):
    """In the place of a gradient, which needs a model: near halfway to the optimum, with every n_hat."""
    own = state.candidates_of_restart(restart)
    best = own[state.take(own).top(1)]
    about = np.exp(0.05 * np.random.default_rng(iteration).normal(size=BEST.shape))
    lam = np.round(np.sort(np.sqrt(state.lam[best] * BEST) * about).clip(1, 10), 2).repeat(len(space.n_hat), 0)
    ones = np.ones(len(lam))
    genes = Genes(lam, np.array(space.n_hat), ones, 0 * ones)
    parents = np.stack([best.repeat(len(lam)), np.full(len(lam), -1)], 1)
    new = remove_duplicates(new_candidates(genes, "gradient", DOCUMENTS, parents, restart), state)
    return concatenate(state, evaluate(new, score, state.incumbents(state.nll.min()), iteration))


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(gradient, "refine", refine_halfway)


def steps_of(settings, score, space=SPACE, seeds=SEEDS):
    objective = SimpleNamespace(weights=np.full(DOCUMENTS, 1 / DOCUMENTS))
    return search_steps(settings, jax.random.key(0), seeds, space, objective, score, grid=GRID)


def born(state):
    """Which operators there were in every iteration."""
    iterations = range(int(state.iteration[-1]) + 1)
    return [sorted({OPERATORS[o] for o in state.operator[state.iteration == i]}) for i in iterations]


EVOLVED = [["crossover", "mutation"]] * 4
ORDERS = {
    ("evolution", 0): [["mutation", "seed"], *EVOLVED],
    ("evolution", 5): [["seed"], ["ramp"], ["mutation"], *EVOLVED],
    ("gradient", 0): [["seed"], ["gradient"], ["gradient"]],
    ("gradient", 5): [["seed"], ["ramp"], ["gradient"], ["gradient"]],
    ("hybrid", 0): [["seed"], ["gradient"], ["gradient"], ["mutation"], *EVOLVED],
    ("hybrid", 5): [["seed"], ["ramp"], ["gradient"], ["gradient"], ["mutation"], *EVOLVED],
    ("cma_es", 0): [["seed"], *[["cma_es"]] * 4],
    ("yarn_grid", 0): [["seed"], ["yarn"]],
}
PARENTLESS = ("seed", "ramp", "cma_es", "yarn")
EVERY = pytest.mark.parametrize(("method", "ramps"), ORDERS, ids=[f"{m}-{ramps}" for m, ramps in ORDERS])


def test_there_is_an_order_of_every_method():
    assert {method for method, _ in ORDERS} == set(METHODS)


@EVERY
def test_every_method_makes_its_steps_in_order_and_scores_nothing_twice(method, ramps):
    score, settings = Analytic(), settings_of(method, ramps=ramps)
    steps = steps_of(settings, score)
    assert len(steps) == settings.steps == len(ORDERS[method, ramps])
    state = search(steps)
    for found, expected in zip(born(state), ORDERS[method, ramps], strict=True):
        assert found and set(found) <= set(expected)  # parents that are alike have mutations only
    assert len(score.asked) == len(set(score.asked)) == len(state)
    assert score.asked == gene_keys(state.genes)
    np.testing.assert_array_equal(np.sort(state.iteration), state.iteration)
    assert (state.parents.max(1) < np.arange(len(state))).all()
    assert (
        (state.parents == -1).all(1) == np.isin(state.operator, [OPERATORS.index(name) for name in PARENTLESS])
    ).all()
    seeds = state.take(np.flatnonzero(state.operator == 0))
    np.testing.assert_array_equal(seeds.lam, SEEDS.lam)
    # CMA-ES takes longer, and so does evolution where ramps are most of a small population.
    assert (method, ramps) in (("cma_es", 0), ("evolution", 5), ("yarn_grid", 0)) or state.nll.min() < seeds.nll.min()


@EVERY
def test_settings_tell_how_much_a_method_asks_for(method, ramps):
    settings = settings_of(method, ramps=ramps)
    state = search(steps_of(settings, Analytic()))
    count = settings.candidates(len(SPACE.n_hat))
    # CMA-ES asks again for what it knows, and does not score it. The grid of YaRNs has some that are the same.
    assert len(state) == count or (method == "cma_es" and 0.8 * count < len(state) < count) or method == "yarn_grid"
    steps = {"gradient": 2 * 40, "hybrid": 2 * 40}.get(method, 0)  # each for five forward passes on one of four blocks
    assert settings.forward_equivalents(4, len(SPACE.n_hat)) == count + steps * 5 / 4


@pytest.mark.parametrize(("method", "born_in"), [("evolution", [3, 20, 0, 6]), ("hybrid", [3, 20, 3, 3, 0, 6])])
def test_more_ramps_than_population_0_has_room_for_are_all_of_it(method, born_in):
    settings = settings_of(method, ramps=20)
    state = search(steps_of(settings, Analytic()))
    assert len(state) == settings.candidates(len(SPACE.n_hat))
    assert np.bincount(state.iteration)[: len(born_in)].tolist() == born_in


@pytest.mark.parametrize(("method", "ramps"), [("evolution", 0), ("evolution", 5), ("hybrid", 20)])
def test_every_start_has_its_own_ramps_population_and_iterations(method, ramps):
    settings = settings_of(method, restarts=3, ramps=ramps)
    steps = steps_of(settings, Analytic())
    assert len(steps) == settings.steps
    saved = []
    state = search(steps, save=saved.append)
    assert len(state) == settings.candidates(len(SPACE.n_hat))
    evolved = state.take(np.flatnonzero(np.isin(state.operator, [1, 2, OPERATORS.index("ramp")])))
    shares = np.bincount(evolved.restart)
    assert len(shares) == 3 and (shares == max(16 - len(SEEDS.n_hat), ramps) + 4 * 6).all()
    later = search(steps_of(settings, Analytic()), saved[len(saved) // 2])
    jax.tree.map(np.testing.assert_array_equal, later, state)


@EVERY
def test_from_any_saved_state_every_method_goes_on_bit_for_bit(method, ramps):
    saved, settings = [], settings_of(method, ramps=ramps)
    whole = search(steps_of(settings, Analytic()), save=saved.append)
    assert len(saved) == settings.steps and saved[-1] is whole
    for place, state in enumerate(saved, 1):
        # As from a checkpoint: a dict of arrays.
        again = SearchState(**{k: v.copy() for k, v in state.__dict__.items()})
        jax.tree.map(np.testing.assert_array_equal, again, state)
        assert jax.tree.map(lambda leaf: leaf.dtype, again) == jax.tree.map(lambda leaf: leaf.dtype, state)
        score, more = Analytic(), []
        found = search(steps_of(settings, score), again, more.append)
        jax.tree.map(np.testing.assert_array_equal, found, whole)
        assert len(score.asked) == len(whole) - len(state) and len(more) == len(saved) - place


def test_every_candidate_is_reported_with_where_it_came_from():
    state = search(steps_of(settings_of("hybrid"), Analytic()))
    entries = describe(state, NAMES)
    assert [entry["candidate"] for entry in entries] == list(range(len(state)))
    assert [entry["seed"] for entry in entries if "seed" in entry] == NAMES
    assert describe(state, NAMES, 5) == entries[5:]
    for entry, row in zip(entries, range(len(state)), strict=True):
        assert entry["operator"] == OPERATORS[state.operator[row]] and entry["lam"] == state.lam[row].tolist()
        assert len(entry["parents"]) == {"seed": 0, "crossover": 2}.get(entry["operator"], 1)
        assert len(entry["documents"]) == DOCUMENTS and entry["cost"] == 1


# --- CMA-ES -----------------------------------------------------------------------------------------------------------


def test_cma_es_gets_near_a_known_optimum_from_the_best_seed():
    settings = settings_of("cma_es")
    object.__setattr__(settings, "cma_es", CmaEsSettings(population=16, iterations=40))
    state = search(steps_of(settings, Analytic()))
    seeds, found = state.take(np.arange(len(NAMES))), state.take(np.arange(len(NAMES), len(state)))
    start, ended = seeds.nll.min() - 3, found.nll.min() - 3
    assert ended - 0.02 < (start - 0.02) / 5  # n_hat = 0 costs 0.02, which it does not search
    assert (found.n_hat == seeds.n_hat[seeds.top(1)]).all() and (found.iteration > 0).all()
    np.testing.assert_allclose(found.lam * 100, np.round(found.lam * 100), atol=1e-3)
    assert found.lam.min() >= 1 and found.lam.max() <= 10 and (np.diff(found.lam) >= 0).all()


def test_cma_es_stays_in_the_critical_space():
    space = critical_space(8.0, L, HEAD_DIM, 1e4)
    _, seeds = as_genes({"own": rope.RopeFactors(np.full(8, 9.0), np.int32(2), np.float32(1))}, space)
    state = search(steps_of(settings_of("cma_es"), Analytic(), space, seeds))
    last = space.critical[-1]
    assert (state.critical == last).all() and (state.n_hat == 2).all() and len(state) > 10
    assert state.lam[:, last:].min() >= 8 and state.lam.max() <= 16
    np.testing.assert_allclose(state.lam[:, :last], state.lam[:, last, None] ** (np.arange(last) / last), rtol=1e-5)


def test_cma_es_goes_on_where_scores_are_no_numbers():
    def mostly_inf(population, incumbents):
        scores = Analytic()(population, incumbents)
        return scores._replace(nll=np.where(np.arange(len(scores.nll)) % 3 == 1, np.inf, scores.nll))

    state = search(steps_of(settings_of("cma_es"), mostly_inf))
    assert int(state.iteration[-1]) == 4 and np.isfinite(state.lam).all()


def test_a_settled_generation_that_asks_for_known_candidates_scores_only_new_ones(monkeypatch):
    """At so small a step all of a generation falls on a few points of the grid."""
    settings = settings_of("cma_es")
    object.__setattr__(settings, "cma_es", CmaEsSettings(population=8, iterations=5))
    monkeypatch.setattr(methods, "_CMA_ES_SIGMA", 1e-4)
    score = Analytic()
    state = search(steps_of(settings, score))
    assert len(score.asked) == len(set(score.asked)) == len(state) < len(NAMES) + 40


def test_cma_es_of_another_key_goes_another_way():
    ways = [
        methods.cma_es_generation(jax.random.key(k), search(steps_of(settings_of("cma_es"), Analytic())[:1]), 1, SPACE,
                          CmaEsSettings(population=4), Analytic()).lam[-4:]
        for k in (0, 0, 1)
    ]  # fmt: skip
    np.testing.assert_array_equal(ways[0], ways[1])
    assert not np.array_equal(ways[0], ways[2])
