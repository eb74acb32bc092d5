"""Measure the kernels on the GPU at hand, check them, or analyse the TPU kernels without a TPU.

    python -m kernels_pallas.benchmark [--quick] [--variants] [--models ...] [--only forward,prefill] [--seconds N] --out DIR
    python -m kernels_pallas.benchmark --profile --only forward+backward [--shapes ...] --out DIR     time by kernel
    python -m kernels_pallas.benchmark --check [--max_length N] --out DIR     errors against a float64 recurrence
    python -m kernels_pallas.benchmark --static ...                           compiles for TPUs (see --static --help)

Results go to DIR/benchmark.json after every measurement; at the end tables are printed and plots are written.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import os
import re
import shlex
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from kernels_pallas.benchmark import jax_peers, peers, profile, report, suite, timing
from kernels_pallas.benchmark.suite import MODELS, ROWS_OPERATIONS, Job, Model

Row = tuple[Model, str, int, int]
"""Model, operation, batch, tokens."""

OPERATIONS = ("forward", "forward+backward", "prefill", "decode")
BANDWIDTH = {"NVIDIA H200": 4.3e12, "NVIDIA H100 80GB HBM3": 3.0e12}
"""Bytes a second that a large copy reaches (counting reads and writes), measured; other devices: --bandwidth."""


def check(args: argparse.Namespace) -> int:
    from kernels_pallas.benchmark import checks

    implementation = args.implementation  # None: the best of the device for each case
    results: list[dict[str, Any]] = []

    def show(result: dict[str, Any]) -> None:
        results.append(result)
        timing.write_json(args.out / "checks.json", results)
        c = result["case"]
        what = (
            f"T={c['length']} H={c['heads']}/{c['value_heads']} {c['features']}x{c['values']} {c['dtype']} {c['gates']}"
        )
        if "error" in result:
            print("ERROR", what, result["error"].strip().splitlines()[-1][:300], flush=True)
        else:
            errors = " ".join(f"{n}={e:.1e}" for n, e in result["errors"].items())
            print("FAIL " + ",".join(result["failed"]) if result["failed"] else "ok", what, errors, flush=True)

    chosen = [case for case in checks.cases() if case.length <= args.max_length]
    failures = checks.run(implementation, show, chosen=chosen)
    print(f"{implementation or 'best of the device'}: {len(results)} cases, {failures} failures")
    return 1 if failures else 0


class Bench:
    """Records, the time budget, and the file they go to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.monotonic()
        self.records: list[dict[str, Any]] = []
        self.not_here: dict[str, str] = {}  # peer -> reason
        self.held: tuple[Any, Any] = (None, None)  # row, and its arguments on the device
        self.device = jax.devices()[0].device_kind
        self.bandwidth = args.bandwidth * 1e12 if args.bandwidth else BANDWIDTH.get(self.device)

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.start)

    def add(self, row: tuple[str, str, int, int], label: str, floor: float, **entry: Any) -> None:
        model, operation, batch, length = row
        record = {"model": model, "operation": operation, "batch": batch, "length": length, "label": label}
        floor_ms = floor / self.bandwidth * 1e3 if self.bandwidth else 0.0
        record |= {"floor_bytes": floor, "floor_ms": floor_ms, "device": self.device, **entry}
        self.records.append(record)
        result = f"{entry['ms']['median']:.4f} ms" if "ms" in entry else entry.get("skipped") or entry.get("error", "")
        if "ms" in entry and entry["kind"] == "ours" and entry["ms"]["median"] < floor_ms * 0.9:
            record["suspect"] = "faster than its bytes allow"
            result += "  SUSPECT: below the memory-bandwidth floor"
        print(
            f"{time.monotonic() - self.start:6.1f}s {model} {operation} {batch}x{length} {label}: {result[:300]}",
            flush=True,
        )
        self.flush()

    def leave_out(self, label: str, reason: str) -> None:
        self.not_here[label] = reason
        print(f"{label}: not here: {reason[:300]}", flush=True)
        self.flush()

    def flush(self) -> None:
        versions = {}
        for name in ("jax", "jaxlib", "torch", "triton", "flash-linear-attention", "jax-linear-attention"):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
        command = shlex.join(["python", "-m", "kernels_pallas.benchmark", *sys.argv[1:]])
        value = {"device": self.device, "versions": versions, "command": command, "date": time.strftime("%Y-%m-%d")}
        timing.write_json(
            self.args.out / "benchmark.json", value | {"not_here": self.not_here, "records": self.records}
        )


