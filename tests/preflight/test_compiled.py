"""Reading the text of compiled programs: estimated cycles, collectives and the bytes that they send."""

import pytest

from cnx2_jax.preflight import compiled as programs

PROGRAM = """\
HloModule jit_f
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %add.9 = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1000000"}
}
%body.1 (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/body/mul"}, backend_config={"estimated_cycles":"7"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %f.1)
}
%condition.1 (s: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(27)
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}
%inner (q: f32[8]) -> f32[8] {
  ROOT %g = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"11"}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %while.5 = (s32[], f32[8]{0}) while(%tuple), condition=%condition.1, body=%body.1
  %call.1 = f32[8]{0} call(%a), to_apply=%inner
  ROOT %dot.1 = f32[8]{0} fusion(%a), calls=%fused, metadata={op_name="jit(f)/mul"}, backend_config={"estimated_cycles":"3"}
}
"""  # noqa: E501 - as the compiler writes it


def test_cycles_count_loops_by_their_trips_and_fusions_once():
    assert programs.cycles_by_kind(PROGRAM) == {"mul": 27 * 7 + 3, "unnamed": 11}


def test_a_loop_that_ends_as_its_data_decides_counts_once():
    condition = """\
  %t.1 = (s32[], pred[2]{0}) parameter(0)
  %p.1 = pred[2]{0} get-tuple-element(%t.1), index=1
  ROOT %any = pred[] fusion(%p.1), kind=kLoop, calls=%fused
"""
    begin = PROGRAM.index("  %c = s32[]")
    end = PROGRAM.index("}", PROGRAM.index("ROOT %lt"))
    program = PROGRAM[:begin] + condition + PROGRAM[end:]
    assert programs.cycles_by_kind(program) == {"unnamed": 11, "mul": 7 + 3}


def test_a_loop_without_a_plain_trip_count_is_an_error():
    with pytest.raises(ValueError, match="trips"):
        programs.cycles_by_kind(PROGRAM.replace("constant(27)", "parameter(0)"))


KNOWN = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from cnx2_jax.preflight import compiled as programs

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def compiled(f, out=P()):
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((8 * 16, 32), "float32")).compile().as_text()

lax = jax.lax
both = ("data", "fsdp")
ring = [(i, (i + 1) % 4) for i in range(4)]

def loop(x):
    return lax.fori_loop(0, 5, lambda i, y: y + jnp.sin(lax.psum(y * x, "data")), x)

found = {
    "gather": compiled(lambda x: lax.all_gather(x, "fsdp", tiled=True)),
    "gather int8": compiled(lambda x: lax.all_gather(x.astype(jnp.int8), both, tiled=True)),
    "reduce": compiled(lambda x: lax.psum(x, both)),
    "scatter": compiled(lambda x: lax.psum_scatter(x, "fsdp", tiled=True), P(both)),
    "exchange": compiled(lambda x: lax.all_to_all(x, "fsdp", 1, 0, tiled=True), P(both)),
    "permute": compiled(lambda x: lax.ppermute(x, "fsdp", ring), P(both)),
    "loop": compiled(loop, P(both)),
    "nothing": compiled(lambda x: 2 * x, P(both)),
}
print(json.dumps({name: programs.collectives(text) for name, text in found.items()}))
"""


def test_collectives_of_programs_whose_answer_is_known(on_eight_devices):
    found = on_eight_devices(KNOWN)
    part = 16 * 32 * 4  # bytes of what each device holds
    assert found == {
        "gather": {"all-gather": {"count": 1, "bytes": 3 * part}},
        "gather int8": {"all-gather": {"count": 1, "bytes": 7 * part // 4}},
        "reduce": {"all-reduce": {"count": 1, "bytes": 2 * part * 7 // 8}},
        "scatter": {"reduce-scatter": {"count": 1, "bytes": part * 3 // 4}},
        "exchange": {"all-to-all": {"count": 1, "bytes": part * 3 // 4}},
        "permute": {"collective-permute": {"count": 1, "bytes": part}},
        "loop": {"all-reduce": {"count": 5, "bytes": 5 * part}},
        "nothing": {},
    }


ASYNCHRONOUS = """\
HloModule jit_f
%wrapped (p: f32[8]) -> f32[1] {
  %p = f32[8]{0} parameter(0)
  ROOT %rs = f32[1]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}
