import dataclasses
import math
import re
from functools import cache, partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from longrope_jax.model import Llama, LlamaConfig, blockwise, llama
from longrope_jax.model.attention import attention, dense
from longrope_jax.model.attention_parts import Tokens, key_blocks
from longrope_jax.model.ring import ring_attention, zigzag
from longrope_jax.model.sharding import make_mesh, partition_spec, tree_shardings
from longrope_jax.rope import RopeFactors, unscaled

BATCH, LENGTH, HEADS, KV_HEADS, DIM, VOCABULARY = 4, 64, 4, 2, 8, 32
MESHES = {"data and seq": dict(data=2, seq=4), "fsdp, seq and tensor": dict(fsdp=2, seq=2, tensor=2)}
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    original_length=16,
    rope_theta=100.0,
)
CONFIGS = {
    "untied": CONFIG,
    "tied and recomputed": dataclasses.replace(CONFIG, tie_embeddings=True, remat="nothing_saveable"),
}


@pytest.fixture(autouse=True)
def several_blocks_a_shard(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 4)


def packed(*lengths):
    """Positions and segment ids of one sequence: positions restart in every segment."""
    return np.concatenate([np.arange(n) for n in lengths]), np.repeat(np.arange(len(lengths)), lengths)


def batch(*sequences):
    return Tokens(*(np.stack(leaves).astype(np.int32) for leaves in zip(*sequences, strict=True)))


UNPACKED = Tokens(np.arange(LENGTH, dtype=np.int32)[None], None)  # one row for all sequences
PACKED = batch(packed(64), packed(20, 44), packed(7, 30, 27), packed(1, 62, 1))
TOKENS = {"one document": UNPACKED, "packed": PACKED}


def in_order(order, tree):
    return jax.tree.map(lambda x: x[:, order], tree)


def assert_close(got, wanted, relative):
    """Relative to the largest element of a leaf."""
    for (path, actual), expected in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert np.abs(actual - expected).max() <= relative * np.abs(expected).max(), jax.tree_util.keystr(path)


# --- attention alone ---------------------------------------------------------------------------------------------


def make_qkv(length=LENGTH, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, length, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def with_gradients(attend):
    def run(qkv, tokens, d_out):
        out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, *tokens), *qkv)
        return out, *pull_back(d_out)

    return run


@cache
def program(mesh, has_segments, length=LENGTH, dtype=np.float32, backend="blockwise"):
    """Of the ring's output and gradients, compiled once for all orders of tokens."""
    qkv, tokens = make_qkv(length, dtype=dtype), in_order(slice(length), PACKED if has_segments else UNPACKED)
    with jax.set_mesh(make_mesh(**dict(mesh))):
        function = with_gradients(partial(ring_attention, backend=backend))
        return hlo.compile_only(function, qkv, tokens, qkv[0])


def run_ring(mesh, qkv, tokens, d_out, **options):
    has_segments = tokens.segments is not None
    compiled = program(tuple(mesh.items()), has_segments, qkv[0].shape[1], qkv[0].dtype.type, **options)
    with jax.set_mesh(make_mesh(**mesh)):
        return compiled(qkv, tokens, d_out)


ORDERS = {
    "contiguous": lambda shards: np.arange(LENGTH),
    "zigzag": lambda shards: zigzag(LENGTH, shards),
    "any order": lambda shards: np.random.default_rng(1).permutation(LENGTH),
}


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_ring_agrees_with_dense_in_output_and_gradients(mesh, order, tokens):
    order = order(mesh["seq"])
    qkv, d_out = make_qkv(), make_qkv(seed=1)[0]
    got = run_ring(mesh, *in_order(order, (qkv, tokens, d_out)))
    wanted = jax.jit(with_gradients(dense))(qkv, tokens, d_out)
    assert_close(in_order(np.argsort(order), got), wanted, relative=1e-5)


def test_shards_that_are_no_whole_number_of_blocks_are_padded():
    """Seven tokens a device are two blocks of four."""
    mesh = MESHES["data and seq"]
    qkv, d_out, tokens = make_qkv(28), make_qkv(28, seed=1)[0], in_order(slice(28), PACKED)
    wanted = jax.jit(with_gradients(dense))(qkv, tokens, d_out)
    assert_close(run_ring(mesh, qkv, tokens, d_out), wanted, relative=1e-5)


def test_bfloat16_is_merged_in_float32():
    """Seven roundings of partial results to bfloat16 would be off by several times as much as one."""
    mesh, order = dict(seq=8), zigzag(LENGTH, 8)
    qkv, d_out = make_qkv(dtype=jnp.bfloat16), make_qkv(seed=1, dtype=jnp.bfloat16)[0]
    got = run_ring(mesh, *in_order(order, (qkv, PACKED, d_out)))
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, d_out))
    wanted = jax.jit(with_gradients(dense))(in_float32[0], PACKED, in_float32[1])
    assert_close(in_order(np.argsort(order), got), wanted, relative=1e-2)


