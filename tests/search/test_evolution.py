"""Algorithm 1 on objectives whose optimum is known, and its book-keeping."""

import jax
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.search.algorithm1 import Algorithm1
from longrope_jax.search.candidates import OPERATORS, Genes, Scores, describe, evaluate, gene_keys, new_candidates
from longrope_jax.search.operators import CROSSOVERS, MUTATIONS
from longrope_jax.search.settings import EvolutionSettings
from longrope_jax.search.space import SearchSpace, critical_space, paper_space

SPACE = paper_space(8.0, 128)
SEEDS = {
    "linear": rope.linear(32, 8.0),
    "ntk": rope.ntk(32, 8.0),
    "yarn": rope.yarn(32, 8.0, original_length=128, temperature=False),
}
SETTINGS = EvolutionSettings.paper(population=16, mutations=6, crossovers=6, parents=8, iterations=6)
TARGET = np.linspace(1, 9.5, 16)


def distance(factors, incumbents=None) -> Scores:
    """An objective of two documents with its optimum at (TARGET, 16 start tokens)."""
    apart = np.square(np.asarray(factors.lam, np.float64) - TARGET).mean(-1)
    documents = apart[:, None] + 0.01 * np.abs(np.asarray(factors.n_hat) - 16)[:, None] * np.array([0.5, 1.5])
    return Scores(documents.mean(1), documents, np.ones(len(documents)))


def total(factors, incumbents=None) -> Scores:
    nll = np.asarray(factors.lam, np.float64).sum(-1)
    return Scores(nll, nll[:, None], np.ones(len(nll)))


def seeded(score=distance, seeds=SEEDS, critical=0):
    factors = rope.stack(list(seeds.values()))
    count = len(factors.n_hat)
    genes = Genes(factors.lam, factors.n_hat, np.ones(count), np.full(count, critical))
    documents = score(factors, None).documents.shape[1]
    return evaluate(new_candidates(genes, "seed", documents), score, None, 0)


def run(settings=SETTINGS, score=distance, key=0, space=SPACE, seeds=None):
    """Every state of a search, population 0 first."""
    algorithm1 = Algorithm1(jax.random.key(key), space, settings, score)
    states = [algorithm1.populate(seeded(score) if seeds is None else seeds, 0)]
    for iteration in range(1, settings.iterations + 1):
        states.append(algorithm1.advance(states[-1], iteration))
    return states


def assert_equal(left, right):
    for leaf, same in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(leaf, same)


def test_population_zero_is_the_seeds_as_they_are_and_mutations_of_them():
    state = run()[0]
    assert len(state) == SETTINGS.population and (state.iteration == 0).all()
    for row, seed in enumerate(SEEDS.values()):
        np.testing.assert_array_equal(state.lam[row], seed.lam)
        assert state.operator[row] == 0 and (state.parents[row] == -1).all()
    assert (state.operator[3:] == 1).all() and set(state.parents[3:, 0]) <= {0, 1, 2}


@pytest.mark.parametrize(
    "settings", [EvolutionSettings(iterations=12), EvolutionSettings.paper(), EvolutionSettings.released()]
)
def test_it_finds_a_known_optimum(settings):
    state = run(settings)[-1]
    assert len(state) == settings.evaluations == 64 + settings.iterations * 32
    assert state.nll.min() < state.nll[:3].min() / 20
    assert abs(int(state.best().n_hat) - 16) <= 4
    np.testing.assert_allclose(state.best().lam, TARGET, atol=1.0)


def test_a_model_of_the_score_reaches_the_optimum_sooner():
    few = dict(iterations=8, mutation="redraw_few", reach=4)
    without, chosen = (run(EvolutionSettings.paper(**few, candidates_per_evaluation=count))[-1] for count in (1, 8))
    assert len(without) == len(chosen) == 64 + 8 * 32
    assert chosen.nll.min() < 0.5 * without.nll.min()
    assert (chosen.parents[64:, 0] >= 0).all()


def test_where_nothing_has_a_score_there_is_nothing_to_learn_and_children_are_made_all_the_same():
    def broken(factors, incumbents):
        return distance(factors)._replace(nll=np.full(len(factors.n_hat), np.inf))

    settings = EvolutionSettings(population=8, mutations=3, crossovers=3, parents=4, iterations=2)
    state = run(settings, broken, seeds=seeded(broken))[-1]
    assert len(state) == settings.evaluations and np.isinf(state.nll).all()