%start_fusion (p.1: f32[20,640]) -> f32[160,640] {
  ROOT %ag.1 = f32[160,640]{0,1:T(8,128)} all-gather(%p.1), replica_groups={{0,1,2,3,4,5,6,7}}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}
%async_collective_fusion.1 (p.2: f32[20,640]) -> f32[160,640] {
  ROOT %ag.2 = f32[160,640]{0,1:T(8,128)S(1)} all-gather(%p.2), replica_groups={{0,1,2,3,4,5,6,7}}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}
%all-reduce-scatter.4 (p.3: f32[64]) -> f32[8] {
  %ar = f32[64]{0} all-reduce(%p.3), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, to_apply=%add
  ROOT %ds = f32[8]{0} dynamic-slice(%ar, %i), dynamic_slice_sizes={8}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %s = ((f32[8]), f32[1], u32[]) async-start(%a), calls=%wrapped
  %d = f32[1]{0} async-done(%s), calls=%wrapped
  %f.1 = f32[160,640]{0,1} fusion(%a), kind=kCustom, calls=%start_fusion
  %f.2 = f32[160,640]{0,1} fusion(%f.1), kind=kCustom, calls=%async_collective_fusion.1
  %f.3 = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.4
  %g = ((f32[4]{0}, bf16[2]{0}), /*index=1*/(f32[32]{0}, bf16[16]{0})) all-gather-start(%x, %y), replica_groups=[1,8]<=[8]
  %gd = (f32[32]{0}, bf16[16]{0}) all-gather-done(%g)
  %r = ((f32[32]{0}), (f32[4]{0})) reduce-scatter-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}
  %c = (f32[6,7,7]{2,1,0}, f32[6,7,7]{2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%z), source_target_pairs={{0,1}}
  %cd = f32[6,7,7]{2,1,0} collective-permute-done(%c)
  %half = f32[64]{0} all-reduce(%a), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, to_apply=%add
  %one = f32[64]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}
"""  # noqa: E501 - as the compilers write it


def test_what_is_in_flight_counts_once():
    assert programs.collectives(ASYNCHRONOUS) == {
        "all-gather": {"count": 2, "bytes": (160 * 640 * 4 + 32 * 4 + 16 * 2) * 7 // 8},
        "reduce-scatter": {"count": 3, "bytes": (8 * 4 + 64 * 4 + 32 * 4) * 7 // 8},
        "collective-permute": {"count": 1, "bytes": 6 * 7 * 7 * 4},
        "all-reduce": {"count": 1, "bytes": 2 * 64 * 4 * 3 // 4},
    }


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="groups"):
        programs.collectives(ASYNCHRONOUS.replace("[1,8]<=[8]", "unheard_of"))


def test_what_goes_between_slices():
    """The TPU compiler writes an all-reduce over two slices in three steps; the second leaves the slice."""
    program = """\
HloModule jit_f
ENTRY %main (a: f32[256,128]) -> f32[256,128] {
  %reduce-scatter.1 = f32[128,128]{1,0:T(8,128)} reduce-scatter(%a), channel_id=3, replica_groups={{0,2},{1,3}}, dimensions={0}, to_apply=%add
  %send = (f32[16,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%bitcast, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM"}
  %recv = (f32[16,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %all-gather.14 = f32[256,128]{1,0:T(8,128)S(1)} all-gather(%bitcast.1), channel_id=3, replica_groups={{0,2},{1,3}}, dimensions={0}
}
"""  # noqa: E501 - as the compiler writes it
    half = 128 * 128 * 4
    assert programs.collectives(program) == {
        "all-gather": {"count": 1, "bytes": half},
        "reduce-scatter": {"count": 1, "bytes": half},
        "between slices": {"count": 1, "bytes": half},
    }
