import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.config import PRESETS
from longrope_jax.rope import unscaled

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    original_length=64,
)
# Counted by hand from the published architectures.
PARAMETERS = {
    "tiny": 570_752,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "phi3_mini": 3_821_079_552,
    "smollm2_135m": 134_515_008,
}


def count_parameters(config):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens, unscaled(config.head_dim))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_every_preset_has_a_published_size():
    assert set(PARAMETERS) == set(PRESETS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_exactly_the_published_number_of_parameters(name):
    assert count_parameters(LlamaConfig.preset(name)) == PARAMETERS[name]


def test_preset_takes_changes():
    changed = LlamaConfig.preset("llama3_8b", dtype="bfloat16", num_layers=2)
    assert (changed.dtype, changed.num_layers) == ("bfloat16", 2)
    assert dataclasses.replace(changed, dtype="float32", num_layers=32) == LlamaConfig.preset("llama3_8b")


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="llama9") as error:
        LlamaConfig.preset("llama9")
    assert all(name in str(error.value) for name in PRESETS)


def test_equal_configs_are_one_static_argument_under_jit():
    traced = []
    run = jax.jit(lambda config: traced.append(config) or config.num_layers, static_argnums=0)
    assert [int(run(LlamaConfig(**SMALL, dtype=dtype))) for dtype in ("float32", "float32", "bfloat16")] == [2] * 3
    assert [config.dtype for config in traced] == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, value) for name in SMALL for value in (0, -2)]
    + [
        ("num_heads", 5),
        ("num_kv_heads", 3),
        ("head_dim", 7),
        ("attention", "sparse"),
        ("remat", "everything"),
        ("dtype", "int32"),
        ("dtype", "float33"),
        ("param_dtype", "bool"),
        ("param_dtype", "half a float"),
    ],
)
def test_a_bad_field_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=rf"\b{field} = '?{value}\b"):
        LlamaConfig(**{**SMALL, field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("attention", "dense"), ("remat", "dots_saveable"), ("dtype", "bfloat16"), ("num_kv_heads", 1)]
)
def test_a_good_field_is_accepted(field, value):
    assert getattr(LlamaConfig(**{**SMALL, field: value}), field) == value