def test_budget_elitism_and_monotone_progress():
    state = run()[-1]
    assert len(state) == SETTINGS.evaluations == 16 + 6 * 12
    for iteration in range(1, SETTINGS.iterations + 1):
        children = np.flatnonzero(state.iteration == iteration)
        assert len(children) == 12
        elite = np.argsort(state.nll[: children[0]], kind="stable")[: SETTINGS.parents]
        parents = state.parents[children]
        assert np.isin(parents[parents >= 0], elite).all()
    np.testing.assert_array_equal(state.top(5), np.argsort(state.nll, kind="stable")[:5])
    assert distance(rope.stack([state.best()])).nll[0] == state.nll.min()


@pytest.mark.parametrize("kind", CROSSOVERS)
def test_crossovers_have_two_different_parents_the_better_first(kind):
    numbers = dict(population=16, mutations=6, crossovers=6, parents=8, iterations=6)
    state = run(EvolutionSettings.paper(**numbers, crossover=kind))[-1]
    crossed = np.flatnonzero(state.operator == OPERATORS.index("crossover"))
    assert 30 <= len(crossed) <= 6 * 6
    assert len(state) == SETTINGS.evaluations  # mutations take the places of crossovers that bring nothing new
    better, other = state.parents[crossed].T
    assert (better != other).all() and (state.nll[better] <= state.nll[other]).all()


@pytest.mark.parametrize(
    "settings",
    [
        EvolutionSettings(iterations=6),
        *(EvolutionSettings.paper(iterations=15, mutation=mutation, reach=4) for mutation in MUTATIONS),
    ],
    ids=["default", *MUTATIONS],
)
def test_no_candidate_is_scored_twice_and_all_are_valid(settings):
    state = run(settings)[-1]
    assert len(set(gene_keys(state.genes))) == len(state) == settings.evaluations
    assert (np.diff(state.lam, axis=1) >= 0).all()
    assert state.lam.min() >= SPACE.low and state.lam.max() <= np.float32(SPACE.high)
    assert np.isin(state.n_hat, SPACE.n_hat).all()


def test_it_searches_the_temperature_within_its_bounds():
    space = paper_space(8.0, 128, mscale=(0.9, 1.3))

    def score(factors, incumbents):
        scores = distance(factors)
        extra = 10 * np.abs(np.asarray(factors.mscale, np.float64) - 1.17)  # what matters most
        return scores._replace(nll=scores.nll + extra, documents=scores.documents + extra[:, None])

    state = run(EvolutionSettings.paper(iterations=20, reach=4), score, space=space)[-1]
    assert state.mscale.min() >= np.float32(0.9) and state.mscale.max() <= np.float32(1.3)
    assert abs(state.best().mscale - 1.17) < 0.03


def test_every_candidate_of_a_critical_space_is_ntk_below_its_critical_pair():
    space = critical_space(8.0, 128, 32, 10000.0)
    last = space.critical[-1]
    seeds = seeded(seeds={"ntk": rope.ntk_critical(32, 8.0)}, critical=last)
    state = run(space=space, seeds=seeds)[-1]
    assert len(np.unique(state.critical)) > 1
    for lam, critical in zip(state.lam[1:].astype(float), state.critical[1:], strict=True):
        np.testing.assert_allclose(lam[:critical], lam[critical] ** (np.arange(critical) / critical), rtol=1e-5)
        assert lam[critical:].min() >= 8 and lam.max() <= 16 and (np.diff(lam) >= 0).all()


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("candidates_per_evaluation", [1, 4])
def test_a_tiny_space_is_exhausted_without_repeating_or_hanging(mutation, candidates_per_evaluation):
    space = SearchSpace(1.0, 1.02, 0.01, (0,))
    settings = EvolutionSettings(
        population=16, parents=8, iterations=6, mutation=mutation, candidates_per_evaluation=candidates_per_evaluation
    )
    state = run(settings, total, space=space, seeds=seeded(total, {"ones": rope.unscaled(4)}))[-1]
    assert len(state) == 6  # (1, 1), (1, 1.01), (1, 1.02), (1.01, 1.01), (1.01, 1.02), (1.02, 1.02)


def test_identical_runs_are_identical_and_keys_matter():
    first, again, other = run()[-1], run()[-1], run(key=1)[-1]
    assert_equal(first, again)
    assert (first.lam[3:] != other.lam[3:]).any()


