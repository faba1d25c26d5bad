"""What a report says of searches."""

import numpy as np
import pytest

from longrope_jax.report import plots
from longrope_jax.report.page import Picture
from longrope_jax.report.search import search_section

SUMMARY = dict(
    stage="search_4x",
    target_length=64,
    model="pretrain",
    documents=["a", "b"],
    evaluations=6,
    population=3,
    seconds=10.0,
    objective_seconds=9.0,
    best_nll=1.0,
    seeds={"linear": None, "yarn": 2.0},
    curve=[None, 2.0, 1.5, 1.5, 1.5, 1.0],
    factors={"lam": [1.0, 2.5], "n_hat": 4, "mscale": 1.0},
    method="evolution",
    costs=[1.0, 2.0, 3.0, 3.5, 4.0, 5.0],
    dropped=2,
    held_out=[],
    yarn=[],
    screening=0.0,
)
HELD_OUT = [[3.0, 1.5, 1.6], [4.0, 1.25, 1.3], [5.0, 1.0, 1.35]]


def pictures(search):
    return {part.name: part.figure for part in search_section(search) if isinstance(part, Picture)}


def drawn(figure, panel=0, line=0):
    return np.transpose(figure.axes[panel].lines[line].get_data())


def test_a_search_is_drawn_against_what_it_spent():
    (figure,) = pictures(SUMMARY).values()
    assert "forward equivalents" in figure.axes[0].get_xlabel()
    np.testing.assert_allclose(
        drawn(figure)[1:], np.transpose([SUMMARY["costs"], np.exp([2, 2, 1.5, 1.5, 1.5, 1])])[1:]
    )
    assert [text.get_text() for text in figure.axes[0].texts] == ["seed: YaRN", "population 0"]
    assert figure.axes[0].texts[1].xy[0] == 3.0
    (figure,) = pictures(SUMMARY | {"method": "hybrid"}).values()
    assert [text.get_text() for text in figure.axes[0].texts] == ["seed: YaRN"]


def test_what_a_race_saved_is_reported():
    text = search_section(SUMMARY)[1]
    assert text.startswith("By evolution: 6 candidates for 5.0 forward equivalents") and "gradient steps" not in text
    assert "2 candidates were not read in full: all candidates together read 83 % of" in text
    assert "in full" not in search_section(SUMMARY | {"dropped": 0})[1]


def test_gradient_steps_are_distinguished_from_candidates():
    costs = [1.0, 2.0, 3.0, 34.0, 35.0, 36.0]  # the fourth brought 30 forward equivalents of steps with it
    text = search_section(SUMMARY | {"method": "gradient", "costs": costs, "dropped": 0})[1]
    assert "6 candidates for 36.0 forward equivalents" in text and "30.0 of them gradient steps" in text


def test_what_was_read_on_skipped_positions_is_no_gradient_step():
    costs = [1.1, 2.2, 2.3, 2.4, 2.5, 3.6]
    text = search_section(SUMMARY | {"screening": 0.1, "costs": costs, "dropped": 3})[1]
    assert "3.6 forward equivalents" in text and "0.6 of them on skipped positions" in text
    assert (
        "gradient steps" not in text and "3 candidates were not read in full: all candidates together read 50 %" in text
    )


def test_overfitting_is_reported_and_drawn():
    search = SUMMARY | {"held_out": HELD_OUT}
    text = "\n".join(map(str, search_section(search)))
    assert (
        "the best candidate has 1.350 nats per token, +0.350 relative to its search score" in text
        and "had +0.100" in text
    )
    assert "gained 0.500 nats on its own documents and 0.250 on the held-out ones (50 %)" in text
    assert "came at 4 forward equivalents, 0.050 nats below the last" in text
    assert "(figures/overfitting_search_4x.png)" in text
    figure = pictures(search)["overfitting_search_4x"]
    np.testing.assert_allclose(drawn(figure, 0, 1), [[x, np.exp(y)] for x, _, y in [*HELD_OUT, HELD_OUT[-1]]])
    np.testing.assert_allclose(drawn(figure, 1)[:, 1], [0.1, 0.05, 0.35, 0.35])


def test_a_search_that_found_nothing_better_than_it_started_with_says_nothing_of_a_gain():
    text = "\n".join(map(str, search_section(SUMMARY | {"held_out": HELD_OUT[:1]})))
    assert "gained" not in text and "No earlier candidate was better" in text


@pytest.mark.parametrize("population", [3, None, 10])
def test_population_0_is_marked_where_there_is_one(population):
    figure = plots.search_convergence(np.array([2.0, 1.5, 1.0]), {"yarn": 2.0}, population, [1.0, 2.0, 3.0])
    marks = [text.get_text() for text in figure.axes[0].texts if text.get_text() == "population 0"]
    assert len(marks) == (population == 3)


def test_a_tuned_yarn_is_described_by_its_parameters():
    text = "\n".join(map(str, search_section(SUMMARY | {"method": "yarn_grid", "yarn": [8, 1.25, 7.5, False]})))
    assert "YaRN with beta_fast = 8, beta_slow = 1.25, s = 7.5." in text
    assert "beta_fast" not in "\n".join(map(str, search_section(SUMMARY)))
