from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from longrope_jax.model.attention import PARTIAL_BACKENDS, attention, dense, whole
from longrope_jax.model.attention_parts import Tokens, key_blocks, query_blocks
from longrope_jax.model.blockwise import BLOCK

BLOCK_FOR_TESTS = 8
BACKENDS = {
    "dense": dense,
    "blockwise": partial(whole, PARTIAL_BACKENDS["blockwise"], block=BLOCK_FOR_TESTS),
    "splash": partial(whole, PARTIAL_BACKENDS["splash_interpreted"]),
}
BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 8


def make_qkv(length, seed=0, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((BATCH, length, n, DIM)) for n in (HEADS, KV_HEADS, KV_HEADS))
    return jnp.asarray(query * scale, dtype), jnp.asarray(key, dtype), jnp.asarray(value, dtype)


def packed(*lengths):
    """Positions and segment ids of one sequence [1, T]: positions restart in every segment."""
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat(np.arange(len(lengths)), lengths)
    return positions[None].astype(np.int32), segments[None].astype(np.int32)


def batch(*sequences):
    return tuple(np.concatenate(leaves) for leaves in zip(*sequences, strict=True))


def shuffled(where):
    """The same tokens, in another order for every sequence of the batch."""
    rng = np.random.default_rng(7)
    orders = [rng.permutation(where[0].shape[1]) for _ in where[0]]
    return tuple(np.stack([row[order] for row, order in zip(leaf, orders, strict=True)]) for leaf in where)


def without_segments(where):
    return where[0], None


# Most tests have the same shapes, so that they share compiled programs: 27 tokens are 3 blocks of 8 and a broken one.
PACKED = batch(packed(3, 13, 11), packed(20, 7))
CASES = {
    "one token": without_segments(packed(1)),
    "below a block": packed(2, 3),
    "whole blocks": without_segments(packed(24)),
    "broken last block": without_segments(packed(27)),
    "far from the origin": (packed(27)[0] + 2**21, None),
    "any order": without_segments(shuffled(packed(27))),
    "packed": PACKED,
    "packed in any order": shuffled(PACKED),
    "one row of positions for all segments": (packed(27)[0], PACKED[1]),
}


