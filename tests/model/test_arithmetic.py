import jax
import pytest

from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.flops import TRAINING, count_flops, matrix_parameters
from longrope_jax.rope import unscaled

TINY = LlamaConfig.preset("tiny", num_layers=2, num_kv_heads=1, attention="dense")


@pytest.mark.parametrize("name, billions", [("llama2_7b", 6.74), ("llama3_8b", 8.03), ("phi3_mini", 3.82)])
def test_published_sizes(name, billions):
    config = LlamaConfig.preset(name)
    embedding = config.vocab_size * config.hidden_size
    assert (matrix_parameters(config) + embedding) / 1e9 == pytest.approx(billions, abs=0.006)


def test_the_parameters_are_those_of_the_model():
    shapes = jax.eval_shape(
        Llama(TINY).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), "int32"), unscaled(TINY.head_dim)
    )["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    counted = sum(leaf.size for path, leaf in leaves if path[-1].key in ("kernel", "lm_head"))
    assert matrix_parameters(TINY) == counted


def test_the_compiler_counts_as_much_where_it_can():
    """One layer is a loop that it counts once; the dense attention multiplies all pairs, twice the causal ones."""
    one = LlamaConfig.preset("tiny", num_layers=1, attention="dense", hidden_size=256, intermediate_size=1024)
    model, batch, length = Llama(one), 2, 256
    tokens = jax.ShapeDtypeStruct((batch, length), "int32")
    factors = unscaled(one.head_dim)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, factors)["params"]
    run = jax.jit(lambda p, t: model.apply({"params": p}, t, factors))
    theirs = run.lower(params, tokens).compile().cost_analysis()["flops"]
    ours = count_flops(one, batch, length)
    assert theirs == pytest.approx(ours.matrices + 2 * ours.attention, rel=0.06)  # theirs has softmax and norms too


def test_attention_grows_with_the_square_and_training_is_three_passes():
    one, two = count_flops(TINY, 1, 1000), count_flops(TINY, 1, 2000)
    assert two.matrices == 2 * one.matrices
    assert two.attention / one.attention == pytest.approx(4, rel=1e-3)
    assert count_flops(TINY, 1, 1000, TRAINING).total == 3 * one.total
