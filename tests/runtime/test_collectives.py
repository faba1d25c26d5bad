"""What is counted, against programs in which it is known by hand: of this machine's compiler, and in TPUs' notation."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from longrope_jax.model.ring import ring_attention
from longrope_jax.model.sharding import make_mesh
from longrope_jax.runtime.collectives import RING, Traffic, traffic

DEVICES = 8
ROWS, COLUMNS = 16, 32  # what every device has, float32
PIECE = 4 * ROWS * COLUMNS


def compiled(function, mesh, out=None):
    """The text of a program in which every device calls the function with a piece of an array."""
    rows = P(mesh.axis_names)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows if out is None else out, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((DEVICES * ROWS, COLUMNS), jnp.float32)).compile().as_text()


@pytest.fixture
def line():
    return jax.make_mesh((DEVICES,), ("all",), axis_types=(AxisType.Auto,))


@pytest.fixture
def plane():
    return jax.make_mesh((2, 4), ("slow", "fast"), axis_types=(AxisType.Auto,) * 2)


def hand_on(x, _=None):
    return jax.lax.ppermute(x, "all", [(i, (i + 1) % DEVICES) for i in range(DEVICES)]) * 2, None


def test_a_program_that_sends_nothing(line):
    assert traffic(compiled(lambda x: jnp.sin(x) @ x.T @ x, line)) == {}


def test_a_loop_sends_as_often_as_it_turns(line):
    text = compiled(lambda x: jax.lax.scan(hand_on, x, length=5)[0], line)
    assert traffic(text) == {"collective-permute": Traffic(5, 5 * PIECE)}


def test_loops_within_loops_are_multiplied(line):
    def three_times_four(x, _=None):
        return jax.lax.scan(hand_on, x, length=4)[0], None

    text = compiled(lambda x: hand_on(jax.lax.scan(three_times_four, x, length=3)[0])[0], line)
    assert traffic(text) == {"collective-permute": Traffic(13, 13 * PIECE)}


def test_a_loop_of_unknown_length_counts_once(line):
    text = compiled(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: hand_on(x)[0], x), line)
    assert traffic(text) == {"collective-permute": Traffic(1, PIECE)}


def test_gathers_and_sums_of_a_part_of_the_mesh_count_its_devices_only(plane):
    """Of n pieces n - 1 come from elsewhere; a sum is scattered and gathered."""
    gathered = compiled(lambda x: jax.lax.all_gather(x, "fast", tiled=True), plane, out=P("slow"))
    assert traffic(gathered) == {"all-gather": Traffic(1, 3 * PIECE)}
    for axis, size in (("slow", 2), ("fast", 4)):
        summed = compiled(lambda x, axis=axis: jax.lax.psum(x, axis), plane)
        assert traffic(summed) == {"all-reduce": Traffic(1, 2 * PIECE * (size - 1) // size)}
    scattered = compiled(lambda x: jax.lax.psum_scatter(x, "fast", tiled=True), plane)
    assert traffic(scattered) == {"reduce-scatter": Traffic(1, 3 * PIECE // 4)}
    exchanged = compiled(lambda x: jax.lax.all_to_all(x, "fast", 0, 0, tiled=True), plane)
    assert traffic(exchanged) == {"all-to-all": Traffic(1, 3 * PIECE // 4)}


def test_what_the_ring_sends_is_distinguished_from_other_permutes():
    """Forward: keys, values and positions, three times on four devices. Nothing else is sent."""
    length, kv_heads, dim = 256, 2, 8
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    key = shape((1, length, kv_heads, dim))
    with jax.set_mesh(make_mesh(seq=4)):
        run = jax.jit(partial(ring_attention, segment_ids=None, backend="blockwise"))
        text = run.lower(key, key, key, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile().as_text()
    found = traffic(text)
    a_shard = 4 * (2 * length // 4 * kv_heads * dim + length // 4)
    assert found == {RING: Traffic(9, 3 * a_shard)}


# --- text as TPU compilers print it -----------------------------------------------------------------------------------

HEADER = "HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=64\n"


def entry(*operations):
    return (
        f"{HEADER}\nENTRY %main.1_spmd (param: f32[8]) -> f32[8] {{\n"
        + "".join(f"  {op}\n" for op in operations)
        + "}\n"
    )


PERMUTE = (
    "%collective-permute-start.7 = (bf16[1,8,16384,128]{3,2,1,0:T(8,128)(2,1)}, bf16[1,8,16384,128]{3,2,1,0:T(8,128)"
    "(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%copy.79), channel_id=1, "
    'source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="jit(step)/SCOPE/ppermute" stack_frame_id=9}'
)
DONE = (
    "%collective-permute-done.7 = bf16[1,8,16384,128]{3,2,1,0:T(8,128)(2,1)} "
    "collective-permute-done(%collective-permute-start.7)"
)
SENT = 2 * 8 * 16384 * 128


def test_a_permute_counts_what_arrives_not_what_leaves_or_the_counters():
    assert traffic(entry(PERMUTE, DONE)) == {"collective-permute": Traffic(1, SENT)}
    assert traffic(entry(PERMUTE.replace("SCOPE", "attend/ring_send"), DONE)) == {RING: Traffic(1, SENT)}
    in_fast_memory = PERMUTE.replace("(2,1)}, bf16", "(2,1)S(1)}, bf16")
    assert traffic(entry(in_fast_memory, DONE)) == {"collective-permute": Traffic(1, SENT)}


def test_several_that_are_started_together_are_added():
    assert traffic(
        entry(
            "%collective-permute-start = ((bf16[4,2]{1,0:T(8,128)(2,1)}, s32[4]{0}), (bf16[4,2]{1,0:T(8,128)(2,1)}, "
            "s32[4]{0}), u32[]{:S(2)}) collective-permute-start(%a, %b), channel_id=3, source_target_pairs={{0,1}}",
            "%all-gather-start = ((f32[1,4]{1,0:T(8,128)}, f32[3]{0}), (f32[8,4]{1,0:T(8,128)}, f32[24]{0})) "
            "all-gather-start(%a, %b), replica_groups=[8,8]<=[64], dimensions={0}",
            "%all-reduce-start = (f32[6]{0}, /*index=1*/f32[10]{0}) all-reduce-start(%a, %b), "
            "replica_groups=[8,8]<=[64], to_apply=%add",
        )
    ) == {
        "collective-permute": Traffic(1, 4 * 2 * 2 + 4 * 4),
        "all-gather": Traffic(1, (8 * 4 + 24) * 4 * 7 // 8),
        "all-reduce": Traffic(1, 2 * 16 * 4 * 7 // 8),
    }


GROUPS = {
    "replica_groups=mesh['axis_0'=1,'axis_1'=64] {'axis_1'}": 64,
    "replica_groups=mesh['axis_0'=4,'axis_1'=4,'axis_2'=4] {'axis_0','axis_2'}": 16,
    "replica_groups=mesh['axis_0'=4,'axis_1'=16] {'axis_1':(2)4}": 4,
    "replica_groups=mesh['axis_0'=4,'axis_1'=16] {'axis_0','axis_1':(8)2}": 8,
    "replica_groups=[8,8]<=[64]": 8,
    "replica_groups=[16,4]<=[8,4,2]T(0,2,1)": 4,
    "replica_groups={{0,1,2,3},{4,5,6,7}}": 4,
    "replica_groups={}": 64,  # all there are
}


@pytest.mark.parametrize(("groups", "size"), GROUPS.items(), ids=GROUPS)
def test_sizes_of_groups_in_every_notation(groups, size):
    gather = (
        "%all-gather.4 = bf16[32000,2048]{1,0:T(8,128)(2,1)} all-gather(%copy), channel_id=5, GROUPS, dimensions={1}"
    )
    whole = 2 * 32000 * 2048
    assert traffic(entry(gather.replace("GROUPS", groups))) == {"all-gather": Traffic(1, whole * (size - 1) // size)}


def loop(bound, step, kind="s32"):
    """Of a permute; the condition has the bound, the body what is added to the counter."""
    counter = f"{kind}[]{{:T(128)}}"
    return f"""{HEADER}
