import numpy as np
import pytest

from longrope_jax import rope

D, L, BASE = 32, 128, 10000.0


def test_wavelengths_are_those_of_a_full_turn():
    factors = rope.yarn(D, 8, BASE, L)
    cos, _ = rope.rotary_embedding(np.round(rope.wavelengths(factors, BASE)).astype(np.int32), factors, BASE)
    slow = np.arange(8, D // 2)  # a token more or less is nothing to these
    np.testing.assert_allclose(np.asarray(cos)[slow, slow], float(factors.mscale), rtol=1e-3)


@pytest.mark.parametrize("factors", [rope.unscaled(D), rope.linear(D, 8), rope.ntk(D, 8), rope.yarn(D, 8, BASE, L)])
def test_trained_until_is_where_angles_begin_that_training_has_not_shown(factors):
    until = rope.trained_until(factors, L, BASE)
    theta = rope.frequencies(D, BASE)
    seen = L * theta  # the angles of training lie below these
    positions = np.arange(8 * L)
    for pair in range(D // 2):
        angles = positions * theta[pair] / float(factors.lam[pair])
        is_new = (angles >= seen[pair] * (1 + 1e-6)) & (seen[pair] < 2 * np.pi)
        assert np.array_equal(is_new, positions > until[pair] * (1 + 1e-6))


def test_from_the_critical_pair_on_a_range_ends():
    ends = np.isfinite(rope.trained_until(rope.unscaled(D), L, BASE))
    assert np.argmax(ends) == rope.critical_dimension(D, BASE, L)
    assert ends[np.argmax(ends) :].all()


def test_the_score_is_that_of_a_rotated_query_and_key_of_ones():
    factors = rope.yarn(D, 8, BASE, L)
    distances = np.array([0, 1, 7, 100, 900])
    ones = np.ones((1, len(distances), 1, D), np.float32)
    query, key = (
        rope.apply_rotary(ones, *rope.rotary_embedding(positions[None], factors, BASE))
        for positions in (1000 + 0 * distances, 1000 - distances)
    )
    expected = np.sum(np.asarray(query) * np.asarray(key), axis=(0, 2, 3)) / D
    np.testing.assert_allclose(rope.score_by_distance(factors, distances, BASE), expected, atol=2e-6)
