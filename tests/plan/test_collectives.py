"""Collectives of compiled programs against counts by hand; XLA's ways to name who takes part."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.build import build
from jaxlm.config import check
from jaxlm.plan import hlo
from jaxlm.plan.collectives import by_kind_and_axes, collectives

SHAPE = {"data": 2, "tensor": 4}
TRIPS, N = 5, 64
x_N = jnp.ones(N)  # float32


def compiled(function, out=None):
    """The collectives of a function of one shard of N numbers, [kind, axes] -> bytes."""
    mesh = jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("tensor")
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=out or spec, check_vma=False
    )
    x = jax.device_put(x_N, NamedSharding(mesh, spec))
    program = hlo.parse(jax.jit(sharded).lower(x).compile().as_text())
    assert not program.unknown_loops
    return by_kind_and_axes(collectives(program, SHAPE))


def test_a_sum_in_a_scan_counts_as_often_as_it_runs():
    def step(x, _):
        return jax.lax.psum(x, "tensor") / 4, None

    found = compiled(lambda x: jax.lax.scan(step, x, length=TRIPS)[0])
    # Of the 16 numbers of a shard, each device sends 2·(4 - 1)/4.
    assert found == {("all-reduce", ("tensor",)): TRIPS * 16 * 4 * 2 * 3 / 4}


def test_each_kind_along_its_axis():
    half = 16 * 4
    gathered = compiled(lambda x: jax.lax.all_gather(x, "data"), out=PartitionSpec(None, "tensor"))
    assert gathered == {("all-gather", ("data",)): half}
    shifted = [(i, (i + 1) % 4) for i in range(4)]
    assert compiled(lambda x: jax.lax.ppermute(x, "tensor", shifted)) == {
        ("collective-permute", ("tensor",)): half
    }
    both = ("data", "tensor")
    assert compiled(lambda x: jax.lax.psum(x, both)) == {("all-reduce", both): half * 2 * 7 / 8}
    swap = lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True)
    assert compiled(swap) == {("all-to-all", ("tensor",)): half * 3 / 4}
    scattered = lambda x: jax.lax.psum_scatter(x, "data", tiled=True)
    out = PartitionSpec(("tensor", "data"))
    assert compiled(scattered, out=out) == {("reduce-scatter", ("data",)): half / 2}


TPU_TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%started (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=3, GROUPS, dimensions={0}
  ROOT %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%g.1)
}

%ended (p: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %g.2 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=3, GROUPS, dimensions={0}
  ROOT %done = bf16[16,8]{1,0} custom-call(%g.2)
}

%all-reduce-scatter.1 (p: bf16[4,8]) -> bf16[1,8] {
  %p.2 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%p.2), channel_id=3, GROUPS, to_apply=%add
  ROOT %mine = bf16[1,8]{1,0} slice(%r), slice={[0:1], [0:8]}
}

%condition (w: (u32[], bf16[4,8])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8), metadata={op_name="jit(step)/while"}
  %w = (u32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%w), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (v: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %two = u32[]{:T(128)} constant(2)
  %v = (u32[]{:T(128)}, /*index=1*/bf16[4,8]{1,0}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%v), index=0
  %next = u32[]{:T(128)} add(%j, %two)
  %y = bf16[4,8]{1,0} get-tuple-element(%v), index=1
  %k = bf16[4,8]{1,0} custom-call(%y), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 128}"
}}, metadata={op_name="jit(step)/kernel"}
  %f.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%y), kind=kCustom, calls=%started
  %f.2 = bf16[16,8]{1,0} fusion(%y), kind=kCustom, calls=%ended
  ROOT %out = (u32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%next, %y)
}

ENTRY %main_spmd (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %state = (u32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%zero, %x)
  %part = bf16[1,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %loop = (u32[]{:T(128)}, bf16[4,8]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %last = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=1] {'b','c'}", ("tensor",)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("tensor",)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}", ("tensor",)),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            ("data", "tensor"),
        ),
        ("replica_groups=[2,4]<=[8]", ("tensor",)),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("tensor",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "tensor")),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data", "tensor")),
    ],
)
def test_a_tpu_program(groups, axes):
    """Its loops say no trip count, here 0, 2, 4, 6; one gather is spread over two fusions.

    A kernel's metadata are on lines of their own, and a sum that is scattered is a fusion.
    """
    program = hlo.parse(TPU_TEXT.replace("GROUPS", groups))
    assert not program.unknown_loops
    assert program.runs["body"] == 4
    found = by_kind_and_axes(collectives(program, SHAPE))
    assert found == {
        ("all-gather", axes): 4 * 3 * 4 * 8 * 2,
        ("reduce-scatter", axes): 3 / 4 * 4 * 8 * 2,
    }


def test_a_gather_that_lasts_through_a_loop_runs_once():
    """A TPU begins it before and ends it behind, and goes on with it beside the loop's products."""
    end = "  %f.2 = bf16[16,8]{1,0} fusion(%y), kind=kCustom, calls=%ended\n"
    entry = "  %loop = "
    behind = end.replace("%y", "%x")
    text = TPU_TEXT.replace(end, "").replace(entry, behind + entry)
    program = hlo.parse(text.replace("GROUPS", "replica_groups=[2,4]<=[8]"))
    assert (program.runs["started"], program.runs["ended"]) == (4, 1)
    found = by_kind_and_axes(collectives(program, SHAPE))
    assert found["all-gather", ("tensor",)] == 3 * 4 * 8 * 2


def test_a_loop_of_unknown_length_is_named():
    text = TPU_TEXT.replace("constant(8)", "parameter(1)").replace("GROUPS", "replica_groups={}")
    program = hlo.parse(text)
    assert program.unknown_loops == ("loop",)
    assert program.runs["body"] == 1


@pytest.mark.parametrize(("kind", "size"), [("bf16", 2), ("f8e4m3fn", 1), ("s4", 0.5), ("pred", 1)])
def test_sizes_of_numbers(kind, size):
    assert hlo.dtype_bytes(kind) == size


@pytest.mark.slow
def test_gradients_are_summed_where_they_are_kept():
    """No device sums a whole kernel's gradient, and weights are gathered once for each pass."""
    c = tiny.get_config()
    c.model.update(width=64, layers=2, ffn_width=256, scan_layers="on", remat="full", tied=False)
    c.model.update(vocabulary=256, dtype="bfloat16")
    built = build(check(c), 256, jax.devices())
    program = hlo.parse(built.trace().lower().compile().as_text())
    found = by_kind_and_axes(collectives(program, dict(built.mesh.shape), stand_in=True))
    kernels, ends = 2 * (4 * 64 * 64 + 3 * 64 * 256), 2 * 64 * 256
    sent = 7 / 8 * 2  # bytes of bfloat16, to all but oneself
    scattered = found["reduce-scatter", ("fsdp",)]
    assert sent * kernels <= scattered <= 2 * sent * (kernels + ends)  # the ends in float32
    gathered = found["all-gather", ("fsdp",)]
    assert 2 * sent * kernels <= gathered <= 2 * sent * (kernels + 2 * ends)
    assert found["all-reduce", ("fsdp",)] < 0.05 * sent * kernels  # scalars and norms