%wide.body.1 (wide.param.1: ({kind}[], bf16[8])) -> ({kind}[], bf16[8]) {{
  %constant.9 = {counter} constant(15)
  %constant.2 = {counter} constant({step})
  %wide.param.1 = ({counter}, bf16[8]{{0:T(1024)}}) parameter(0)
  %get-tuple-element.1 = {counter} get-tuple-element(%wide.param.1), index=0
  %get-tuple-element.2 = bf16[8]{{0:T(1024)}} get-tuple-element(%wide.param.1), index=1
  {PERMUTE}
  {DONE}
  %copy.3 = {counter} copy(%get-tuple-element.1)
  %add.4 = {counter} add(%copy.3, %constant.2), metadata={{op_name="while/body/add"}}
  %copy.5 = {counter} copy(%add.4)
  ROOT %tuple.6 = ({counter}, bf16[8]{{0:T(1024)}}) tuple(%copy.5, %collective-permute-done.7)
}}

%wide.condition.1 (wide.param.2: ({kind}[], bf16[8])) -> pred[] {{
  %constant.1 = {counter} constant({bound}), metadata={{op_name="jit(step)/while"}}
  %wide.param.2 = ({counter}, bf16[8]{{0:T(1024)}}) parameter(0)
  %get-tuple-element.3 = {counter} get-tuple-element(%wide.param.2), index=0
  ROOT %lt.1 = pred[]{{:T(512)}} compare(%get-tuple-element.3, %constant.1), direction=LT
}}

