"""The device mesh, and host arrays placed on it: rows over `data` and `fsdp`, tokens over `seq`.

On one device there is no mesh, and nothing is sharded.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from longrope_jax.model.ring import zigzag
from longrope_jax.model.sharding import AXES, make_mesh, partition_spec, tree_shardings
from longrope_jax.settings import Settings, one_of

ORDERS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class MeshSettings(Settings):
    """The device mesh. It may change between the runs of a work directory.

    Attributes:
        axes: sizes by axis, such as "data:2,seq:4"; other axes have size 1; one may have -1, which means all remaining
            devices. `data` splits batches, `fsdp` batches and parameters, `seq` the tokens of a sequence,
            `tensor` heads, MLP and vocabulary.
        sequence_order: which tokens a device of the `seq` axis holds: "zigzag" balances causal attention,
            "contiguous" gives each device neighbouring tokens.
    """

    axes: str = "data:1"
    sequence_order: Annotated[str, one_of(ORDERS)] = "zigzag"

    def __post_init__(self):
        super().__post_init__()
        parse_axes(self.axes)


def parse_axes(text: str, devices: int | None = None) -> dict[str, int]:
    """ "data:2,seq:4" -> the size of every axis; with the number of devices, -1 becomes the remaining ones.

    Raises:
        ValueError: names what is wrong.
    """
    shape = dict.fromkeys(AXES, 1)
    named = [part.strip() for part in text.split(",") if part.strip()]
    for part in named:
        match = re.fullmatch(r"(\w+)\s*:\s*(-1|[1-9]\d*)", part)
        if not match or match[1] not in AXES:
            raise ValueError(f"axes = {text!r}: {part!r} is not an axis and its size; axes are {', '.join(AXES)}")
        shape[match[1]] = int(match[2])
    if len({part.split(":")[0].strip() for part in named}) < len(named):
        raise ValueError(f"axes = {text!r} names an axis twice")
    rest = [axis for axis, size in shape.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"axes = {text!r}: only one axis can take the rest (-1)")
    if devices is None:
        return shape
    known = math.prod(size for size in shape.values() if size != -1)
    if rest:
        if devices % known:
            raise ValueError(f"axes = {text!r}: {devices} devices can't be split by {known}")
        shape[rest[0]] = devices // known
    elif known > devices:
        raise ValueError(f"axes = {text!r} needs {known} devices, there are {devices}")
    return shape


@dataclass(frozen=True)
class Layout:
    """How arrays are placed on devices. `Layout()` is one device.

    Attributes:
        mesh: with all axes of `model/sharding.py`; None on one device.
        sequence_order: of tokens over the `seq` axis, see `MeshSettings`.
    """

    mesh: jax.sharding.Mesh | None = None
    sequence_order: str = "zigzag"

    @classmethod
    def of(cls, settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> "Layout":
        """The layout on all of the given devices, or on those of all processes; raises ValueError if the mesh does not
        fit on them.
        """
        count = jax.device_count() if devices is None else len(devices)
        shape = parse_axes(settings.axes, count)
        size = math.prod(shape.values())
        if size < count and (devices is not None or jax.process_count() > 1):
            raise ValueError(f"axes = {settings.axes!r} leaves some of {count} devices without work; use -1")
        if size == 1 and devices is None:
            return cls()
        return cls(make_mesh(devices, **shape), settings.sequence_order)

    @property
    def shape(self) -> dict[str, int]:
        """Size by axis."""
        return dict.fromkeys(AXES, 1) if self.mesh is None else dict(self.mesh.shape)

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    @property
    def row_shards(self) -> int:
        """Number of parts that the rows of a batch are split into."""
        return self.shape["data"] * self.shape["fsdp"]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Sets the mesh inside this context."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            yield

    def check_length(self, length: int, name: str) -> None:
        """Raises ValueError if sequences of `length` tokens can't be spread over the `seq` axis."""
        parts = self.shape["seq"] * (2 if self.sequence_order == "zigzag" else 1)
        if self.shape["seq"] > 1 and length % parts:
            raise ValueError(
                f"{name} = {length} can't be split over seq:{self.shape['seq']} in {self.sequence_order} order; it "
                f"must be a multiple of {parts}"
            )

    def check_rows(self, rows: int, name: str) -> None:
        """Raises ValueError if `rows` sequences can't be spread over `data` and `fsdp`."""
        if rows % self.row_shards:
            raise ValueError(
                f"{name} = {rows} sequences can't be split over data:{self.shape['data']}, fsdp:{self.shape['fsdp']}; "
                f"it must be a multiple of {self.row_shards}"
            )

    @cached_property
    def share(self) -> tuple[int, int]:
        """(index, count): the part of every batch's rows that this process loads.

        Processes whose devices work on the same rows (a sequence sharded over them) load the same part.
        """
        if self.mesh is None or jax.process_count() == 1:
            return (0, 1)
        rows = self.mesh.devices.reshape(self.row_shards, -1)  # data and fsdp are the first two axes
        held: dict[int, set[int]] = {}
        for row, devices in enumerate(rows):
            for device in devices:
                held.setdefault(device.process_index, set()).add(row)
        parts = sorted({tuple(sorted(part)) for part in held.values()})
        if sum(map(len, parts)) != self.row_shards or len({len(part) for part in parts}) > 1:
            return (0, 1)  # parts that overlap: every process loads all
        if any(part != tuple(range(part[0], part[0] + len(part))) for part in parts):
            return (0, 1)
        return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)

    def place(self, tree: Any, shares: int = 1) -> Any:
        """Host arrays [rows, T] or [rows] -> device arrays. Each process passes the rows of its share of the batch,
        which is one of so many `shares`.

        Tokens, and their positions, are put into the sequence order of the layout.
        """

        def put(array):
            array = np.asarray(array)
            if array.ndim == 2:
                array = self.in_sequence_order(array)
            sharding = self._row_sharding(array.ndim)
            if sharding is None:
                return jax.numpy.asarray(array)
            return jax.make_array_from_process_local_data(sharding, array, (shares * len(array), *array.shape[1:]))

        return jax.tree.map(put, tree)

    def replicate(self, tree: Any) -> Any:
        """Arrays of any kind -> device arrays, replicated on every device; an explicit transfer for a transfer guard.

        All processes pass the same arrays.
        """
        if self.mesh is None:
            return jax.device_put(tree)
        everywhere = NamedSharding(self.mesh, jax.sharding.PartitionSpec())

        def put(array):
            array = np.asarray(array)
            array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
            return jax.make_array_from_callback(array.shape, everywhere, lambda where: array[where])

        return jax.tree.map(put, jax.device_get(tree))

    def in_sequence_order(self, array: Int[np.ndarray, "rows T"]) -> Int[np.ndarray, "rows T"]:
        """Tokens in the order of the devices of the `seq` axis."""
        order = self._order(array.shape[1])
        return array if order is None else array[:, order]

    def in_document_order(self, array: Float[np.ndarray, "rows T"]) -> Float[np.ndarray, "rows T"]:
        """The inverse of `in_sequence_order`."""
        order = self._order(array.shape[1])
        return array if order is None else array[:, np.argsort(order)]

    def _order(self, length: int) -> np.ndarray | None:
        shards = self.shape["seq"]
        return zigzag(length, shards) if shards > 1 and self.sequence_order == "zigzag" else None

    def abstract_rows(self, *shape: int, dtype: type = np.int32) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of what `place` returns for [rows, T] or [rows]."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._row_sharding(len(shape)))

    def _row_sharding(self, ndim: int) -> NamedSharding | None:
        """The sharding of [rows, T] or [rows]."""
        axes = ("batch", "length")[:ndim]
        return None if self.mesh is None else NamedSharding(self.mesh, partition_spec(*axes))

    def abstract_replicated(self, tree: Any) -> Any:
        """Shapes, dtypes and shardings of what `replicate` returns."""
        sharding = None if self.mesh is None else NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(lambda leaf: leaf.update(sharding=sharding), jax.eval_shape(lambda tree: tree, tree))

    def abstract(self, tree: Any) -> Any:
        """Shapes, dtypes and shardings of parameters or a train state, into which a checkpoint is restored."""
        if self.mesh is None:
            first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: first, tree)
        else:
            shardings = tree_shardings(self.mesh, tree)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
        )
