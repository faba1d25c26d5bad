from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from longrope_jax.rope import RopeFactors, apply_rotary, rotary_embedding, stack

FAR = 2**21
TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
BASES_AND_DIMS = [(1e4, 2), (1e4, 64), (1e4, 128), (5e5, 48), (5e5, 128)]

rotation = jax.jit(rotary_embedding, static_argnums=2)


def make_factors(lam, n_hat=0, mscale=1.0):
    return RopeFactors(np.asarray(lam, np.float32), np.int32(n_hat), np.float32(mscale))


def random_lam(rng, half, low=1.0, high=640.0):
    """Non-decreasing and log-uniform, so that small and large factors are equally common."""
    return np.sort(np.exp(rng.uniform(np.log(low), np.log(high), half))).astype(np.float32)


def random_positions(rng, count, low=0, high=FAR):
    return np.concatenate([rng.integers(low, high, count - 2, endpoint=True), [low, high]]).astype(np.int32)


def exact(positions, factors, base):
    return reference.cos_sin(positions, factors.lam, factors.n_hat, float(factors.mscale), base)


def plain_float32_angles(positions, lam, base):
    theta = reference.inv_freq(2 * len(lam), base).astype(np.float32)
    return positions.astype(np.float32)[:, None] * (theta / lam)


def largest_error(got, wanted):
    return max(float(np.abs(np.asarray(g, np.float64) - w).max()) for g, w in zip(got, wanted, strict=True))


def complex_rotation(positions, factors, base):
    cos, sin = (np.asarray(x, np.float64) for x in rotation(positions, factors, base))
    return cos + 1j * sin


@pytest.mark.parametrize(("base", "head_dim"), BASES_AND_DIMS)
def test_cos_and_sin_are_exact_up_to_2m_tokens_where_a_float32_product_is_not(base, head_dim):
    rng = np.random.default_rng(head_dim)
    positions = random_positions(rng, 256)
    half = head_dim // 2
    lams = [random_lam(rng, half) for _ in range(6)] + [np.full(half, value) for value in (1.0, 640.0, 512.0, 1.01)]
    for lam in lams:
        factors = make_factors(lam)
        assert largest_error(rotation(positions, factors, base), exact(positions, factors, base)) <= TOLERANCE

    factors = make_factors(lams[0])
    naive = plain_float32_angles(positions, factors.lam, base)
    assert largest_error((np.cos(naive), np.sin(naive)), exact(positions, factors, base)) > 1e-3


