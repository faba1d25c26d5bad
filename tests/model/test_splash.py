"""The TPU kernels, interpreted: alone and as the inner block of the ring, against dense attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longrope_jax.model import Llama, LlamaConfig, splash
from longrope_jax.model.attention import attention, cudnn_takes, dense, partial_backend, resolve
from longrope_jax.model.attention_parts import Tokens
from longrope_jax.model.ring import ring_attention, zigzag
from longrope_jax.model.sharding import make_mesh, tree_shardings
from longrope_jax.rope import RopeFactors

BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 1024, 4, 2, 32


@pytest.fixture(autouse=True)
def several_blocks_a_shard(monkeypatch):
    monkeypatch.setattr(splash, "blocks_for", lambda *_: splash.Blocks(256, 128, 128))


def make_qkv(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, LENGTH, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def packed(*lengths):
    """Segments from 1 up, and padding to the end."""
    padding = LENGTH - sum(lengths)
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(padding)])
    segments = np.concatenate([np.repeat(np.arange(1, len(lengths) + 1), lengths), np.zeros(padding)])
    return positions.astype(np.int32), segments.astype(np.int32)


TOKENS = {
    "one document": Tokens(np.arange(LENGTH, dtype=np.int32)[None], None),
    "packed": Tokens(*map(np.stack, zip(packed(300, 129, 500), packed(1, 1000), strict=True))),
}
ORDERS = {
    "contiguous": np.arange(LENGTH),
    "zigzag": zigzag(LENGTH, 4),
    "any order": np.random.default_rng(1).permutation(LENGTH),
}


def in_order(order, tree):
    return jax.tree.map(lambda x: x[:, order], tree)


def with_gradients(attend):
    def run(qkv, tokens, d_out):
        out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, *tokens), *qkv)
        return out, *pull_back(d_out)

    return jax.jit(run)


def assert_close(got, wanted):
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.abs(one - other).max() < (1e-3 if index else 1e-5) * np.abs(other).max()


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_kernels_agree_with_dense(tokens):
    qkv, d_out = make_qkv(), make_qkv(1)[0]
    got = with_gradients(partial(attention, backend="splash_interpreted"))(qkv, tokens, d_out)
    assert_close(got, with_gradients(dense)(qkv, tokens, d_out))


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_the_ring_of_kernels_agrees_with_dense_in_every_order_of_tokens(tokens):
    qkv, d_out = make_qkv(), make_qkv(1)[0]
    wanted = with_gradients(dense)(qkv, tokens, d_out)
    with jax.set_mesh(make_mesh(seq=4, tensor=2)):
        run = with_gradients(partial(ring_attention, backend="splash_interpreted"))
        for order in ORDERS.values():
            got = run(*in_order(order, (qkv, tokens, d_out)))
            assert_close(in_order(np.argsort(order), got), wanted)


def test_a_model_on_the_ring_of_kernels_with_start_tokens():
    """Loss, and gradients of parameters and factors; every sequence has n_hat and lambda of its own."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS,
        head_dim=16, original_length=128,
    )  # fmt: skip
    text, targets = np.random.default_rng(5).integers(0, 64, (2, BATCH, LENGTH)).astype(np.int32)
    lam = np.float32(np.array([[2.0], [5.0]]) ** np.linspace(0, 1, 8))

    def gradients(attention):
        model = Llama(LlamaConfig(**{**config.__dict__, "attention": attention}))

        def loss(params, lam, text, targets, tokens):
            factors = RopeFactors(lam, jnp.array([7, 64]), jnp.ones(BATCH))
            return model.apply({"params": params}, text, targets, factors, *tokens, method="token_nll").mean()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    factors = RopeFactors(lam, np.int32([0, 0]), lam[:, 0])
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), text[:, :1], factors)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape) / np.sqrt(x.shape[0])), shapes["params"])
    wanted = gradients("dense")(params, lam, text, targets, TOKENS["packed"])
    mesh = make_mesh(seq=4, fsdp=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, params))
        rows = in_order(ORDERS["zigzag"], (text, targets, TOKENS["packed"]))
        got = gradients("splash_interpreted")(placed, lam, *rows)
    assert float(got[0]) == pytest.approx(float(wanted[0]), rel=1e-5)
    for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert np.abs(one - other).max() <= 1e-3 * np.abs(other).max()


