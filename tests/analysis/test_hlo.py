"""Reading of compiled HLO text: loops, collectives, HBM traffic."""

from __future__ import annotations

import pytest

from lawcat_jax.analysis import hlo

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


@pytest.mark.parametrize(
    ("text", "first", "local"),
    [
        ("replica_groups={{0,4,8,12},{1,5,9,13}}", [0, 4, 8, 12], 2),
        ("replica_groups=[2,8]<=[8,2]T(1,0), dimensions={0}", [0, 2, 4, 6, 8, 10, 12, 14], 4),
        ("replica_groups=[8,2]<=[16], use_global_device_ids=true", [0, 1], 2),
        ("replica_groups=mesh['data'=1,'fsdp'=8,'tensor'=2] {'fsdp'}, x={1}", [0, 2, 4, 6, 8, 10, 12, 14], 4),
        ("replica_groups=mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a'}", [0, 1], 2),
        ("", [], 1),
    ],
)
def test_members_of_groups_on_machines_of_eight(text, first, local):
    assert hlo.first_group(text) == first
    assert hlo.local_size(text, 8) == local


def test_permutations_between_machines():
    assert hlo.local_size("source_target_pairs={{0,1},{1,0}}", 8) == 2
    assert hlo.local_size("source_target_pairs={{6,7},{7,8}}", 8) == 1


def test_array_bytes():
    assert hlo.array_bytes("(f32[2,3]{1,0}, bf16[4]{0:T(8)S(1)}, pred[5]{0}, s4[8]{0}, u32[])") == 24 + 8 + 5 + 4 + 4
    assert hlo.array_bytes("bf16[4]{0:T(8)S(1)}", hbm_only=True) == 0


def test_not_hlo():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Module("hello")


# As XLA writes it for GPUs: slices taken asynchronously, scratch memory among the results, collectives of several arrays,
# rows put in place.
GPU = """
HloModule g

%fused_slice (p.0: bf16[16,128], p.1: s32[]) -> bf16[1,128] {
  %p.0 = bf16[16,128]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %slice = bf16[1,128]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,128}
}

%fused_scatter (q.0: f32[64,128], q.1: s32[4,1], q.2: f32[4,128]) -> f32[64,128] {
  %q.0 = f32[64,128]{1,0} parameter(0)
  %q.1 = s32[4,1]{1,0} parameter(1)
  %q.2 = f32[4,128]{1,0} parameter(2)
  ROOT %scatter = f32[64,128]{1,0} scatter(%q.0, %q.1, %q.2), to_apply=%sum
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main (w: bf16[16,128], i: s32[], r: f32[8]) -> f32[8] {
  %w = bf16[16,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %r = f32[8]{0} parameter(2)
  %fusion-start = ((bf16[16,128]{1,0}, s32[]), bf16[1,128]{1,0}, u32[]) fusion-start(%w, %i), calls=%fused_slice
  %row = bf16[1,128]{1,0} fusion-done(%fusion-start)
  %gemm = (bf16[1,128]{1,0}, s8[4194304]{0}) custom-call(%row, %row), custom_call_target="__cublas$lt$matmul"
  %gather = ((bf16[1,128]{1,0}, f32[8]{0}), (bf16[16,128]{1,0}, f32[128]{0})) all-gather-start(%row, %r), replica_groups=[1,16]<=[16]
  %reduce = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%r), replica_groups={{0,1}}, to_apply=%sum
  %old = (f32[8]{0}, f32[8]{0}) all-reduce-start(%r, %r), replica_groups={{0,8}}, to_apply=%sum
  %part = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%r), replica_groups={{0,1}}, to_apply=%sum
  %zeros = f32[64,128]{1,0} constant({...})
  %places = s32[4,1]{1,0} constant({...})
  %new = f32[4,128]{1,0} constant({...})
  ROOT %put = f32[64,128]{1,0} fusion(%zeros, %places, %new), kind=kInput, calls=%fused_scatter
}
"""


def test_collectives_of_gpus():
    found = {(entry.kind, entry.group, entry.local): entry.bytes for entry in hlo.Module(GPU).collectives(8)}
    assert found == {
        ("all-gather", 16, 8): (16 * 128 * 2 + 128 * 4) * 15 / 16,
        ("all-reduce", 2, 2): 32,
        ("all-reduce", 2, 1): 64,
        ("reduce-scatter", 2, 2): 16,
    }


def test_traffic_of_gpus():
    module = hlo.Module(GPU)
    main = module.computations["main"]
    row = 128 * 2
    assert module._traffic("main", main["fusion-start"]) == row + 4 + row
    assert module._traffic("main", main["gemm"]) == 3 * row
    assert module._traffic("main", main["put"]) == 4 * 4 + 2 * 4 * 128 * 4


@pytest.mark.parametrize(
    ("target", "mask", "window", "expected"),
    [
        ("Softmax", "NO_MASK", 0, 4 * 100),
        ("Softmax", "CAUSAL", 0, 4 * 55),
        ("Softmax", "CAUSAL", 2, 4 * 19),
        ("SoftmaxBackward", "CAUSAL", 0, 10 * 55),
    ],
)
def test_operations_of_cudnn(target, mask, window, expected):
    call = f"""HloModule c

ENTRY %main (q: bf16[2,10,3,8]) -> bf16[2,3,10,8] {{
  %q = bf16[2,10,3,8]{{3,2,1,0}} parameter(0)
  ROOT %o = (bf16[2,3,10,8]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmha{target}", \
backend_config={{"cudnn_fmha_backend_config": {{"intermediate_tensor_shape": {{"element_type": "BF16", \
"dimensions": ["2", "3", "10", "10"]}}, "mask_type": "{mask}", "sliding_window_length": {window}}}}}
}}
"""
    assert hlo.Module(call).attention_flops() == expected * 2 * 3 * 8
