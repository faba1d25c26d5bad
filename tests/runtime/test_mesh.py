"""Meshes by name, and host arrays on them and back."""

import re

import jax
import numpy as np
import pytest

from longrope_jax.runtime.mesh import Layout, MeshSettings, parse_axes


def shape(**sizes):
    return {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1} | sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:1", shape()),
        ("", shape()),
        ("data:2,seq:4", shape(data=2, seq=4)),
        (" seq : 2 , tensor:2,", shape(seq=2, tensor=2)),
        ("data:-1", shape(data=8)),
        ("seq:4,fsdp:-1", shape(fsdp=2, seq=4)),
        ("data:8,tensor:-1", shape(data=8)),
        ("data:3", shape(data=3)),
    ],
)
def test_axes_by_name(text, expected):
    assert parse_axes(text, 8) == expected


def test_the_rest_stays_open_without_a_number_of_devices():
    assert parse_axes("data:-1,seq:4") == shape(data=-1, seq=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows:2", "axes = 'rows:2': 'rows:2' is not an axis and its size; axes are data, fsdp, seq, tensor"),
        ("data", "axes = 'data': 'data' is not an axis and its size"),
        ("data:0", "axes = 'data:0': 'data:0' is not an axis and its size"),
        ("data:-2", "axes = 'data:-2': 'data:-2' is not an axis and its size"),
        ("data:2.0", "axes = 'data:2.0': 'data:2.0' is not an axis and its size"),
        ("data:2 seq:4", "axes = 'data:2 seq:4': 'data:2 seq:4' is not an axis and its size"),
        ("data:2,data :4", "axes = 'data:2,data :4' names an axis twice"),
        ("data:-1,seq:-1", "axes = 'data:-1,seq:-1': only one axis can take the rest (-1)"),
        ("data:-1,seq:3", "axes = 'data:-1,seq:3': 8 devices can't be split by 3"),
        ("data:-1,seq:16", "axes = 'data:-1,seq:16': 8 devices can't be split by 16"),
        ("data:4,seq:4", "axes = 'data:4,seq:4' needs 16 devices, there are 8"),
    ],
)
def test_axes_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Layout.of(MeshSettings(text))


def test_settings_refuse_an_unknown_order():
    with pytest.raises(ValueError, match="sequence_order = 'random' must be one of zigzag, contiguous"):
        MeshSettings(sequence_order="random")


def test_one_device_has_no_mesh():
    layout = Layout.of(MeshSettings("data:1"))
    assert layout == Layout() and layout.mesh is None
    assert layout.row_shards == 1 and layout.share == (0, 1)
    with layout.active():
        assert jax.sharding.get_abstract_mesh().empty
    rows = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(layout.place(rows), rows)
    np.testing.assert_array_equal(layout.in_document_order(rows), rows)
    layout.check_length(7, "length")
    layout.check_rows(3, "batch")


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_placed_arrays_come_back_in_document_order(order):
    layout = Layout.of(MeshSettings("data:2,seq:4", order))
    tokens, context = np.arange(4 * 16, dtype=np.int32).reshape(4, 16), np.arange(4, dtype=np.int32)
    placed_tokens, placed_context, nothing = layout.place((tokens, context, None))
    assert nothing is None
    np.testing.assert_array_equal(layout.in_document_order(np.asarray(placed_tokens)), tokens)
    np.testing.assert_array_equal(placed_context, context)
    held = {shard.device.id: np.asarray(shard.data) for shard in placed_tokens.addressable_shards}
    assert len(held) == 8 and all(part.shape == (2, 4) for part in held.values())
    # The first of the four devices along a sequence; with zigzag it has the last tokens too, so all have equal work.
    first = [0, 1, 14, 15] if order == "zigzag" else [0, 1, 2, 3]
    np.testing.assert_array_equal(held[layout.mesh.devices[0, 0, 0, 0].id], tokens[:2, first])
    np.testing.assert_array_equal(held[layout.mesh.devices[1, 0, 0, 0].id], tokens[2:, first])


def test_lengths_and_rows_that_can_not_be_split_are_refused_by_name():
    layout = Layout.of(MeshSettings("data:2,seq:4"))
    layout.check_length(16, "length")
    layout.check_rows(4, "batch")
    message = "target_length = 12 can't be split over seq:4 in zigzag order; it must be a multiple of 8"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        layout.check_length(12, "target_length")
    Layout.of(MeshSettings("seq:4", "contiguous")).check_length(12, "length")
    with pytest.raises(ValueError, match="length = 10 .* in contiguous order; it must be a multiple of 4"):
        Layout.of(MeshSettings("seq:4", "contiguous")).check_length(10, "length")
    message = "batch = 6 sequences can't be split over data:2, fsdp:2; it must be a multiple of 4"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Layout.of(MeshSettings("data:2,fsdp:2")).check_rows(6, "batch")


def test_parameters_are_described_with_where_they_belong():
    tree = {"lm_head": np.zeros((16, 32), np.float32), "step": np.zeros((), np.int32)}
    for axes, devices, part in [("data:1", 1, (16, 32)), ("fsdp:2,tensor:4", 8, (8, 8)), ("data:8", 8, (16, 32))]:
        described = Layout.of(MeshSettings(axes)).abstract(tree)
        head = described["lm_head"]
        assert (head.shape, head.dtype, len(head.sharding.device_set)) == ((16, 32), np.float32, devices)
        assert head.sharding.shard_shape(head.shape) == part
        assert described["step"].sharding.shard_shape(()) == ()


@pytest.mark.parametrize("axes", ["data:1", "data:2,seq:2"])
def test_replicated_arrays_are_whole_everywhere_and_pass_into_a_step(axes):
    layout = Layout.of(MeshSettings(axes))
    tree = {"half": np.arange(3.0), "count": np.int64(2), "there": jax.numpy.ones(2)}
    made = layout.replicate(tree)
    for name, leaf in tree.items():
        assert made[name].sharding.is_fully_replicated and made[name].is_fully_addressable
        assert len(made[name].devices()) == (4 if layout.mesh else 1)
        np.testing.assert_array_equal(made[name], leaf)
    assert made["half"].dtype == np.float32 and made["count"].dtype == np.int32
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree))
    with layout.active(), jax.transfer_guard("disallow"):
        doubled = double(made)
    np.testing.assert_array_equal(doubled["half"], 2 * tree["half"])
