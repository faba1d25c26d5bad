import contextlib
import re
from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from longrope_jax.model import Llama, LlamaConfig, cache
from longrope_jax.model.cache import Memory, attend, empty_cache, slots_for
from longrope_jax.model.decode import GREEDY, advance
from longrope_jax.model.sharding import make_mesh
from longrope_jax.rope import stack, unscaled

BLOCK, READS = 4, 3
SLOTS, LAYER = 64, 1
BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 8
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    original_length=16,
)
MESHES = {"one device": None, "data, seq and tensor": dict(data=2, seq=2, tensor=2), "seq": dict(seq=4)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", BLOCK)
    monkeypatch.setattr(cache, "READS", READS)


def active(mesh):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(**mesh))


def make_qkv(length, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def filled(value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), empty_cache(CONFIG, BATCH, SLOTS))


RUN = jax.jit(attend)  # one program a mesh for most tests: they read eight tokens at a time


def read(held, qkv, chunk=8, first=0):
    """All tokens of both rows, in chunks -> the mixed values, and the cache."""
    outs = []
    for start in range(0, qkv[0].shape[1], chunk):
        part = [x[:, start : start + chunk] for x in qkv]
        positions = np.broadcast_to(first + start + np.arange(chunk, dtype=np.int32), (BATCH, chunk))
        mixed, memory = RUN(Memory(held, np.int32(LAYER)), *part, positions)
        assert memory.layer == LAYER + 1
        held = memory.cache
        outs.append(mixed)
    return np.concatenate(outs, axis=1), held


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_attention_over_the_cache_agrees_with_the_float64_reference(mesh):
    """In chunks of eight and then one by one, over blocks read together and alone; other layers stay as they are."""
    qkv = make_qkv(48)
    wanted = reference.attention(*qkv, np.arange(48)[None])
    with active(mesh):
        many, held = read(filled(7.0), [x[:, :40] for x in qkv])
        single, held = read(held, [x[:, 40:] for x in qkv], 1, first=40)
        assert held.keys.sharding.is_equivalent_to(empty_cache(CONFIG, BATCH, SLOTS).keys.sharding, 5)
    np.testing.assert_allclose(np.concatenate([many, single], axis=1), wanted, rtol=1e-5, atol=1e-6)
    for leaf in held:
        assert (np.delete(np.asarray(leaf), LAYER, axis=0) == 7).all()
        assert (np.asarray(leaf)[LAYER] != 7).any(axis=-1).sum() == BATCH * KV_HEADS * 48


def test_rows_have_positions_of_their_own():
    qkv, lengths = make_qkv(32), np.array([30, 13], np.int32)
    _, held = read(filled(0.0), qkv)
    query, key, value = (x[np.arange(BATCH), lengths - 1][:, None] for x in qkv)
    mixed, _ = RUN(Memory(held, np.int32(LAYER)), query, key, value, lengths[:, None] - 1)
    for row, length in enumerate(lengths):
        alone = [x[row : row + 1, :length] for x in qkv]
        wanted = reference.attention(*alone, np.arange(length)[None])[0, -1]
        np.testing.assert_allclose(mixed[row, 0], wanted, rtol=1e-5, atol=1e-6)


def test_slots_beyond_a_query_are_never_seen():
    """What a shorter row has there after a prefill, or all rows before a cache is rebuilt."""
    clean, dirty = (read(filled(value), make_qkv(24))[0] for value in (0.0, 1e4))
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("mesh", [None, dict(seq=4)], ids=["one device", "seq"])
def test_tokens_beyond_the_last_slot_are_not_written(mesh):
    with active(mesh):
        _, held = read(filled(7.0), make_qkv(8), first=SLOTS - 2)
    assert (np.asarray(held.keys)[LAYER] != 7).any(axis=-1).sum() == 2 * BATCH * KV_HEADS


def test_every_device_has_the_same_part_of_what_is_used():
    with active(dict(seq=4)):
        _, held = read(filled(0.0), make_qkv(4 * BLOCK))
    used = [(np.asarray(shard.data)[LAYER] != 0).any(axis=-1).sum() for shard in held.keys.addressable_shards]
    assert used == [BLOCK * BATCH * KV_HEADS] * 4


def test_softmax_survives_enormous_scores():
    query, key, value = make_qkv(24)
    mixed, _ = read(filled(0.0), (query * 100, key, value))
    wanted = reference.attention(query * 100, key, value, np.arange(24)[None])
    np.testing.assert_allclose(mixed, wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_to_float32():
    qkv = make_qkv(24, dtype=jnp.bfloat16)
    mixed, _ = read(jax.tree.map(lambda x: x.astype(jnp.bfloat16), filled(0.0)), qkv)
    assert mixed.dtype == jnp.bfloat16
    assert np.abs(mixed.astype(np.float32) - reference.attention(*qkv, np.arange(24)[None])).max() < 2e-2


@pytest.mark.parametrize("mesh", [None, dict(seq=4)], ids=["one device", "seq"])
def test_slots_are_whole_blocks_few_shapes_and_little_more_than_needed(mesh):
    with active(mesh):
        whole = BLOCK * (4 if mesh else 1)
        slots = np.array([slots_for(length) for length in range(1, 4097)])
    needed = np.maximum(2 * whole, -(-np.arange(1, 4097) // whole) * whole)
    assert (slots % whole == 0).all()
    assert (slots >= needed).all()
    assert (slots <= needed * 9 / 8 + whole).all()
    assert len(set(slots)) < 80


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_copies_nothing_of_the_cache(rows):
    """Neither of the smallest, all of whose blocks a careless loop reads at once, nor of a large one."""
    model, factors, one = Llama(CONFIG), stack([unscaled(DIM)] * rows), np.zeros((rows, 1), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), one, factors)["params"]
    temporary = []
    for slots in (slots_for(1), 4096):
        held = jax.eval_shape(partial(empty_cache, CONFIG, rows, slots))
        lowered = advance.lower(model, GREEDY, params, np.uint32(0), factors, held, one, one[:, 0], one[:, 0])
        compiled = lowered.compile({"xla_backend_optimization_level": 0})
        shape = ",".join(map(str, held.keys.shape))
        assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", compiled.as_text()), slots
        assert compiled.memory_analysis().alias_size_in_bytes == 4 * 2 * held.keys.size
        temporary.append(hlo.temporary_bytes(compiled))
    assert temporary[1] < 1.5 * temporary[0]
