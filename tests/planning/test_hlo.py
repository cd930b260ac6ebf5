"""Collectives counted in the text that the TPU compiler prints."""

import pytest

from dpr_jax.planning import hlo

# What the TPU compiler prints: no trip count, a counter that grows by 2, the pieces of one
# asynchronous collective under one channel, one of them inside of the loop.
_TPU = """
HloModule jit_update

%cond.1 (p.1: (u32[], bf16[4,8])) -> pred[] {
  %limit.1 = u32[]{:T(128)} constant(8), metadata={op_name="a"}
  %p.1 = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.1, %limit.1), direction=LT, metadata={op_name="a"}
}

%piece.1 (q: bf16[2,8]) -> bf16[16,8] {
  ROOT %ag.2 = bf16[16,8]{1,0} all-gather(%q), channel_id=9, replica_groups=[1,8]<=[8]
}

%body.1 (p.2: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %two.1 = u32[]{:T(128)} constant(2)
  %p.2 = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=0
  %x.2 = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=1
  %i.3 = u32[]{:T(128)} add(%i.2, %two.1)
  %start.1 = (bf16[4,8]{1,0}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x.2), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %done.1 = bf16[4,8]{1,0} collective-permute-done(%start.1)
  %f.1 = bf16[16,8]{1,0} fusion(%done.1), kind=kCustom, calls=%piece.1
  ROOT %t.1 = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%i.3, %done.1)
}

%all-reduce-scatter.7 (u: f32[16,8]) -> f32[2,8] {
  %u = f32[16,8]{1,0} parameter(0)
  %ar.2 = f32[16,8]{1,0} all-reduce(%u), channel_id=5, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %mine.1 = f32[2,8]{1,0} dynamic-slice(%ar.2, %at), dynamic_slice_sizes={2,8}
}

%whole.1 (r: bf16[2,8]) -> bf16[16,8] {
  ROOT %ag.1 = bf16[16,8]{1,0} all-gather(%r), channel_id=9, replica_groups=[1,8]<=[8]
}

ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %t.2 = (u32[], bf16[4,8]{1,0}) tuple(%zero, %x)
  %w.1 = (u32[]{:T(128)}, bf16[4,8]{1,0}) while(%t.2), condition=%cond.1, body=%body.1
  %ar.1 = (f32[4]{0}, f32[8]{0}) all-reduce(%a, %b), channel_id=4, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
  %rs.1 = f32[2,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.7
  ROOT %f.2 = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%whole.1
}
"""


# A decoder whose slots are refilled: two loops that end when their rows do, one in the other.
_REFILLED = """
HloModule jit_rollout_step

%goes_on.1 (p.1: (pred[], bf16[4])) -> pred[] {
  %p.1 = (pred[], bf16[4]{0}) parameter(0)
  ROOT %alive.1 = pred[] get-tuple-element(%p.1), index=0
}

%step.1 (p.2: (pred[], bf16[4])) -> (pred[], bf16[4]) {
  %p.2 = (pred[], bf16[4]{0}) parameter(0)
  %x.2 = bf16[4]{0} get-tuple-element(%p.2), index=1
  %ar.2 = bf16[4]{0} all-reduce(%x.2), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %t.2 = (pred[], bf16[4]{0}) tuple(%a.2, %ar.2)
}

%waiting.1 (p.3: (pred[], bf16[4])) -> pred[] {
  %p.3 = (pred[], bf16[4]{0}) parameter(0)
  ROOT %alive.3 = pred[] get-tuple-element(%p.3), index=0
}

%decode.1 (p.5: (pred[], bf16[4])) -> (pred[], bf16[4]) {
  %p.5 = (pred[], bf16[4]{0}) parameter(0)
  ROOT %w.5 = (pred[], bf16[4]{0}) while(%p.5), condition=%goes_on.1, body=%step.1
}

%refill.1 (p.4: (pred[], bf16[4])) -> (pred[], bf16[4]) {
  %p.4 = (pred[], bf16[4]{0}) parameter(0)
  %x.4 = bf16[4]{0} get-tuple-element(%p.4), index=1
  %ag.4 = bf16[16]{0} all-gather(%x.4), channel_id=2, replica_groups=[1,4]<=[4]
  ROOT %d.4 = (pred[], bf16[4]{0}) call(%t.4), to_apply=%decode.1
}

ENTRY %main (x: bf16[4]) -> (pred[], bf16[4]) {
  %x = bf16[4]{0} parameter(0)
  %t.9 = (pred[], bf16[4]{0}) tuple(%yes, %x)
  ROOT %w.9 = (pred[], bf16[4]{0}) while(%t.9), condition=%waiting.1, body=%refill.1
}
"""


@pytest.mark.parametrize("steps", [1, 7, 93])
def test_of_two_loops_without_an_end_the_inner_one_takes_all_steps(steps):
  found = hlo.collectives(_REFILLED, steps)
  assert found.unknown_loops == 2
  assert found.count == {"all-reduce": steps, "all-gather": 1}
  alone = hlo.collectives(_REFILLED.replace("body=%refill.1", "body=%decode.1"), steps)
  assert alone.count == {"all-reduce": steps}


def test_the_text_of_the_tpu_compiler():
  found = hlo.collectives(_TPU)
  assert found.unknown_loops == 0
  assert found.count == {"collective-permute": 4, "all-gather": 1, "all-reduce": 1,
                         "reduce-scatter": 1}
  assert found.bytes == pytest.approx({
      "collective-permute": 4 * 4 * 8 * 2,
      "all-gather": 16 * 8 * 2 * 7 / 8,
      "all-reduce": 2 * (4 + 8) * 4 * 3 / 4,
      "reduce-scatter": 16 * 8 * 4 * 7 / 8,
  })
