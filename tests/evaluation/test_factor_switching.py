import jax
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.evaluation.factor_switching import nll_after_switch
from longrope_jax.evaluation.perplexity import token_nll
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.runtime.mesh import Layout

L, TEXT = 16, 40
SIZES = dict(vocab_size=31, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)


@pytest.fixture(scope="module")
def reader():
    """A model of random parameters, sharpened so that factors make a difference, and random text."""
    model = Llama(LlamaConfig(**SIZES, original_length=L))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32), rope.unscaled(8))["params"]
    params = jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim > 1 else leaf, params)
    return model, params, np.random.default_rng(0).integers(0, 31, (3, TEXT + 1)).astype(np.int32)


def losses(reader, factors):
    model, params, tokens = reader
    return token_nll(model, Layout(), params, factors, tokens, TEXT)[:, L:]


def crossed(reader, before, after, read_again):
    model, params, tokens = reader
    return nll_after_switch(model, params, before, after, tokens, L, read_again=read_again)


def test_reading_again_gives_what_a_forward_pass_gives(reader):
    after = rope.yarn(8, 4.0, original_length=L)
    found = crossed(reader, rope.unscaled(8), after, read_again=True)
    np.testing.assert_allclose(found, losses(reader, after), atol=2e-4)


def test_old_keys_are_as_if_so_many_start_tokens_had_kept_their_rotation(reader):
    # Everything about the tokens before the boundary is what the old factors made of it, and n_hat says just that.
    after = rope.linear(8, 4.0)
    found = crossed(reader, rope.unscaled(8), after, read_again=False)
    np.testing.assert_allclose(found, losses(reader, after.replace(n_hat=np.int32(L))), atol=2e-4)
    assert np.abs(found - losses(reader, after)).max() > 0.01


@pytest.mark.parametrize("boundary", [0, TEXT])
def test_a_boundary_outside_of_the_text_is_refused(reader, boundary):
    model, params, tokens = reader
    factors = rope.unscaled(8)
    with pytest.raises(ValueError, match=f"boundary = {boundary} must lie between 1 and {TEXT - 1}"):
        nll_after_switch(model, params, factors, factors, tokens, boundary, read_again=True)