ENTRY %main.1_spmd (param: f32[8]) -> f32[8] {{
  %while.1 = ({counter}, /*index=1*/bf16[8]{{0:T(1024)}}) while(%t), condition=%wide.condition.1, body=%wide.body.1
}}
"""


@pytest.mark.parametrize(
    ("bound", "step", "kind", "turns"),
    [(32, 1, "s32", 32), (8, 1, "u32", 8), (8, 2, "u32", 4), (7, 2, "u32", 4)],
    ids=["layers", "pieces of a product", "two pieces a turn", "an odd number of pieces"],
)
def test_turns_of_loops_that_tell_only_their_condition(bound, step, kind, turns):
    """Products of matrices that are cut count by twos, in unsigned numbers."""
    assert traffic(loop(bound, step, kind)) == {"collective-permute": Traffic(turns, turns * SENT)}


def test_a_bound_that_is_no_constant_counts_once():
    assert traffic(loop(32, 1).replace("constant(32)", "get-tuple-element(%wide.param.2), index=1")) == {
        "collective-permute": Traffic(1, SENT)
    }


def test_a_gather_that_goes_on_beside_other_work_counts_once():
    """It is in the fusion that starts it, in those that are computed meanwhile, and in the one that waits for it."""
    gather = (
        "%all-gather.NUMBER = bf16[1,2048,5504]{2,1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=179, "
        "replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={1}"
    )

    def fusion(name, number, target):
        call = f'  ROOT %call.{number} = bf16[8]{{0}} custom-call(%all-gather.{number}), custom_call_target="{target}"'
        return f"%{name} (param_0: bf16[8]) -> bf16[8] {{\n  {gather.replace('NUMBER', number)}\n{call}\n}}\n\n"

    text = HEADER + fusion("fused_computation.1", "1", "AsyncCollectiveStart")
    text += fusion("async_collective_fusion.2", "2", "Sharding") + fusion(
        "fused_computation.3", "3", "AsyncCollectiveDone"
    )
    calls = [
        f"%fusion.{name} = bf16[8]{{0}} fusion(%x), kind=kCustom, calls=%{name}"
        for name in ("fused_computation.1", "async_collective_fusion.2", "fused_computation.3")
    ]
    text += entry(*calls).removeprefix(HEADER)
    assert traffic(text) == {"all-gather": Traffic(1, 2 * 2048 * 5504 * 15 // 16)}


def test_a_sum_of_which_one_piece_is_kept_is_scattered():
    text = HEADER + (
        "%all-reduce-scatter.1 (param_0: f32[64,8]) -> f32[4,8] {\n"
        "  %all-reduce.1 = f32[64,8]{1,0:T(8,128)} all-reduce(%param_0), replica_groups=[4,16]<=[64], to_apply=%add\n"
        "  ROOT %dynamic-slice.1 = f32[4,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %x), sizes={4,8}\n}\n"
    )
    text += entry("%f = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1").removeprefix(HEADER)
    assert traffic(text) == {"reduce-scatter": Traffic(1, 4 * 64 * 8 * 15 // 16)}


def test_both_branches_count_and_what_is_never_called_does_not():
    branches = "".join(
        f"%branch.{n} (p: f32[8]) -> f32[8] {{\n  %all-reduce.{n} = f32[8]{{0}} all-reduce(%p), "
        "replica_groups=[8,8]<=[64], to_apply=%add\n}\n\n"
        for n in range(3)
    )
    text = HEADER + branches + entry(
        "%c = f32[8]{0} conditional(%x, %a, %b), branch_computations={%branch.0, %branch.1}"
    ).removeprefix(HEADER)  # fmt: skip
    assert traffic(text) == {"all-reduce": Traffic(2, 2 * 2 * 32 * 7 // 8)}