@partial(jax.jit, static_argnums=0)
def forward_and_gradients(backend, qkv, where, d_out):
    out, pull_back = jax.vjp(lambda *qkv: backend(*qkv, *where), *qkv)
    return out, *pull_back(d_out)


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.abs(got - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("where", CASES.values(), ids=CASES)
def test_backends_agree_with_the_float64_reference_and_in_gradients_with_each_other(where):
    qkv = make_qkv(where[0].shape[1])
    d_out = make_qkv(where[0].shape[1], seed=1)[0]
    wanted = reference.attention(*qkv, *where)
    at_once = forward_and_gradients(BACKENDS["dense"], qkv, where, d_out)
    assert relative_error(at_once[0], wanted) < 1e-6
    for name in ("blockwise", "splash"):
        by_blocks = forward_and_gradients(BACKENDS[name], qkv, where, d_out)
        assert relative_error(by_blocks[0], wanted) < 1e-6
        for got, expected in zip(by_blocks[1:], at_once[1:], strict=True):
            # One token has weight 1 whatever its query and key: their gradients are 0 but for rounding.
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=5e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_gradients_agree_with_finite_differences_of_the_float64_reference(backend):
    where = shuffled(PACKED)
    qkv, d_out = make_qkv(27), make_qkv(27, seed=1)[0]
    gradients = forward_and_gradients(backend, qkv, where, d_out)[1:]
    step = 1e-5
    for i, gradient in enumerate(gradients):
        direction = np.asarray(make_qkv(27, seed=2)[i], np.float64)
        ends = [[np.asarray(x, np.float64) for x in qkv] for _ in range(2)]
        ends[0][i] += step * direction
        ends[1][i] -= step * direction
        up, down = (np.sum(reference.attention(*end, *where) * np.asarray(d_out, np.float64)) for end in ends)
        wanted = (up - down) / (2 * step)
        assert abs(wanted) > 0.1
        assert np.sum(np.asarray(gradient, np.float64) * direction) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("backend", ["auto", "dense", "blockwise", "splash_interpreted"])
def test_attention_dispatches_with_the_default_block(backend):
    where = packed(50, BLOCK)
    qkv = make_qkv(50 + BLOCK)
    out = jax.jit(attention, static_argnums=5)(*qkv, *where, backend)
    assert relative_error(out, reference.attention(*qkv, *where)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_tokens_in_another_order_give_outputs_in_that_order(backend):
    qkv, d_out = make_qkv(27), make_qkv(27, seed=1)[0]
    order = np.random.default_rng(3).permutation(27)
    straight = forward_and_gradients(backend, qkv, PACKED, d_out)
    turned = forward_and_gradients(backend, *jax.tree.map(lambda x: x[:, order], (qkv, PACKED, d_out)))
    for got, wanted in zip(turned, straight, strict=True):
        assert relative_error(got, wanted[:, order]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_softmax_survives_enormous_scores(backend):
    """Beyond 88, where the exponential of a float32 overflows."""
    qkv = make_qkv(27, scale=100)
    outs = forward_and_gradients(backend, qkv, PACKED, make_qkv(27, seed=1)[0])
    assert all(np.isfinite(out).all() for out in outs)
    assert relative_error(outs[0], reference.attention(*qkv, *PACKED)) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_bfloat16_is_finite_and_close_to_float32(backend):
    """Scores around 10 would be off by 0.03 if they were rounded to bfloat16, and the weights by 3%."""
    qkv, d_out = make_qkv(27, dtype=jnp.bfloat16, scale=10), make_qkv(27, seed=1, dtype=jnp.bfloat16)[0]
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, d_out))
    low = forward_and_gradients(backend, qkv, PACKED, d_out)
    high = forward_and_gradients(BACKENDS["dense"], in_float32[0], PACKED, in_float32[1])
    for got, wanted in zip(low, high, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.isfinite(got.astype(np.float32)).all()
        assert relative_error(got, wanted) < 2e-2


def blocks_to_visit(ranges):
    first, last = (np.asarray(x) for x in ranges)
    return int((last - first).sum())


def pairs_for(positions, segments=None):
    tokens = Tokens(positions, segments)
    return [blocks_to_visit(blocks(BLOCK_FOR_TESTS, tokens, tokens)) for blocks in (key_blocks, query_blocks)]


def test_block_pairs_above_the_diagonal_are_not_visited():
    n = 6
    positions, _ = packed(n * BLOCK_FOR_TESTS)
    assert pairs_for(positions) == [n * (n + 1) // 2] * 2
    tokens = Tokens(positions, None)
    first, last = key_blocks(BLOCK_FOR_TESTS, tokens, tokens)
    assert (list(first), list(last)) == ([0] * n, list(range(1, n + 1)))


def test_block_pairs_of_different_segments_are_not_visited():
    positions, segments = packed(2 * BLOCK_FOR_TESTS, 3 * BLOCK_FOR_TESTS, BLOCK_FOR_TESTS)
    assert pairs_for(positions, segments) == [3 + 6 + 1] * 2


def test_a_block_pair_is_visited_if_any_sequence_needs_it():
    in_two, in_one = packed(16, 16), packed(32)
    assert pairs_for(*in_two) == [6] * 2
    assert pairs_for(*batch(in_two, in_one)) == [10] * 2


@pytest.mark.parametrize(
    ("where", "unseen"),
    [
        (batch(packed(27), packed(27)), slice(16, None)),
        (batch(packed(16, 11), packed(16, 11)), slice(16, None)),
        (batch(packed(16, 11), packed(16, 11)), slice(0, 16)),
    ],
    ids=["the future", "the next segment", "the previous segment"],
)
def test_key_blocks_that_nothing_can_attend_to_are_never_touched(where, unseen):
    """Not a number is noticed by whoever multiplies it, even by a weight of 0."""
    query, key, value = make_qkv(27)
    poisoned = (query, key.at[:, unseen].set(jnp.nan), value.at[:, unseen].set(jnp.nan))
    seen = np.delete(np.arange(27), unseen)
    d_out = make_qkv(27, seed=1)[0]
    assert np.isfinite(forward_and_gradients(BACKENDS["blockwise"], poisoned, where, d_out)[0][:, seen]).all()
    assert np.isnan(forward_and_gradients(BACKENDS["dense"], poisoned, where, d_out)[0][:, seen]).all()


def test_query_blocks_that_cannot_see_a_key_are_never_touched_by_its_gradient():
    where = batch(packed(27), packed(27))
    poisoned = make_qkv(27, seed=1)[0].at[:, :16].set(jnp.nan)
    d_key, d_value = forward_and_gradients(BACKENDS["blockwise"], make_qkv(27), where, poisoned)[2:]
    assert np.isfinite(d_key[:, 16:]).all() and np.isfinite(d_value[:, 16:]).all()
    assert np.isnan(forward_and_gradients(BACKENDS["dense"], make_qkv(27), where, poisoned)[3][:, 16:]).all()


def compile_gradient(backend, length):
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    qkv = shape((1, length, 2, 4)), shape((1, length, 1, 4)), shape((1, length, 1, 4))
    where = (jax.ShapeDtypeStruct((1, length), jnp.int32),) * 2
    loss = lambda query, key, value, *where: backend(query, key, value, *where).sum()  # noqa: E731
    return hlo.compile_only(jax.value_and_grad(loss, argnums=(0, 1, 2)), *qkv, *where)


def test_blockwise_memory_is_linear_in_length_forward_and_backward():
    short, long = 16_384, 32_768
    blockwise = partial(whole, PARTIAL_BACKENDS["blockwise"])
    programs = {length: compile_gradient(blockwise, length) for length in (short, long)}
    assert hlo.temporary_bytes(programs[long]) <= 2.0 * hlo.temporary_bytes(programs[short])
    for length, program in programs.items():
        assert hlo.largest_array(program) < length**2 // 100


def test_dense_memory_is_quadratic_so_that_the_check_above_means_something():
    length = 512
    assert hlo.largest_array(compile_gradient(dense, length)) >= length**2