def test_result_is_float32():
    cos, sin = rotation(np.arange(4, dtype=np.int32), make_factors(np.ones(3)), 1e4)
    assert (cos.dtype, sin.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.parametrize("base", [1e4, 5e5])
def test_relative_rotation_depends_on_the_offset_alone(base):
    rng = np.random.default_rng(1)
    n_hat, offsets = 64, np.array([0, 1, 2, 7, 100, 4095, 30_000])
    starts = [n_hat, 5_000, 2**17 + 3, 2**20 + 1, FAR - 30_000]
    factors = make_factors(random_lam(rng, 32), n_hat)
    wanted_cos, wanted_sin = reference.cos_sin(offsets, factors.lam, base=base)
    wanted = wanted_cos + 1j * wanted_sin
    naive_errors = []
    for start in starts:
        positions = (start + offsets).astype(np.int32)
        here = complex_rotation(positions, factors, base)
        assert np.abs(here[0].conj() * here - wanted).max() <= TOLERANCE
        naive = np.exp(1j * plain_float32_angles(positions, factors.lam, base).astype(np.float64))
        naive_errors.append(np.abs(naive[0].conj() * naive - wanted).max())
    assert max(naive_errors) > 1e-3


@pytest.mark.parametrize("n_hat", [0, 1, 8, 40])
def test_positions_before_n_hat_keep_the_original_angle_and_all_others_do_not(n_hat):
    positions = np.arange(32, dtype=np.int32)
    lam = np.linspace(2, 5, 8)
    got = complex_rotation(positions, make_factors(lam, n_hat), 1e4)
    original = complex_rotation(positions, make_factors(np.ones(8)), 1e4)
    rescaled = complex_rotation(positions, make_factors(lam), 1e4)
    np.testing.assert_array_equal(got[:n_hat], original[:n_hat])
    np.testing.assert_array_equal(got[n_hat:], rescaled[n_hat:])
    factors = make_factors(lam, n_hat)
    assert largest_error((got.real, got.imag), exact(positions, factors, 1e4)) <= TOLERANCE


def test_mscale_multiplies_cos_and_sin():
    positions, lam = np.arange(0, FAR, 4099, dtype=np.int32), np.linspace(1, 9, 16)
    plain = rotation(positions, make_factors(lam, 4, 1.0), 1e4)
    scaled = rotation(positions, make_factors(lam, 4, 1.25), 1e4)
    for before, after in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(after, np.float32(1.25) * before, rtol=1e-6)


def population_of(rng, count, half):
    return [make_factors(random_lam(rng, half), 16 * i, 1 + i / 10) for i in range(count)]


def test_vmap_over_a_population_equals_one_by_one():
    rng = np.random.default_rng(2)
    positions, candidates = random_positions(rng, 40), population_of(rng, 5, 16)
    batched = jax.jit(jax.vmap(lambda factors: rotary_embedding(positions, factors)))(stack(candidates))
    for i, candidate in enumerate(candidates):
        assert largest_error([part[i] for part in batched], rotation(positions, candidate, 1e4)) <= TOLERANCE


def test_one_row_of_positions_broadcasts_over_a_population():
    rng = np.random.default_rng(3)
    positions = np.concatenate([np.arange(60), [FAR]]).astype(np.int32)
    candidates = population_of(rng, 3, 8)
    cos, sin = rotation(positions, stack(candidates), 1e4)
    assert cos.shape == sin.shape == (3, 61, 8)
    for i, candidate in enumerate(candidates):
        assert largest_error((cos[i], sin[i]), exact(positions, candidate, 1e4)) <= 2 * TOLERANCE


def test_one_set_of_factors_for_every_sequence():
    rng = np.random.default_rng(4)
    candidates = population_of(rng, 3, 8)
    positions = np.stack([random_positions(rng, 20, 0, high) for high in (40, 5_000, FAR)])
    cos, sin = rotation(positions, stack(candidates), 1e4)
    assert cos.shape == sin.shape == (3, 20, 8)
    for i, candidate in enumerate(candidates):
        assert largest_error((cos[i], sin[i]), exact(positions[i], candidate, 1e4)) <= 2 * TOLERANCE


def test_one_set_of_factors_for_all_sequences():
    rng = np.random.default_rng(5)
    factors = make_factors(random_lam(rng, 8), n_hat=30)
    positions = np.stack([random_positions(rng, 20, 0, high) for high in (40, FAR)])
    cos, sin = rotation(positions, factors, 1e4)
    assert cos.shape == sin.shape == (2, 20, 8)
    for i in range(2):
        assert largest_error((cos[i], sin[i]), exact(positions[i], factors, 1e4)) <= TOLERANCE


def test_a_population_broadcasts_against_a_batch_of_sequences():
    rng = np.random.default_rng(6)
    candidates = population_of(rng, 3, 8)
    positions = np.stack([random_positions(rng, 20, 0, high) for high in (40, FAR)])
    with_axis = jax.tree.map(lambda leaf: leaf[:, None], stack(candidates))
    cos, sin = rotation(positions, with_axis, 1e4)
    assert cos.shape == sin.shape == (3, 2, 20, 8)
    for i, candidate in enumerate(candidates):
        for j in range(2):
            assert largest_error((cos[i, j], sin[i, j]), exact(positions[j], candidate, 1e4)) <= 2 * TOLERANCE


# --- gradients: of a fixed random combination of all cos and sin ------------------------------------------------------


def combination(factors, positions, weights, base):
    cos, sin = rotary_embedding(positions, factors, base)
    return jnp.sum(weights[0] * cos + weights[1] * sin)


def gradient(factors, positions, weights, base):
    """d combination / d lam and / d mscale."""
    of_leaves = lambda lam, mscale: combination(factors.replace(lam=lam, mscale=mscale), positions, weights, base)  # noqa: E731
    return jax.grad(of_leaves, argnums=(0, 1))(factors.lam, factors.mscale)


def assert_gradient(got, factors, positions, weights, base):
    """Compares with central differences in float64, relative to the root of the sum of squares of a gradient's terms.

    That is the size of a sum of so many terms of random sign; one that happens to cancel is no less exact for it.
    """

    def columns(lam, mscale):
        cos, sin = reference.cos_sin(positions, lam, factors.n_hat, mscale, base)
        return (weights[0] * cos + weights[1] * sin).sum(0)

    lam, mscale = factors.lam.astype(np.float64), float(factors.mscale)
    slope = np.where(positions < factors.n_hat, 0, positions)[:, None] * reference.inv_freq(2 * len(lam), base) / lam**2
    step = np.minimum(3e-4 / slope.max(0), 1e-4 * lam)  # no angle moves by more than 3e-4 rad
    # Pairs don't mix, so all of lam can move at once: the columns' sums keep them apart.
    d_lam = (columns(lam + step, mscale) - columns(lam - step, mscale)) / (2 * step)
    d_mscale = (columns(lam, mscale + 1e-3).sum() - columns(lam, mscale - 1e-3).sum()) / 2e-3

    size_of_weights = np.hypot(*weights.astype(np.float64))
    assert np.all(
        np.abs(got[0] - d_lam) <= GRADIENT_TOLERANCE * mscale * np.linalg.norm(slope * size_of_weights, axis=0)
    )
    assert np.abs(got[1] - d_mscale) <= GRADIENT_TOLERANCE * np.linalg.norm(size_of_weights)


def random_weights(rng, tokens, half):
    return rng.normal(size=(2, tokens, half)).astype(np.float32)


@pytest.mark.parametrize("transform", [jax.jit, lambda function: function], ids=["jit", "eager"])
@pytest.mark.parametrize(("base", "head_dim", "last"), [(1e4, 64, 4096), (5e5, 128, FAR)])
def test_gradient_agrees_with_float64_differences(base, head_dim, last, transform):
    rng = np.random.default_rng(7)
    positions, weights = random_positions(rng, 48, 0, last), random_weights(rng, 48, head_dim // 2)
    factors = make_factors(random_lam(rng, head_dim // 2), n_hat=64, mscale=1.2)
    got = transform(partial(gradient, base=base))(factors, positions, weights)
    assert_gradient(got, factors, positions, weights, base)


def test_gradient_of_a_population_under_jit_and_vmap():
    rng = np.random.default_rng(8)
    positions, weights = random_positions(rng, 48), random_weights(rng, 48, 16)
    candidates = population_of(rng, 4, 16)
    batched = jax.jit(jax.vmap(lambda factors: gradient(factors, positions, weights, 1e4)))
    d_lam, d_mscale = batched(stack(candidates))
    for i, candidate in enumerate(candidates):
        assert_gradient((d_lam[i], d_mscale[i]), candidate, positions, weights, 1e4)


def test_gradient_of_a_broadcast_population_equals_one_by_one():
    rng = np.random.default_rng(9)
    positions, weights = random_positions(rng, 48), random_weights(rng, 48, 16)
    candidates = population_of(rng, 3, 16)
    d_lam, d_mscale = jax.jit(lambda factors: gradient(factors, positions, weights, 1e4))(stack(candidates))
    assert (d_lam.shape, d_mscale.shape) == ((3, 16), (3,))
    for i, candidate in enumerate(candidates):
        assert_gradient((d_lam[i], d_mscale[i]), candidate, positions, weights, 1e4)


def test_lam_has_no_influence_on_start_tokens():
    rng = np.random.default_rng(10)
    positions, weights = np.arange(32, dtype=np.int32), random_weights(rng, 32, 8)
    lam = random_lam(rng, 8)
    d_lam_for = lambda n_hat: jax.jit(gradient, static_argnums=3)(make_factors(lam, n_hat), positions, weights, 1e4)[0]  # noqa: E731
    np.testing.assert_array_equal(d_lam_for(32), np.zeros(8))
    assert np.all(np.asarray(d_lam_for(31)) != 0)


# --- rotating heads ---------------------------------------------------------------------------------------------------


def random_heads(rng, dtype, batch=2, tokens=12, heads=3, head_dim=16):
    x = jnp.asarray(rng.normal(size=(batch, tokens, heads, head_dim)), dtype)
    return x, random_positions(rng, batch * tokens).reshape(batch, tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 4e-6), (jnp.bfloat16, 2**-8)])
def test_apply_rotary_is_a_complex_multiplication(dtype, tolerance):
    x, positions = random_heads(np.random.default_rng(11), dtype)
    factors = make_factors(np.linspace(1, 4, 8), n_hat=5)
    cos, sin = rotation(positions, factors, 1e4)
    got = apply_rotary(x, cos, sin)
    assert (got.dtype, got.shape) == (dtype, x.shape)

    x64 = np.asarray(x).astype(np.float64)
    exact_cos, exact_sin = exact(positions, factors, 1e4)
    wanted = (x64[..., :8] + 1j * x64[..., 8:]) * (exact_cos + 1j * exact_sin)[:, :, None, :]
    error = np.abs(np.asarray(got).astype(np.float64) - np.concatenate([wanted.real, wanted.imag], axis=-1))
    assert np.all(error <= tolerance * np.maximum(1, np.tile(np.abs(wanted), 2)))


def test_apply_rotary_preserves_the_norm_of_every_pair():
    x, positions = random_heads(np.random.default_rng(12), jnp.float32)
    got = apply_rotary(x, *rotation(positions, make_factors(np.linspace(1, 4, 8)), 1e4))
    assert np.abs(np.asarray(got - x)).max() > 0.1
    norms = [np.hypot(*np.split(np.asarray(heads, np.float64), 2, axis=-1)) for heads in (got, x)]
    np.testing.assert_allclose(*norms, rtol=2e-6)


@pytest.mark.parametrize("rotation_dtype", [jnp.float32, jnp.bfloat16])
def test_apply_rotary_in_bfloat16_rounds_only_the_result(rotation_dtype):
    x, positions = random_heads(np.random.default_rng(13), jnp.bfloat16)
    cos, sin = (part.astype(rotation_dtype) for part in rotation(positions, make_factors(np.ones(8)), 1e4))
    wide = apply_rotary(*(part.astype(jnp.float32) for part in (x, cos, sin))).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(apply_rotary(x, cos, sin)), np.asarray(wide))


def test_other_factors_and_positions_do_not_compile_again():
    traces = []

    @jax.jit
    def counted(positions, factors):
        traces.append(factors)
        return rotary_embedding(positions, factors)

    positions = np.arange(16, dtype=np.int32)
    outputs = [
        counted(positions + shift, make_factors(np.full(4, lam), n_hat, mscale))
        for shift, lam, n_hat, mscale in [(100, 1, 0, 1), (100, 3.5, 0, 1), (100, 3.5, 110, 1), (7, 3.5, 110, 1.5)]
    ]
    assert len(traces) == 1
    assert all(np.any(a[0] != b[0]) for a, b in zip(outputs, outputs[1:], strict=False))