def compile_jobs(bench: Bench, jobs: list[Job]) -> dict[Job, Future[Any]]:
    """Compile everything in parallel, so that what is measured afterwards has the processor free for dispatch."""
    pool = concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 4))
    programs = {job: pool.submit(suite.compile_job, job) for job in jobs}
    done, waiting = concurrent.futures.wait(programs.values(), timeout=min(bench.args.compile_seconds, bench.left()))
    # What is being compiled cannot be stopped, and would slow the dispatch of what is measured.
    concurrent.futures.wait([future for future in waiting if not future.cancel()])
    print(f"{time.monotonic() - bench.start:6.1f}s compiled {len(done)} of {len(jobs)}", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    return programs


def measure_job(bench: Bench, job: Job, program: Future[Any]) -> None:
    note: dict[str, Any] = {"floor": suite.floor_bytes(job), "variant": bool(job.sizes)}
    note |= {"kind": "linear" if job.is_peer else "ours"}
    if program.cancelled() or bench.left() < 2:
        bench.add(job.row, job.label, skipped="skipped: no time left", **note)
        return
    try:
        note["served"] = job.served()
        compiled, shapes, memory = program.result()
        if bench.held[0] != job.row:
            bench.held = (None, None)
            bench.held = (job.row, suite.arguments(job, shapes))
        ms = timing.measure(compiled, bench.held[1], budget=bench.args.budget)
        if job.operation == "decode":
            ms |= {name: ms[name] / suite.DECODE_STEPS for name in ("median", "least", "most")}
        bench.add(job.row, job.label, ms=ms, memory=memory, **note)
    except Exception as problem:
        bench.held = (None, None)
        bench.add(job.row, job.label, error=_reason(problem, job.is_peer), **note)


def _reason(problem: Exception, peer: bool) -> str:
    return f"{'not here: ' if peer else ''}{type(problem).__name__}: {problem}"[:800]


def peer_jobs(bench: Bench, rows: list[Row]) -> list[Job]:
    """The peers written in JAX, compiled and timed as this project's jobs; says which are not here."""
    labels = [label for label in bench.args.peers if peers.PEERS[label].build is None]
    reason = jax_peers.missing() if labels else None
    if reason is not None:
        for label in labels:
            bench.leave_out(label, reason)
        return []
    return [suite.Job(*row, label) for label in labels for row in rows if row[1] in peers.PEERS[label].operations]


def measure_torch_peers(bench: Bench, rows: list[Row]) -> None:
    """After everything in JAX, as PyTorch brings CUDA libraries of its own into the process."""
    from kernels_pallas.benchmark.torch_tuning import parallel_tuning

    chosen = {label: peer.build for label, peer in peers.PEERS.items() if label in bench.args.peers and peer.build}
    reason = _torch_missing() if chosen else None
    if reason is not None:
        for label in chosen:
            bench.leave_out(label, reason)
        return
    bench.held = (None, None)
    # The comparisons that matter most first: a time budget may end before those with fla, which tunes for minutes.
    pairs = [(label, row) for label in chosen for row in rows if row[1] in peers.PEERS[label].operations]
    with parallel_tuning():
        for label, (model, operation, batch, length) in pairs:
            if label in bench.not_here:
                continue
            job = suite.Job(model, operation, batch, length, label)
            note: dict[str, Any] = {"floor": suite.floor_bytes(job), "kind": peers.PEERS[label].kind}
            if bench.left() < 3:
                bench.add(job.row, label, skipped="skipped: no time left", **note)
                continue
            try:
                function = chosen[label](model, batch, length, operation == "forward+backward")
                bench.add(job.row, label, ms=timing.measure_torch(function, budget=bench.args.budget), **note)
                del function
            except ImportError as problem:
                bench.leave_out(label, str(problem))
            except Exception as problem:
                bench.add(job.row, label, error=_reason(problem, True), **note)
            with contextlib.suppress(Exception):  # after a fault on the device it raises the fault again
                import torch

                torch.cuda.empty_cache()


def _torch_missing() -> str | None:
    try:
        import torch

        return None if torch.cuda.is_available() else "PyTorch has no CUDA device"
    except Exception as problem:
        return f"PyTorch: {type(problem).__name__}: {problem}"


def profile_jobs(bench: Bench, jobs: list[Job]) -> int:
    """Prints and writes to DIR/profile.json where the time of each job goes; 1 if the profiler tells nothing of one."""
    programs = compile_jobs(bench, jobs)
    results: list[dict[str, Any]] = []
    failures = 0
    for job in jobs:
        what = f"{job.model.name} {job.operation} {job.batch}x{job.length} {job.label}"
        if programs[job].cancelled() or bench.left() < 2:
            print(f"\n{what}: skipped: no time left", flush=True)
            continue
        result: dict[str, Any] = {"model": job.model.name, "operation": job.operation, "label": job.label}
        result |= {"batch": job.batch, "length": job.length, "device": bench.device}
        try:
            compiled, shapes, _ = programs[job].result()
            inputs = suite.arguments(job, shapes)
            ms = timing.measure(compiled, inputs, budget=bench.args.budget)
            rows = profile.profile(compiled, inputs)
            result |= {"ms": ms, "kernels": [row._asdict() for row in rows]}
            print(f"\n{what}\n{profile.table(rows, ms['median'])}", flush=True)
        except Exception as problem:
            failures += 1
            result["error"] = _reason(problem, job.is_peer)
            print(f"\n{what}: {result['error']}", flush=True)
        results.append(result)
        timing.write_json(bench.args.out / "profile.json", results)
    return 1 if failures else 0


def main() -> int:
    if "--static" in sys.argv[1:]:
        from kernels_pallas.benchmark import static_tpu

        return static_tpu.main([a for a in sys.argv[1:] if a != "--static"])
    parser = argparse.ArgumentParser(prog="kernels_pallas.benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="four shapes instead of eight")
    parser.add_argument("--variants", action="store_true", help="also other block sizes, on the first shape")
    parser.add_argument(
        "--only", default=",".join(OPERATIONS), help=f"operations, of {','.join((*OPERATIONS, *ROWS_OPERATIONS))}"
    )
    parser.add_argument("--shapes", help="batch x tokens instead of the usual ones, such as 8x4096,1x32768")
    parser.add_argument("--models", default="llama-3.2-1b,mistral-7b", help=f"of {','.join(MODELS)}")
    parser.add_argument("--peers", default=",".join(peers.PEERS), help="peers to measure, '' for none")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time budget; what is left over is skipped")
    parser.add_argument("--compile_seconds", type=float, default=3600.0, help="how long to wait for the compiler")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds that one measurement may take")
    parser.add_argument("--bandwidth", type=float, help="TB/s for the floor, where the device is not known")
    parser.add_argument("--profile", action="store_true", help="time by kernel, of this project and of peers in JAX")
    parser.add_argument("--check", action="store_true", help="errors against the float64 recurrence instead of times")
    parser.add_argument("--implementation", help="with --check: which one; default: the best for each case")
    parser.add_argument("--max_length", type=int, default=65536, help="with --check: longest sequence")
    parser.add_argument("--static", action="store_true", help="TPU kernels, compiled without a TPU; own options")
    args = parser.parse_args()
    if args.check:
        return check(args)
    if args.profile:  # kernels of a CUDA graph do not tell which instruction they belong to
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    if jax.default_backend() != "gpu":
        parser.error(f"times are measured on a GPU; this process has {jax.default_backend()} (use --check or --static)")
    operations, models = args.only.split(","), args.models.split(",")
    args.peers = [p for p in args.peers.split(",") if p]
    choices = ((operations, (*OPERATIONS, *ROWS_OPERATIONS)), (models, tuple(MODELS)), (args.peers, tuple(peers.PEERS)))
    for names, known in choices:
        unknown = sorted(set(names) - set(known))
        if unknown:
            parser.error(f"unknown {unknown[0]!r}, choose of {', '.join(known)}")
    shapes = None
    if args.shapes:
        found = [re.fullmatch(r"(\d+)x(\d+)", shape) for shape in args.shapes.split(",")]
        if not all(found):
            parser.error(f"--shapes={args.shapes}: expected batch x tokens, such as 8x4096,1x32768")
        shapes = [(int(shape[1]), int(shape[2])) for shape in found if shape]

    bench = Bench(args)
    jobs = list(suite.jobs(models, operations, args.quick, shapes))
    if args.variants:
        jobs = [j for j in suite.variants(models) if j.operation in operations] + jobs
    rows = [(j.model, j.operation, j.batch, j.length) for j in jobs if not j.sizes and j.label == "pallas"]
    jobs += peer_jobs(bench, rows)
    if args.profile:
        return profile_jobs(bench, [job for job in jobs if job.operation != "decode"])
    programs = compile_jobs(bench, jobs)
    for job in jobs:
        measure_job(bench, job, programs[job])
    measure_torch_peers(bench, rows)
    print(report.table(bench.records))
    print(report.best(bench.records))
    for label, reason in bench.not_here.items():
        print(f"{label}: not here: {reason}")
    try:
        for path in report.plots(bench.records, args.out):
            print("wrote", path)
    except ImportError:
        print("matplotlib is not installed: no plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
