"""Reading of compiled HLO text: loops, collectives, HBM traffic."""

from __future__ import annotations

import pytest

from lawcat_jax import hlo

LOOP = """
HloModule m

%fused (p.0: bf16[8,128], p.1: s32[]) -> bf16[1,128] {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[1,128]{1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,128}
}

%body (arg: (s32[], bf16[1,128], bf16[8,128])) -> (s32[], bf16[1,128], bf16[8,128]) {
  %arg = (s32[]{:T(128)}, bf16[1,128]{1,0}, /*index=2*/bf16[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %w = bf16[8,128]{1,0} get-tuple-element(%arg), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %row = bf16[1,128]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %all = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} all-reduce(%row), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum
  %sent = (bf16[1,128]{1,0}, bf16[1,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%all), channel_id=1, source_target_pairs={{0,1}}
  %got = bf16[1,128]{1,0} collective-permute-done(%sent)
  ROOT %out = (s32[]{:T(128)}, bf16[1,128]{1,0}, bf16[8,128]{1,0}) tuple(%next, %got, %w)
}

%cond (arg.1: (s32[], bf16[1,128], bf16[8,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[1,128]{1,0}, bf16[8,128]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(9)
  %j = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %s = bf16[] add(%a, %b)
}

ENTRY %main (x: bf16[1,128], w.1: bf16[8,128]) -> bf16[1,128] {
  %x = bf16[1,128]{1,0} parameter(0)
  %w.1 = bf16[8,128]{1,0} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %start = (s32[]{:T(128)}, bf16[1,128]{1,0}, bf16[8,128]{1,0}) tuple(%one, %x, %w.1)
  %loop = (s32[]{:T(128)}, bf16[1,128]{1,0}, bf16[8,128]{1,0}) while(%start), condition=%cond, body=%body
  ROOT %y = bf16[1,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_loops_count_as_often_as_they_run():
    module = hlo.Module(LOOP)
    loop = module.computations["main"]["loop"]
    assert module.trip_count("main", loop) == 4  # 1, 3, 5, 7
    assert {name: times for name, times, _ in module.executed()} == {"main": 1, "body": 4, "fused": 4}


def test_collectives():
    row = 2 * 128
    found = {entry.kind: entry for entry in hlo.Module(LOOP).collectives()}
    assert (found["all-reduce"].count, found["all-reduce"].group, found["all-reduce"].bytes) == (4, 2, 4 * row)
    assert (found["collective-permute"].count, found["collective-permute"].bytes) == (4, 4 * row)


def test_traffic_counts_slices_and_leaves_out_vmem():
    row = 2 * 128
    # A turn: the loop's counter (add reads it and a constant, writes it), the fusion reads a row of the weights and the
    # counter and writes the row, the all-reduce reads it and writes to VMEM.
    turn = 3 * 4 + (row + 4 + row) + row
    assert hlo.Module(LOOP).hbm_bytes() == 4 * turn


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,4,8,12},{1,5,9,13}}", 4),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("source_target_pairs={{0,1}}", 2),
        ("", 1),
    ],
)
def test_group_sizes(text, size):
    assert hlo.group_size(text) == size


def test_array_bytes():
    assert hlo.array_bytes("(f32[2,3]{1,0}, bf16[4]{0:T(8)S(1)}, pred[5]{0}, s4[8]{0}, u32[])") == 24 + 8 + 5 + 4 + 4
    assert hlo.array_bytes("bf16[4]{0:T(8)S(1)}", hbm_only=True) == 0


def test_not_hlo():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Module("hello")
