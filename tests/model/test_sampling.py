import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longrope_jax.model.decode import Sampling, restrict, sample

VOCABULARY = 12
LOGITS = (3 * np.random.default_rng(0).standard_normal((5, VOCABULARY))).astype(np.float32)


def reference_probabilities(logits, sampling):
    """Token by token from the most likely on, in float64."""
    probabilities = np.zeros(len(logits))
    order = np.argsort(-logits)[: sampling.top_k or None]
    weights = np.exp(logits[order].astype(np.float64) / sampling.temperature)
    weights /= weights.sum()
    mass = 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass >= sampling.top_p:
            break
        probabilities[token] = weight
        mass += weight
    return probabilities / probabilities.sum()


CASES = [
    Sampling(1.0),
    Sampling(0.3),
    Sampling(1.7, top_k=1),
    Sampling(1.7, top_k=4),
    Sampling(1.7, top_k=100),
    Sampling(1.0, top_p=0.8),
    Sampling(2.0, top_p=0.95),
    Sampling(1.0, top_p=1e-6),
    Sampling(2.0, top_k=5, top_p=0.7),
]


@pytest.mark.parametrize("sampling", CASES, ids=repr)
def test_what_is_drawn_from_agrees_with_the_reference(sampling):
    got = jax.nn.softmax(jax.jit(restrict, static_argnums=1)(LOGITS, sampling))
    wanted = np.stack([reference_probabilities(row, sampling) for row in LOGITS])
    np.testing.assert_array_equal(np.asarray(got) > 0, wanted > 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_frequencies_are_the_probabilities():
    sampling, draws = Sampling(2.0, top_k=6, top_p=0.9), 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    tokens = sample(jnp.broadcast_to(LOGITS[0], (draws, VOCABULARY)), keys, sampling)
    wanted = reference_probabilities(LOGITS[0], sampling)
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert 2 < (wanted > 0).sum() <= 6
    assert counts[wanted == 0].sum() == 0
    deviation = np.sqrt(wanted * (1 - wanted) / draws)
    assert (np.abs(counts / draws - wanted) <= 4 * deviation).all()


def test_temperature_zero_takes_the_most_likely_and_the_first_of_equals():
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    np.testing.assert_array_equal(sample(jnp.asarray(LOGITS), keys, Sampling()), LOGITS.argmax(-1))
    assert sample(jnp.float32([[0, 2, 2, 1]]), keys[:1], Sampling())[0] == 1


def test_a_tiny_temperature_is_greedy():
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    tokens = sample(jnp.asarray(1e4 * LOGITS), keys, Sampling(1e-37, top_p=0.9))
    np.testing.assert_array_equal(tokens, LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
    ],
)
def test_a_bad_field_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        Sampling(**{field: value})
