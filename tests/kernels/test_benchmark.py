"""The benchmark: what is compared with what, which implementation serves, and that a peer that fails stops nothing."""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas.benchmark import __main__ as benchmark
from kernels_pallas.benchmark import jax_peers, peers, profile, report, suite
from kernels_pallas.benchmark.suite import MODELS, Job, Model
from kernels_pallas.common import lowering_for

TINY = Model("tiny", 2, 1, 16)


def record(label: str, kind: str, milliseconds: float, **entry):
    where = {"model": "m", "operation": "prefill", "batch": 8, "length": 4096, "floor_ms": 0.1}
    return where | {"label": label, "kind": kind, "ms": {"median": milliseconds}} | entry


def test_best_of_each_kind():
    records = [
        record("pallas", "ours", 2.0, served="scan"),
        record("xla scan", "ours", 1.0),  # not the default, so not what is compared
        record("A", "softmax", 5.0),
        record("B", "softmax", 3.0),
        record("C", "softmax", 1.0, length=1024),  # another shape
        record("D", "linear", 0.0) | {"ms": None},
    ]
    del records[-1]["ms"]  # a measurement that failed
    last = report.best(records).splitlines()[-1]
    assert last == "m | prefill | 8x4096 | scan | 2.000 | - | - | 3.000 B | 1.50"
    assert "m prefill 8 4096 scan 0.100 2.000 | 1.000 | 5.000 | 3.000" in report.table(records)


@pytest.mark.parametrize("model", ["smollm2", "d256"])
@pytest.mark.parametrize("operation", ["forward", "prefill", "decode"])
def test_served_is_what_the_program_holds(model, operation):
    """The name says a kernel exactly where the program lowered for GPUs has one."""
    job = Job(MODELS[model], operation, 1, 1 if operation == "decode" else 128)
    with lowering_for("cuda"):
        served = job.served()
        function, shapes = suite.program(job)
        # In a Jaxpr, as a machine without a GPU cannot lower every kernel; Mosaic GPU's are maps there.
        text = str(jax.make_jaxpr(function)(*shapes))
    assert ("pallas" in served) == any(kernel in text for kernel in ("pallas_call", "mpmd_map"))


def test_jax_peers_compute_this_projects_attention(monkeypatch):
    """Scale, gates and denominator: in float32, by the library's plain JAX code, which runs on a CPU."""
    pytest.importorskip("jla", reason="pip install --no-deps jax-linear-attention")
    monkeypatch.setattr(jax_peers, "IMPLEMENTATION", "chunked")
    job = Job(Model("m", 2, 2, 64), "forward", 2, 96)
    arrays = [x.astype(jnp.float32) for x in suite.arguments(job, suite.program(job)[1])[1:]]
    for peer, normalize in ((jax_peers.gla, False), (jax_peers.normalised_gla, True)):
        want = kp.gated_linear_attention(*arrays, normalize=normalize, implementation="reference")[0]
        np.testing.assert_allclose(peer(*arrays), want, rtol=2e-3, atol=2e-3 * float(jnp.std(want)))
    wide = [x[..., :64] for x in arrays]
    wide[2] = jnp.concatenate([arrays[2], -arrays[2]], axis=-1)  # 128 values: the denominator is a second call's
    want = kp.gated_linear_attention(*wide, implementation="reference")[0]
    np.testing.assert_allclose(jax_peers.normalised_gla(*wide), want, rtol=2e-3, atol=2e-3 * float(jnp.std(want)))


def test_a_peer_that_fails_stops_nothing(monkeypatch, tmp_path, capsys):
    def refuses(*arrays):
        raise ValueError("no such head size")

    def absent(*shape):
        raise ImportError("no such package")

    def attention(q, k, v, log_g):
        return kp.gated_linear_attention(q, k, v, log_g, implementation="scan")[0]

    table = {
        "absent": peers.Peer("softmax", ("forward",), absent),
        "faulty": peers.Peer("softmax", ("forward",), refuses),
        "refuses": peers.Peer("linear", ("forward",)),
        "works": peers.Peer("linear", ("forward",)),
        "not asked for": peers.Peer("linear", ("forward",)),
    }
    monkeypatch.setattr(peers, "PEERS", table)
    monkeypatch.setattr(jax_peers, "PEERS", {"refuses": refuses, "works": attention})
    monkeypatch.setattr(jax_peers, "missing", lambda: None)
    monkeypatch.setattr(benchmark, "_torch_missing", lambda: None)
    args = {"seconds": 600.0, "compile_seconds": 600.0, "budget": 0.01, "bandwidth": None, "out": tmp_path}
    bench = benchmark.Bench(argparse.Namespace(**args, peers=list(table)[:4]))
    jobs = [Job(TINY, "forward", 1, 32)]
    rows = [(TINY, "forward", 1, 32)]
    jobs += benchmark.peer_jobs(bench, rows)
    programs = benchmark.compile_jobs(bench, jobs)
    for job in jobs:
        benchmark.measure_job(bench, job, programs[job])
    benchmark.measure_torch_peers(bench, rows)
    found = {r["label"]: r for r in bench.records}
    assert set(found) == {"pallas", "faulty", "refuses", "works"}
    assert found["pallas"]["served"] == "scan"
    assert found["pallas"]["ms"]["median"] > 0
    assert found["works"]["ms"]["median"] > 0
    assert found["works"]["kind"] == "linear"
    for label in ("faulty", "refuses"):
        assert found[label]["error"] == "not here: ValueError: no such head size"
    assert bench.not_here == {"absent": "no such package"}
    assert "absent: not here: no such package" in capsys.readouterr().out