@pytest.mark.parametrize("candidates_per_evaluation", [1, 3])
@pytest.mark.parametrize("stop_after", [0, 1, 3, 4])
def test_a_stopped_search_goes_on_bit_for_bit_with_the_remaining_budget(stop_after, candidates_per_evaluation):
    numbers = dict(population=16, mutations=6, crossovers=6, parents=8, iterations=6)
    settings = EvolutionSettings(**numbers, candidates_per_evaluation=candidates_per_evaluation)
    states = run(settings)
    asked = []

    def counted(factors, incumbents):
        asked.append(len(factors.n_hat))
        return distance(factors)

    resumed = states[stop_after]
    for iteration in range(stop_after + 1, settings.iterations + 1):
        resumed = Algorithm1(jax.random.key(0), SPACE, settings, counted).advance(resumed, iteration)
    assert sum(asked) == settings.evaluations - len(states[stop_after])
    assert_equal(states[-1], resumed)


def test_every_candidate_is_described_with_its_origin():
    state = run()[-1]
    entries = describe(state, SEEDS)
    assert [entry["candidate"] for entry in entries] == list(range(SETTINGS.evaluations))
    assert [entry["seed"] for entry in entries[:3]] == ["linear", "ntk", "yarn"]
    assert {entry["operator"]: len(entry["parents"]) for entry in entries} == {"seed": 0, "mutation": 1, "crossover": 2}
    assert describe(state, SEEDS, 20) == entries[20:]


def test_advance_only_appends():
    first, later = run()[:2]
    assert_equal(later.take(np.arange(len(first))), first)
    assert (later.iteration[len(first) :] == 1).all()


def restarted(settings, score=distance):
    algorithm1, states = Algorithm1(jax.random.key(0), SPACE, settings, score), [seeded(score)]
    for restart in range(2):
        begun = states[-1].iteration[-1] + 1
        states.append(algorithm1.populate(states[-1], begun, restart))
        for iteration in range(begun + 1, begun + 1 + settings.iterations):
            states.append(algorithm1.advance(states[-1], iteration, restart))
    return states


def test_a_restart_begins_anew_from_the_seeds_and_stays_by_itself():
    state = restarted(SETTINGS)[-1]
    made = np.flatnonzero(state.operator > 0)
    assert np.bincount(state.restart[made]).tolist() == [16 - 3 + 6 * 12] * 2
    for row in made:
        parents = state.parents[row][state.parents[row] >= 0]
        is_seed = state.operator[parents] == 0
        assert (is_seed | (state.restart[parents] == state.restart[row])).all()


def test_children_race_for_a_place_among_the_parents_of_their_start():
    settings, seen = EvolutionSettings.paper(population=16, parents=8, iterations=2), []
    states = restarted(settings)
    state = states[-2]

    def watched(factors, incumbents):
        seen.append(incumbents)
        return distance(factors)

    Algorithm1(jax.random.key(0), SPACE, settings, watched).advance(state, 7, restart=1)
    own = (state.restart == 1) | (state.operator == 0)
    assert seen[0].threshold == np.sort(state.nll[own])[7] > np.sort(state.nll)[7]
    # They are compared with the best of all starts.
    assert seen[0].best == state.nll.min()
    np.testing.assert_array_equal(seen[0].documents, state.documents[state.top(16)])


def test_there_is_no_race_before_there_are_as_many_parents_as_there_may_be():
    settings, seen = EvolutionSettings.paper(population=16, parents=17, iterations=1), []

    def watched(factors, incumbents):
        seen.append(incumbents)
        return distance(factors)

    algorithm1 = Algorithm1(jax.random.key(0), SPACE, settings, watched)
    algorithm1.advance(algorithm1.populate(seeded(), 0), 1)
    assert seen[0] is None and not seen[1].has_enough


def test_settings_by_name_keep_other_numbers():
    paper, released = EvolutionSettings.paper(iterations=3), EvolutionSettings.released(population=7)
    assert (paper.mutation, paper.mutation_probability, paper.reach, paper.crossover) == ("redraw", 0.3, 1, "uniform")
    assert (released.mutation, released.reach, released.crossover) == ("redraw", 1, "released")
    assert (paper.iterations, released.population, paper.candidates_per_evaluation, released.restarts) == (3, 7, 1, 1)


@pytest.mark.parametrize(
    "bad",
    [
        dict(population=0),
        dict(iterations=-1),
        dict(mutation_probability=0.0),
        dict(reach=0),
        dict(parents=0),
        dict(mutation="none"),
        dict(crossover="none"),
        dict(restarts=0),
        dict(candidates_per_evaluation=0),
    ],
)
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EvolutionSettings(**bad)


def test_a_state_shows_its_best_candidate():
    state = run()[0]
    for shown in (repr(state), state._repr_html_()):
        assert f"{state.nll.min():.4f} nats per token" in shown and str(len(state)) in shown
    assert "candidates: 0" in repr(state.take(np.zeros(0, int)))
