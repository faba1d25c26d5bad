import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from longrope_jax import rope
from longrope_jax.model import Llama, LlamaConfig, llama
from longrope_jax.model.llama import project, token_nll

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 13, 8, 11


def make_inputs(scale=1.0):
    rng = np.random.default_rng(0)
    hidden = scale * rng.standard_normal((BATCH, LENGTH, WIDTH))
    head = rng.standard_normal((WIDTH, VOCABULARY))
    targets = rng.integers(0, VOCABULARY, (BATCH, LENGTH))
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(targets, jnp.int32)


def exact_nll(hidden, head, targets):
    return reference.token_nll(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64), targets)


def nll_and_gradients(hidden, head, targets, d_nll):
    nll, pull_back = jax.vjp(lambda hidden, head: token_nll(hidden, head, targets), hidden, head)
    return nll, *pull_back(d_nll)


def test_nll_agrees_with_the_float64_reference():
    inputs = make_inputs()
    nll = token_nll(*inputs)
    assert (nll.shape, nll.dtype) == ((BATCH, LENGTH), jnp.float32)
    np.testing.assert_allclose(nll, exact_nll(*inputs), rtol=1e-5, atol=1e-6)


def test_nll_survives_enormous_logits():
    inputs = make_inputs(scale=1e4)
    wanted = exact_nll(*inputs)
    assert wanted.max() > 1e4
    np.testing.assert_allclose(token_nll(*inputs), wanted, rtol=1e-5, atol=0.01)


def test_logits_of_bfloat16_operands_are_summed_in_float32():
    hidden, head = jnp.ones((1, 1, 257), jnp.bfloat16), jnp.ones((257, 1), jnp.bfloat16)
    logits = project(hidden, head)
    assert logits.dtype == jnp.float32
    assert float(logits[0, 0, 0]) == 257  # which bfloat16 does not have


@pytest.mark.parametrize("chunk", [1, 4, 12, 13])
def test_chunked_nll_and_its_gradients_equal_the_unchunked(monkeypatch, chunk):
    """13 tokens: in chunks of 1, in whole and broken chunks, one short of a single chunk, in a single one."""
    hidden, head, targets = make_inputs()
    d_nll = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, LENGTH)), jnp.float32)
    wanted = jax.jit(nll_and_gradients)(hidden, head, targets, d_nll)

    monkeypatch.setattr(llama, "MAX_LOGITS", chunk * BATCH * VOCABULARY)
    chunked = jax.jit(lambda *args: nll_and_gradients(*args)).lower(hidden, head, targets, d_nll)
    assert (f"tensor<{BATCH}x{LENGTH}x{VOCABULARY}xf32>" in chunked.as_text()) == (chunk == LENGTH)
    got = chunked.compile()(hidden, head, targets, d_nll)
    for actual, expected in zip(got, wanted, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_one_token_of_a_huge_batch_may_exceed_the_bound(monkeypatch):
    monkeypatch.setattr(llama, "MAX_LOGITS", 1)
    inputs = make_inputs()
    np.testing.assert_allclose(token_nll(*inputs), exact_nll(*inputs), rtol=1e-5, atol=1e-6)


def compile_nll(length, function):
    vocabulary, width = 4096, 4
    shapes = [((1, length, width), jnp.float32), ((width, vocabulary), jnp.float32), ((1, length), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    run = jax.value_and_grad(lambda *args: function(*args).sum(), argnums=(0, 1))
    return hlo.compile_only(run, *arguments), length * vocabulary


def test_the_logits_of_a_long_sequence_are_never_held_at_once():
    """2^26 and 2^27 logits, at most 2^24 of them together, forward and backward."""
    short, _ = compile_nll(2**14, token_nll)
    long, all_logits = compile_nll(2**15, token_nll)
    assert hlo.largest_array(long, "f32") <= llama.MAX_LOGITS < all_logits
    # What remains to grow with the length is tiny beside the logits of one chunk.
    assert hlo.temporary_bytes(long) < 1.05 * hlo.temporary_bytes(short)


def test_unchunked_logits_are_held_at_once_so_that_the_check_above_means_something():
    program, all_logits = compile_nll(2**15, lambda hidden, head, targets: project(hidden, head))
    assert hlo.largest_array(program, "f32") >= all_logits


def test_a_bfloat16_models_gradients_of_embedding_and_head_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(llama, "MAX_LOGITS", 4 * 19)  # 512 chunks of 4 positions
    sizes = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
    tokens = jax.random.randint(jax.random.key(0), (1, 2049), 0, 19)
    tokens = tokens.at[:, ::2].set(3)  # half of all places, where small terms would be lost against the sum

    def gradients(dtype):
        model = Llama(LlamaConfig(vocab_size=19, original_length=2048, dtype=dtype, **sizes))
        params = jax.jit(model.init)(jax.random.key(1), tokens[:, :8], rope.unscaled(8))["params"]

        def total(params):
            factors = rope.unscaled(8)
            nll = model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], factors, method="token_nll")
            return nll.sum()

        found = jax.jit(jax.grad(total))(params)
        return found["embed"]["embedding"][3], found["lm_head"][:, 3]

    for exact, rounded in zip(gradients("float32"), gradients("bfloat16"), strict=True):
        assert jnp.linalg.norm(rounded - exact) < 0.05 * jnp.linalg.norm(exact)
