import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.sharding import (
    AXES,
    check_mesh,
    constrain,
    make_mesh,
    mesh_axes,
    partition_spec,
    shards,
    tree_shardings,
)
from longrope_jax.rope import unscaled

TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    original_length=16,
)
SPECS = {
    "embed/embedding": P("tensor", ("fsdp", "seq")),
    "lm_head": P(("fsdp", "seq"), "tensor"),
    "final_norm/scale": P(None),
    "layers/attention_norm/scale": P(None, None),
    "layers/mlp_norm/scale": P(None, None),
    "layers/attention/query/kernel": P(None, ("fsdp", "seq"), "tensor"),
    "layers/attention/key/kernel": P(None, ("fsdp", "seq"), "tensor"),
    "layers/attention/value/kernel": P(None, ("fsdp", "seq"), "tensor"),
    "layers/attention/output/kernel": P(None, "tensor", ("fsdp", "seq")),
    "layers/mlp/gate/kernel": P(None, ("fsdp", "seq"), "tensor"),
    "layers/mlp/up/kernel": P(None, ("fsdp", "seq"), "tensor"),
    "layers/mlp/down/kernel": P(None, "tensor", ("fsdp", "seq")),
}


def parameter_shapes(**changes):
    model = Llama(dataclasses.replace(TINY, **changes))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens, unscaled(TINY.head_dim))["params"]


def specs_by_name(shardings):
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec for path, leaf in leaves}


def test_the_mesh_always_has_all_axes():
    mesh = make_mesh(seq=2, data=2)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "seq": 2, "tensor": 1}
    with pytest.raises(ValueError, match="no mesh axis sequence; known are data, fsdp, seq, tensor"):
        make_mesh(sequence=2)


def test_names_of_dimensions_become_mesh_axes():
    assert partition_spec("batch", "length", None) == P(("data", "fsdp"), "seq", None)
    assert partition_spec("layers", "embed", "mlp") == P(None, ("fsdp", "seq"), "tensor")
    assert partition_spec() == P()
    assert mesh_axes("batch", "length") == {"data", "fsdp", "seq"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("batch", "length", "embed"), "'batch' and 'embed' of .* both want the mesh axis 'fsdp'"),
        (("heads", "mlp"), "'heads' and 'mlp' of .* both want the mesh axis 'tensor'"),
        (("length", "length"), "'length' and 'length' of .* both want the mesh axis 'seq'"),
        (("batch", "depth"), "no logical axis 'depth'; known are batch, length, "),
    ],
)
def test_dimensions_that_cannot_be_cut_together_are_refused_by_name(names, message):
    with pytest.raises(ValueError, match=message):
        partition_spec(*names)


def test_constrain_cuts_arrays_under_a_mesh_and_leaves_them_alone_without():
    x = jnp.ones((4, 8, 6))
    names = ("batch", "length", "mlp")
    assert constrain(x, *names) is x
    assert shards("batch") == 1
    with jax.set_mesh(make_mesh(data=2, seq=2, tensor=2)):
        cut = jax.jit(lambda x: constrain(x, *names))(x)
        assert (shards("batch"), shards("length"), shards("layers")) == (2, 2, 1)
    assert {shard.data.shape for shard in cut.addressable_shards} == {(2, 4, 3)}


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
def test_every_parameter_has_its_sharding(tie_embeddings):
    shapes = parameter_shapes(tie_embeddings=tie_embeddings)
    wanted = {name: spec for name, spec in SPECS.items() if not (tie_embeddings and name == "lm_head")}
    assert specs_by_name(tree_shardings(make_mesh(fsdp=2, tensor=2), shapes)) == wanted


def test_a_train_states_moments_are_cut_like_their_parameters_and_counters_are_not():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        step: jax.Array
        params: dict
        opt_state: tuple

    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), parameter_shapes())
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(jnp.int32(0), params, optimizer.init(params))
    shardings = tree_shardings(make_mesh(fsdp=2, tensor=2), state)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    found = specs_by_name(shardings)
    for name, spec in SPECS.items():
        assert sorted(path for path in found if path.endswith("/" + name) and found[path] == spec) == sorted(
            [f"params/{name}", f"opt_state/1/0/mu/{name}", f"opt_state/1/0/nu/{name}"]
        )
    others = {path: spec for path, spec in found.items() if not path.endswith(tuple(SPECS))}
    assert others == {"step": P(), "opt_state/1/0/count": P()}
    placed = jax.device_put(state, shardings).opt_state[1][0].mu["lm_head"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(8, 16)}


def sizes(**changes):
    return dict.fromkeys(AXES, 1) | changes


def test_a_mesh_that_divides_everything_is_accepted():
    check_mesh(TINY, sizes(data=3, fsdp=4, seq=4, tensor=2), "cpu")
    check_mesh(dataclasses.replace(TINY, attention="dense"), sizes(data=8), "cpu")
    check_mesh(dataclasses.replace(TINY, attention="splash"), sizes(seq=4), "tpu")


def test_all_that_does_not_fit_the_mesh_is_listed():
    config = dataclasses.replace(TINY, attention="dense", vocab_size=33)
    with pytest.raises(ValueError, match="does not fit the mesh") as error:
        check_mesh(config, sizes(fsdp=5, seq=2, tensor=16), "cpu")
    for problem in (
        "num_heads = 4 is not a multiple of tensor = 16",
        "num_kv_heads = 2 is not a multiple of tensor = 16",
        "intermediate_size = 24 is not a multiple of tensor = 16",
        "vocab_size = 33 is not a multiple of tensor = 16",
        "hidden_size = 16 is not a multiple of fsdp = 5",
        "attention = 'dense' needs whole sequences; sharded over devices (seq > 1) they take blockwise, "
        "splash_interpreted",
    ):
        assert problem in str(error.value)
    with pytest.raises(ValueError) as error:
        check_mesh(TINY, sizes(tensor=4), "cpu")
    assert str(error.value) == "this model does not fit the mesh: num_kv_heads = 2 is not a multiple of tensor = 4"
