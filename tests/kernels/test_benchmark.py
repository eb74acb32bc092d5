"""The benchmark: what is compared with what, which implementation serves, and that a peer that fails stops nothing."""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas.benchmark import __main__ as benchmark
from kernels_pallas.benchmark import jax_peers, peers, report, suite
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
    args = {"seconds": 600.0, "compile_seconds": 600.0, "budget": 0.01, "bandwidth": None, "out": tmp_path}
    bench = benchmark.Bench(argparse.Namespace(**args, peers=list(table)[:4]))
    jobs = list(suite.jobs([], ["forward"], True)) + [Job(TINY, "forward", 1, 32)]
    rows = [(TINY, "forward", 1, 32)]
    programs = benchmark.compile_jobs(bench, jobs + benchmark.peer_jobs(bench, rows))
    benchmark.measure_job(bench, jobs[0], programs[jobs[0]])
    benchmark.measure_peers(bench, rows, programs)
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


def test_what_cannot_be_measured_here_is_said(tmp_path):
    """A CPU has neither PyTorch with CUDA nor Mosaic GPU kernels of another library that could run: each is named."""
    args = {"seconds": 600.0, "bandwidth": None, "out": tmp_path}
    bench = benchmark.Bench(argparse.Namespace(**args, peers=["FlashAttention-3", "cuDNN attention"]))
    benchmark.find_missing(bench)
    assert set(bench.not_here) == {"FlashAttention-3", "cuDNN attention"}
    assert all("PyTorch" in reason for reason in bench.not_here.values())