def test_blocks_that_nothing_sees_are_skipped_and_fetch_nothing_new():
    """Half of the pairs of one document, and in a packed row those of the same segment only."""
    for (positions, segments), wanted in ((TOKENS["one document"], 36), (TOKENS["packed"], 22)):
        row = Tokens(positions[0], None if segments is None else segments[0])
        for by_key in (False, True):
            info = splash._schedule(128, LENGTH, splash._reach(row, row), by_key)
            visible, fetched = np.asarray(info.block_mask[0], bool), np.asarray(info.data_next[0])
            assert visible.sum() == wanted
            queries, keys = np.nonzero(visible)
            np.testing.assert_array_equal(fetched[visible], queries if by_key else keys)
            lines = fetched.T if by_key else fetched
            for line, seen in zip(lines, visible.T if by_key else visible, strict=True):
                assert set(line) <= set(np.flatnonzero(seen)) | {0}


def test_nothing_of_the_mask_is_built_on_the_host_or_kept():
    """2M tokens: tracing makes no array that grows with T squared, nor a constant that grows with T."""
    length = 2**21
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    qkv = shape((1, length, 1, 128)), shape((1, length, 1, 128)), shape((1, length, 1, 128))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    traced = jax.make_jaxpr(partial(attention, backend="splash_interpreted"))(*qkv, tokens)
    assert sum(np.size(constant) for constant in traced.consts) == 0
    sizes = [np.prod(var.aval.shape) for eqn in traced.jaxpr.eqns for var in eqn.outvars if hasattr(var.aval, "shape")]
    assert max(sizes) <= length * 128


def test_a_backend_is_chosen_by_platform_and_one_that_cannot_run_there_is_refused():
    assert [resolve("auto", platform) for platform in ("cpu", "tpu")] == ["blockwise", "splash"]
    assert resolve("blockwise", "tpu") == "blockwise"
    assert partial_backend("auto", "gpu") == "blockwise"
    with pytest.raises(ValueError, match="'splash' does not run on a cpu; here run auto, dense, blockwise, splash_int"):
        attention(*make_qkv(), *TOKENS["one document"], backend="splash")
    with pytest.raises(ValueError, match="'cudnn' does not run on a tpu; here run auto, .*splash"):
        resolve("cudnn", "tpu")
    with pytest.raises(ValueError, match="'cudnn' needs whole sequences; .* take blockwise, splash_interpreted$"):
        partial_backend("cudnn", "gpu")


def test_the_fused_attention_of_gpus_gets_what_dense_gets(monkeypatch):
    """The kernel's own entrance, with XLA behind it: heads, scale and mask mean the same, in any order of tokens."""
    entrance = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **kwargs: entrance(*args, **kwargs)
    )
    monkeypatch.setattr("longrope_jax.model.attention.running_on", lambda: "gpu")
    qkv, d_out = make_qkv(dtype=jnp.bfloat16), make_qkv(1, jnp.bfloat16)[0]
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, d_out))
    wanted = with_gradients(dense)(in_float32[0], TOKENS["one document"], in_float32[1])
    for name in ("cudnn", "auto"):
        for order in (ORDERS["contiguous"], ORDERS["any order"]):
            run = with_gradients(partial(attention, backend=name))
            got = in_order(np.argsort(order), run(*in_order(order, (qkv, TOKENS["one document"], d_out))))
            for one, other in zip(got, wanted, strict=True):
                assert np.abs(np.float32(one) - other).max() < 2e-2 * np.abs(other).max()
    assert cudnn_takes(jnp.bfloat16, 128, False)
    assert not cudnn_takes(jnp.float32, 128, False) and not cudnn_takes(jnp.bfloat16, 160, False)
    with pytest.raises(ValueError, match="can't keep the segments"):
        attention(*qkv, *TOKENS["packed"], backend="cudnn")
    with pytest.raises(ValueError, match="'cudnn' computes in bfloat16 or float16 .* not in float32"):
        attention(*make_qkv(), *TOKENS["one document"], backend="cudnn")