def test_a_mesh_with_whole_sequences_takes_any_backend():
    qkv, d_out = make_qkv(), make_qkv(seed=1)[0]
    got = run_ring(dict(data=2, tensor=2), qkv, PACKED, d_out, backend="dense")
    assert_close(got, jax.jit(with_gradients(dense))(qkv, PACKED, d_out), relative=1e-5)


# --- zigzag ------------------------------------------------------------------------------------------------------


def test_zigzag_gives_every_device_an_early_and_a_late_chunk():
    order = zigzag(24, 3)
    assert order.dtype == np.int32
    chunks = order.reshape(6, 4)
    assert (np.diff(chunks) == 1).all()
    assert list(chunks[:, 0] // 4) == [0, 5, 1, 4, 2, 3]
    np.testing.assert_array_equal(np.arange(24)[order][np.argsort(order)], np.arange(24))
    np.testing.assert_array_equal(zigzag(6, 1), np.arange(6))


@pytest.mark.parametrize(("length", "shards"), [(20, 4), (4, 4), (7, 1)])
def test_zigzag_needs_two_chunks_a_shard(length, shards):
    with pytest.raises(ValueError, match=f"{length} tokens are not a multiple of {2 * shards}"):
        zigzag(length, shards)


def block_pairs(order, shards, block):
    """How many block pairs every device looks at on all its steps, before and after its half of the shard."""
    tokens = [Tokens(part[None], None) for part in np.split(order.astype(np.int32), shards)]
    ranges = [[key_blocks(block, queries, keys) for keys in tokens] for queries in tokens]
    return [int(sum((last - first).sum() for first, last in row)) for row in ranges]


def test_zigzag_gives_all_devices_the_same_work():
    n, block = 4, 4
    assert blockwise.choose_block(16, 2, DIM, np.float32) == block
    in_order = block_pairs(np.arange(64), n, block)
    assert in_order == [10, 26, 42, 58]
    assert block_pairs(zigzag(64, n), n, block) == [sum(in_order) // n] * n


# --- the model ---------------------------------------------------------------------------------------------------

TEXT, TARGETS = np.random.default_rng(5).integers(0, VOCABULARY, (2, BATCH, LENGTH)).astype(np.int32)
LAM = np.float32(np.linspace(1, 3, BATCH)[:, None] ** np.linspace(0, 1, DIM // 2))  # each sequence its own
MSCALE = np.linspace(0.9, 1.2, BATCH, dtype=np.float32)


def parameter_shapes(config):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Llama(config).init, jax.random.key(0), tokens, unscaled(DIM))["params"]


@cache
def make_params(config):
    rng = np.random.default_rng(2)
    fill = lambda x: np.asarray(rng.standard_normal(x.shape) / np.sqrt(x.shape[0]), x.dtype)  # noqa: E731
    return jax.tree.map(fill, parameter_shapes(config))


def gradient_function(config):
    def total(params, lam, mscale, text, targets, tokens):
        factors = RopeFactors(lam, jnp.full(lam.shape[0], 5, jnp.int32), mscale)
        return Llama(config).apply({"params": params}, text, targets, factors, *tokens, method="token_nll").sum()

    return jax.value_and_grad(total, argnums=(0, 1, 2))


@cache
def on_one_device(config, name):
    arguments = (make_params(config), LAM, MSCALE, TEXT, TARGETS, TOKENS[name])
    return hlo.compile_only(gradient_function(config), *arguments)(*arguments)


@pytest.mark.parametrize(
    ("mesh", "name", "config"),
    [
        ("data and seq", "packed", "untied"),
        ("data and seq", "one document", "tied and recomputed"),
        ("fsdp, seq and tensor", "packed", "tied and recomputed"),
        ("fsdp, seq and tensor", "one document", "untied"),
    ],
)
def test_sharded_loss_and_gradients_equal_the_single_devices(monkeypatch, mesh, name, config):
    """Of all parameters, lam and mscale; in chunks of the loss that are smaller than a device's part."""
    config, sizes, mesh = CONFIGS[config], MESHES[mesh], make_mesh(**MESHES[mesh])
    wanted = on_one_device(config, name)
    monkeypatch.setattr(llama, "MAX_LOGITS", 700)
    params = jax.device_put(make_params(config), tree_shardings(mesh, make_params(config)))

    def arguments(order):
        return params, LAM, MSCALE, *in_order(order, (TEXT, TARGETS, TOKENS[name]))

    orders = [zigzag(LENGTH, sizes["seq"]), np.arange(LENGTH)]
    with jax.set_mesh(mesh):
        compiled = hlo.compile_only(gradient_function(config), *arguments(orders[0]))
        for order in orders:
            total, gradients = compiled(*arguments(order))
            assert float(total) == pytest.approx(float(wanted[0]), rel=1e-5)
            assert_close(gradients, wanted[1], relative=1e-4)

    # Parameters are gathered; nothing is along the sequence.
    gathered = gathered_shapes(compiled)
    assert gathered
    assert not any(LENGTH in shape or math.prod(shape) >= size_of_keys(sizes) for shape in gathered)


def test_gradient_of_a_bfloat16_head_is_summed_over_devices_once_and_in_float32(monkeypatch):
    monkeypatch.setattr(llama, "MAX_LOGITS", 700)
    rng = np.random.default_rng(0)
    width = 12
    hidden = jnp.asarray(rng.standard_normal((BATCH, LENGTH, width)), jnp.bfloat16)
    head = jnp.asarray(rng.standard_normal((width, VOCABULARY)), jnp.bfloat16)
    gradient = jax.grad(lambda hidden, head: llama.token_nll(hidden, head, TARGETS).sum(), argnums=(0, 1))
    wanted = jax.jit(gradient)(*jax.tree.map(lambda x: x.astype(jnp.float32), (hidden, head)))

    mesh = make_mesh(**MESHES["fsdp, seq and tensor"])
    with jax.set_mesh(mesh):
        compiled = hlo.compile_only(gradient, hidden, head)
        assert_close(compiled(hidden, head), wanted, relative=1e-2)
    sums = [line for line in compiled.as_text().splitlines() if re.search(r" all-reduce\(", line)]
    sums_of_head = [line for line in sums if re.search(rf"\[{width},\d+\]", line)]
    assert len(sums_of_head) == 1
    assert "f32" in sums_of_head[0] and "while/body" not in sums_of_head[0]
    assert any("while/body" in line for line in sums)  # what is cut along the vocabulary, in every chunk


# --- what the compiler makes of it -------------------------------------------------------------------------------


def gathered_shapes(compiled):
    """What all-gathers result in."""
    results = re.findall(r"= (.*?) all-gather(?:-start)?\(", compiled.as_text())
    return [tuple(map(int, dims.split(","))) for result in results for dims in re.findall(r"\[([\d,]+)\]", result)]


def size_of_keys(sizes):
    """Elements of a device's keys if it had them for all tokens."""
    return BATCH * LENGTH * KV_HEADS * DIM // (sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("tensor", 1))


def test_attention_without_the_ring_gathers_keys_so_that_the_check_above_means_something():
    sizes = MESHES["data and seq"]
    mesh = make_mesh(**sizes)
    qkv = jax.device_put(make_qkv(), NamedSharding(mesh, partition_spec("batch", "length", "heads", None)))
    with jax.set_mesh(mesh):
        compiled = hlo.compile_only(partial(attention, backend="dense"), *qkv, *UNPACKED)
    assert any(LENGTH in shape and math.prod(shape) == size_of_keys(sizes) for shape in gathered_shapes(compiled))


LONG = 2**16


@pytest.fixture(scope="module")
def long_programs():
    """Gradient steps by the number of devices that share the sequence; compiled for shapes, nothing is allocated."""
    text, factors = jax.ShapeDtypeStruct((1, LONG), jnp.int32), jax.eval_shape(lambda: (LAM[:1], MSCALE[:1]))
    arguments = (parameter_shapes(CONFIG), *factors, text, text, Tokens(text, text))
    programs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "MAX_LOGITS", 2**18)
        for shards in (1, 2, 4, 8):
            with jax.set_mesh(make_mesh(seq=shards)):
                programs[shards] = hlo.compile_only(gradient_function(CONFIG), *arguments)
    return programs


def test_memory_of_a_device_falls_as_devices_share_the_sequence(long_programs):
    temporary = {shards: hlo.temporary_bytes(program) for shards, program in long_programs.items()}
    for shards in (2, 4, 8):
        assert temporary[shards] < 1.1 * temporary[1] / shards


def test_no_device_ever_has_an_array_of_the_whole_sequence(long_programs):
    has_whole = {n: bool(re.search(rf"[\[,]{LONG}[,\]]", program.as_text())) for n, program in long_programs.items()}
    assert has_whole == {1: True, 2: False, 4: False, 8: False}
    for shards in (2, 4, 8):
        assert gathered_shapes(long_programs[shards]) == []
        assert "collective-permute" in long_programs[shards].as_text()
