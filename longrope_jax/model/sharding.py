"""Which axis of the device mesh every dimension of the model's arrays is cut along.

Code names dimensions by what they mean ("length", "heads"); one table says which mesh axes these go to:

* `data`: sequences of a batch; every device has all parameters.
* `fsdp`: sequences as well, and parameters: they are gathered where they are used.
* `seq`: the tokens of a sequence; keys and values travel between the devices (`model/ring.py`). Parameters too: who
  cuts sequences has no memory to give away, and gathering costs little beside that many tokens.
* `tensor`: heads, the width of the MLP, and the vocabulary.

Everything here does nothing on a single device: without `jax.set_mesh(mesh)` arrays stay as they are.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from longrope_jax.model.attention import check_platform, partial_backend
from longrope_jax.model.config import LlamaConfig

AXES = ("data", "fsdp", "seq", "tensor")

_MESH_AXES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "batch": ("data", "fsdp"),
    "length": ("seq",),
    "vocab": ("tensor",),
    "embed": ("fsdp", "seq"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "norm": (),
}

# By how the path of a leaf ends, so that an optimizer's moments are cut like the parameters that they belong to.
_PARAMETERS = {
    "embed/embedding": ("vocab", "embed"),
    "lm_head": ("embed", "vocab"),
    "attention/query/kernel": ("layers", "embed", "heads"),
    "attention/key/kernel": ("layers", "embed", "kv_heads"),
    "attention/value/kernel": ("layers", "embed", "kv_heads"),
    "attention/output/kernel": ("layers", "heads", "embed"),
    "mlp/gate/kernel": ("layers", "embed", "mlp"),
    "mlp/up/kernel": ("layers", "embed", "mlp"),
    "mlp/down/kernel": ("layers", "mlp", "embed"),
    "attention_norm/scale": ("layers", "norm"),
    "mlp_norm/scale": ("layers", "norm"),
    "final_norm/scale": ("norm",),
}

_DIVIDED = {
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "intermediate_size": "mlp",
    "vocab_size": "vocab",
    "hidden_size": "embed",
}


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """The mesh of all four axes, those not named of size 1: `make_mesh(data=2, seq=4)`.

    Uses the first of the devices, by default all there are, if there are more than the sizes' product.

    Raises:
        ValueError: an axis is unknown, or on a TPU the product of no dimensions of the slice, as 8 of 4x4x4.
    """
    unknown = sizes.keys() - set(AXES)
    if unknown:
        raise ValueError(f"no mesh axis {', '.join(sorted(unknown))}; known are {', '.join(AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    except NotImplementedError as error:  # a torus, of which every axis takes whole dimensions
        wanted = ", ".join(f"{axis}:{size}" for axis, size in sizes.items() if size > 1)
        raise ValueError(f"{wanted} can't be laid out on these devices: {' '.join(str(error).split())}") from None


def partition_spec(*logical_axes: str | None) -> PartitionSpec:
    """One name for every dimension of an array, None for one that is not cut -> where the dimensions go.

    Raises:
        ValueError: a name is unknown, or two dimensions would be cut along the same mesh axis.
    """
    taken: dict[str, str | None] = {}
    for name in logical_axes:
        if name not in _MESH_AXES:
            raise ValueError(f"no logical axis {name!r}; known are {', '.join(filter(None, _MESH_AXES))}")
        for axis in _MESH_AXES[name]:
            if axis in taken:
                raise ValueError(f"{taken[axis]!r} and {name!r} of {logical_axes} both want the mesh axis {axis!r}")
            taken[axis] = name
    return PartitionSpec(*(_MESH_AXES[name] or None for name in logical_axes))


def batch_axis(x: Shaped[Array, "#B ..."]) -> str | None:
    """The logical name of a leading axis that may be 1, one for all sequences of the batch."""
    return "batch" if x.shape[0] > 1 else None


def length_axis(x: Shaped[Array, "B T ..."]) -> str | None:
    """The logical name of the axis of tokens; None where the mesh can't cut it evenly, as for the one of a step of
    decoding.
    """
    return None if x.shape[1] % shards("length") else "length"


def constrain(x: Shaped[Array, "..."], *logical_axes: str | None) -> Shaped[Array, "..."]:
    """x, cut as its axes' names say over the mesh that is set; x itself where none is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(*logical_axes))


def mesh_axes(*logical_axes: str) -> set[str]:
    """All mesh axes that dimensions of these names are cut along."""
    return {axis for name in logical_axes for axis in _MESH_AXES[name]}


def shards(logical_axis: str) -> int:
    """Into how many pieces the mesh that is set cuts a dimension; 1 where none is."""
    return _pieces(logical_axis, jax.sharding.get_abstract_mesh().shape)


def tree_shardings(mesh: Mesh | AbstractMesh, tree: PyTree) -> PyTree[NamedSharding]:
    """Parameters, or anything that holds arrays under the same names (a train state) -> the sharding of every leaf.

    Leaves that are none of the model's parameters, such as counters, are on all devices.
    """

    def sharding(path, _):
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for ending, axes in _PARAMETERS.items() if name.endswith("/" + ending)), ())
        return NamedSharding(mesh, partition_spec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def check_mesh(config: LlamaConfig, mesh_shape: dict[str, int], platform: str) -> None:
    """Can a model be cut over a mesh with these sizes of all four axes, of devices of this platform?

    Raises:
        ValueError: lists all that is wrong.
    """
    problems = []
    for field, logical_axis in _DIVIDED.items():
        if getattr(config, field) % _pieces(logical_axis, mesh_shape):
            sizes = " * ".join(f"{axis} = {mesh_shape[axis]}" for axis in _MESH_AXES[logical_axis])
            problems.append(f"{field} = {getattr(config, field)} is not a multiple of {sizes}")
    try:
        (partial_backend if mesh_shape["seq"] > 1 else check_platform)(config.attention, platform)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("this model does not fit the mesh: " + "; ".join(problems))


def _pieces(logical_axis: str, mesh_shape: dict[str, int]) -> int:
    return math.prod(mesh_shape.get(axis, 1) for axis in _MESH_AXES[logical_axis])
