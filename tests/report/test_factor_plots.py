"""What is drawn, looked up in the figures."""

import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.report import plots

D, L, BASE = 32, 128, 10000.0
METHODS = {
    name: rope.extend(name, rope.Trained(L, rope.unscaled(D)), 8 * L, D) for name in ("unscaled", "linear", "ntk")
}


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def test_a_rotation_is_drawn_with_its_start_tokens_in_place(tmp_path):
    methods = {"ntk": METHODS["ntk"].replace(n_hat=np.int32(5)), "unscaled": METHODS["unscaled"]}
    figure = plots.rotation_by_position(methods, (0, 4, 8), 8 * L, L, BASE)
    figure.savefig(tmp_path / "figure.png")
    assert len(panels(figure)) == 3
    lines = {line.get_label(): line for line in panels(figure)[2].get_lines()}
    positions, cosines = lines["NTK"].get_data()
    theta, lam = rope.frequencies(D, BASE)[8], float(METHODS["ntk"].lam[8])
    expected = np.cos(positions * theta / np.where(positions < 5, 1, lam))
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    assert positions[0] == 0 and positions[-1] == 8 * L  # its three wavelengths would be longer
    assert panels(figure)[0].get_xlim()[1] == pytest.approx(3 * 2 * np.pi, abs=0.5)


def test_the_bars_of_a_trained_range_fill_the_window(tmp_path):
    figure = plots.trained_range(METHODS, 8 * L, L, BASE)
    figure.savefig(tmp_path / "figure.png")
    critical = rope.critical_dimension(D, BASE, L)
    for axes in panels(figure):
        whole, kept, unseen = axes.containers
        assert len(whole) == critical
        widths = np.array([[bar.get_width() for bar in bars] for bars in (kept, unseen)])
        np.testing.assert_allclose(widths.sum(0)[critical:], 8 * L)
        if axes.get_title() == plots.label("unscaled"):
            np.testing.assert_allclose(widths[0][critical:], L)
        if axes.get_title() == plots.label("linear"):
            np.testing.assert_allclose(widths[1], 0)


def test_scores_are_means_over_every_distance_once(tmp_path):
    figure = plots.score_by_distance({"unscaled": METHODS["unscaled"]}, 64, L, BASE)
    figure.savefig(tmp_path / "figure.png")
    distances, scores = panels(figure)[0].get_lines()[0].get_data()
    assert distances[0] == 1 and distances[-1] < 64
    np.testing.assert_allclose(scores[0], rope.score_by_distance(METHODS["unscaled"], np.array([1]), BASE))


def test_a_changed_factor_has_a_line_a_pair_in_order_of_the_pairs(tmp_path):
    changes = {9: np.array([0.2, 0, 0.1]), 1: np.array([0.3, 0, -0.1])}
    figure = plots.nll_by_changed_factor(changes, (0.5, 1, 2))
    figure.savefig(tmp_path / "figure.png")
    first, second = panels(figure)[0].get_lines()[:2]
    assert (first.get_label(), second.get_label()) == ("pair 1", "pair 9")
    assert np.array_equal(first.get_ydata(), changes[1])


def test_sensitivities_are_bars_side_by_side(tmp_path):
    gradients = {"one": np.arange(4.0), "other": -np.arange(4.0)}
    figure = plots.sensitivity_by_pair(gradients)
    figure.savefig(tmp_path / "figure.png")
    one, other = panels(figure)[0].containers
    assert [bar.get_height() for bar in other] == [0, -1, -2, -3]
    for left, right in zip(one, other, strict=True):
        assert left.get_x() + left.get_width() == pytest.approx(right.get_x())


def test_losses_after_a_crossing_are_means_by_bucket_of_position(tmp_path):
    nll = {"read again": np.tile(np.arange(32.0), (3, 1)), "old keys": np.ones((3, 32))}
    figure = plots.nll_after_switch(nll, 128, bucket=8)
    figure.savefig(tmp_path / "figure.png")
    positions, means = panels(figure)[0].get_lines()[0].get_data()
    assert np.array_equal(positions, [132, 140, 148, 156])
    np.testing.assert_allclose(means, [3.5, 11.5, 19.5, 27.5])
