"""Ring attention against dense attention, whatever the documents in a batch and the order of their tokens."""

from functools import cache, partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from properties.draws import seeds

from longrope_jax.model import blockwise
from longrope_jax.model.attention import dense
from longrope_jax.model.ring import ring_attention, zigzag
from longrope_jax.model.sharding import make_mesh

BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 32, 2, 1, 4
MESH = dict(data=2, seq=4)


@st.composite
def packed(draw):
    """Positions and segment ids of one sequence: cut anywhere, into any number of documents."""
    ends = sorted(draw(st.sets(st.integers(1, LENGTH - 1), max_size=6)) | {LENGTH})
    sizes = np.diff([0, *ends])
    return np.concatenate([np.arange(size) for size in sizes]), np.repeat(np.arange(len(sizes)), sizes)


def orders():
    """Of tokens in memory; any will do, as positions and segments go with them."""
    fixed = st.sampled_from([np.arange(LENGTH), zigzag(LENGTH, MESH["seq"]), np.arange(LENGTH)[::-1]])
    return fixed | st.permutations(range(LENGTH)).map(np.asarray)


def with_gradients(attend, query, key, value, positions, segments, d_out):
    out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, positions, segments), query, key, value)
    return out, *pull_back(d_out)


@cache
def programs():
    """Each compiled once, for all examples."""
    return jax.jit(partial(with_gradients, partial(ring_attention, backend="blockwise"))), jax.jit(
        partial(with_gradients, dense)
    )


@pytest.fixture(autouse=True, scope="module")
def several_blocks_a_shard():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", 4)
        yield
        programs.cache_clear()


@settings(max_examples=12)
@given(st.lists(packed(), min_size=BATCH, max_size=BATCH), orders(), seeds, st.sampled_from([0.1, 1.0, 3.0]))
def test_the_ring_is_dense_attention(sequences, order, seed, size):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, LENGTH, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    query, key, value, d_out = (jnp.asarray(size * rng.standard_normal(shape), jnp.float32) for shape in shapes)
    positions, segments = (np.stack(leaves).astype(np.int32) for leaves in zip(*sequences, strict=True))
    ring, whole = programs()
    with jax.set_mesh(make_mesh(**MESH)):
        got = ring(*(leaf[:, order] for leaf in (query, key, value, positions, segments, d_out)))
        got = [np.asarray(leaf)[:, np.argsort(order)] for leaf in got]
    wanted = whole(query, key, value, positions, segments, d_out)
    for found, expected in zip(got, wanted, strict=True):
        assert np.abs(found - np.asarray(expected)).max() <= 2e-5 * np.abs(expected).max()
