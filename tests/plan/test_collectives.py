# ruff: noqa: E501
"""Programs as compilers write them, cut down to what is counted."""

import pytest

from jaxpo.plan.collectives import by_kind, collectives

# A loop of 32 rounds that gathers (written in three pieces, as asynchronous ones are) and scatters, then one sum.
TPU = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%started (p0: bf16[16,64]) -> bf16[256,64] {
  %p0 = bf16[16,64]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[256,64]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, replica_groups=mesh['x'=1,'y'=16] {'y'}, dimensions={0}, metadata={op_name="jit(step)/while/body/matmul"}
}

%ended (p1: bf16[16,64]) -> bf16[256,64] {
  %p1 = bf16[16,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[256,64]{1,0:T(8,128)(2,1)} all-gather(%p1), channel_id=7, replica_groups=mesh['x'=1,'y'=16] {'y'}, dimensions={0}
}

%body (p: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %p = (s32[], bf16[16,64]) parameter(0)
  %shard = bf16[16,64]{1,0} get-tuple-element(%p), index=1
  %kernel = bf16[16,64]{1,0} custom-call(%shard), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/while/body/kernel"}
  %async-collective-start = bf16[256,64]{1,0} fusion(%shard), kind=kCustom, calls=%started
  %async-collective-done = bf16[256,64]{1,0} fusion(%shard), kind=kCustom, calls=%ended
  %gradient = f32[256,64]{1,0} convert(%async-collective-done)
  %reduce-scatter.5 = f32[16,64]{1,0} reduce-scatter(%gradient), channel_id=9, replica_groups=[2,16]<=[32], dimensions={0}, to_apply=%add, metadata={op_name="jit(step)/shard_map/reduce_scatter"}
  ROOT %tuple = (s32[], bf16[16,64]) tuple(%shard)
}

%condition (q: (s32[], bf16[16,64])) -> pred[] {
  %q = (s32[], bf16[16,64]) parameter(0)
  %counter = s32[] get-tuple-element(%q), index=0
  %limit = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[] compare(%counter, %limit), direction=LT
}

ENTRY %main (x: (s32[], bf16[16,64]), g: f32[8]) -> f32[8] {
  %x = (s32[], bf16[16,64]) parameter(0)
  %g = f32[8] parameter(1)
  %while.1 = (s32[], bf16[16,64]) while(%x), condition=%condition, body=%body
  %permuted = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%g), channel_id=11, source_target_pairs={{0,1},{1,0}}
  %both = ((f32[64,8]{1,0}, f32[32]{0}), (f32[16,8]{1,0}, f32[8]{0})) reduce-scatter-start(%g, %g), channel_id=13, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %all-reduce.3 = f32[8]{0} all-reduce(%g), channel_id=12, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_loops_and_pieces_are_counted_as_they_run():
    totals = by_kind(collectives(TPU))
    assert totals['all-gather'] == (1, 32, 32 * 256 * 64 * 2 * 15 / 16)
    assert totals['reduce-scatter'] == (2, 33, 32 * 16 * 64 * 4 * 15 + (16 * 8 + 8) * 4 * 3)
    assert totals['all-reduce'] == (1, 1, 2 * 8 * 4 * 3 / 4)
    assert totals['collective-permute'] == (1, 1, 4 * 8 * 2)
    assert 'all-to-all' not in totals


def test_a_collective_says_where_it_comes_from():
    scatter, _ = [one for one in collectives(TPU) if one.kind == 'reduce-scatter']
    assert scatter.source == 'jit(step)/shard_map/reduce_scatter' and scatter.group == 16
    assert scatter.shapes == (('f32', (16, 64)),)


def test_a_count_that_the_compiler_noted_goes_before_the_comparison():
    noted = TPU.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert by_kind(collectives(noted))['all-gather'][1] == 5


@pytest.mark.parametrize(
    'text', ['', 'HloModule empty\n\nENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2] parameter(0)\n}\n']
)
def test_programs_of_one_device_send_nothing(text):
    assert collectives(text) == []