def test_what_cannot_be_measured_here_is_said(monkeypatch, tmp_path):
    """A CPU has no PyTorch with CUDA, and another library may be missing: each peer is named with the reason."""
    monkeypatch.setattr(jax_peers, "missing", lambda: "no such package")
    args = {"seconds": 600.0, "bandwidth": None, "out": tmp_path, "peers": ["FlashAttention-3", "jax-linear-attention"]}
    bench = benchmark.Bench(argparse.Namespace(**args))
    rows = [(TINY, "forward+backward", 1, 32)]
    assert benchmark.peer_jobs(bench, rows) == []
    benchmark.measure_torch_peers(bench, rows)
    assert bench.records == []
    assert bench.not_here["jax-linear-attention"] == "no such package"
    assert "PyTorch" in bench.not_here["FlashAttention-3"]


def test_bytes_of_a_kernel_are_those_of_its_operands_and_results():
    hlo = """
    ENTRY %main (a: bf16[4,8], b: f32[8]) -> f32[4] {
      %a = bf16[4,8]{1,0} parameter(0)
      %b = f32[8]{0} parameter(1)
      %call.1 = (bf16[4,8]{1,0}, /*index=1*/f32[4]{0}) custom-call(%a, %b, %a), custom_call_target="x", metadata={op_name="jit(f)/gla"}
      %o = f32[4]{0} get-tuple-element(%call.1), index=1
      ROOT %loop_fusion.2 = pred[4]{0} fusion(f32[4]{0} %o), kind=kLoop, calls=%g
    }"""
    found = profile.instructions(hlo)
    assert set(found) == {"call.1", "loop_fusion.2"}
    assert found["call.1"] == profile.Instruction(64 + 32 + 64 + 16, "jit(f)/gla")
    assert found["loop_fusion.2"].bytes == 16 + 4


def test_bytes_of_a_compiled_program():
    """XLA's own text: one product of two matrices, whatever else it makes of it."""
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda a, b: a @ b).lower(x, x).compile()
    assert max(found.bytes for found in profile.instructions(compiled.as_text()).values()) == 3 * 256 * 256 * 4


def trace(tmp_path, text: str):
    from jax.profiler import ProfileData

    path = tmp_path / "a.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    return path


def test_kernels_of_a_trace(tmp_path):
    event = "events {{ metadata_id: {} duration_ps: {} {} }}"
    call = 'stats { metadata_id: 1 str_value: "call.1" }'
    stream = [event.format(1, 3_000_000_000, call), event.format(1, 1_000_000_000, call), event.format(2, 10**9, "")]
    path = trace(
        tmp_path,
        f"""planes {{ name: "/host:CPU" lines {{ name: "Stream" {stream[0]} }} }}
        planes {{
          name: "/device:GPU:0"
          lines {{ name: "Stream #13(Compute)" {" ".join(stream)} }}
          lines {{ name: "XLA Ops" {stream[0]} }}
          event_metadata {{ key: 1 value {{ id: 1 name: "mosaic_kernel" }} }}
          event_metadata {{ key: 2 value {{ id: 2 name: "loop_fusion_2" }} }}
          stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
        }}""",
    )
    program = {"call.1": profile.Instruction(4e9, "gla"), "loop_fusion.2": profile.Instruction(5e8, "")}
    first, second = profile.kernels(path, 2, program)
    assert first == profile.Kernel("mosaic_kernel", "call.1", 1.0, 2.0, 4e9, "gla")
    assert second == profile.Kernel("loop_fusion_2", "loop_fusion.2", 0.5, 0.5, 2.5e8, "")
    lines = profile.table([first, second], 3.0).splitlines()
    assert lines[0] == "kernels 2.5000 ms of a call of 3.0000 ms"
    assert lines[2] == "2.0000 | 80.0% | 1 | 4000.0 | 2.00 | mosaic_kernel | call.1 | gla"


def test_a_profiler_without_a_gpu_is_one_line(tmp_path, capsys):
    """A CPU's own trace: what comes out is the reason, and the mark of a failure."""
    args = argparse.Namespace(seconds=600.0, compile_seconds=600.0, budget=0.01, bandwidth=None, out=tmp_path, peers=[])
    assert benchmark.profile_jobs(benchmark.Bench(args), [Job(TINY, "forward", 1, 32)]) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "LookupError: the profiler gave no kernels of a GPU, only" in last
