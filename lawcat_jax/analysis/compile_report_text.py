"""The reports of ``lawcat_jax.aot`` as text and as JSON values."""

from __future__ import annotations

import dataclasses
from typing import Any

from lawcat_jax.analysis import packages
from lawcat_jax.analysis.compile_report import Report
from lawcat_jax.analysis.topology import memory_limit
from lawcat_jax.config import Config
from lawcat_jax.runtime.chips import GIB, Chip


def heading(topology: str, chip: Chip, mesh: Any, config: Config) -> str:
    """Topology, mesh, model and the chip's assumed figures."""
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [
        f"{config.teacher.source} on {topology}: {mesh.size} devices, mesh {shape}",
        f"assumed: {chip.assumptions()}",
        "(a time is a bound from a roofline, not a measurement)",
    ]
    if chip.is_gpu:
        share = memory_limit(chip) / chip.hbm_bytes
        lines.insert(
            2, f"jax may allocate {share:.0%} of it (XLA_CLIENT_MEM_FRACTION); cuDNN's scratch memory comes on top"
        )
    return "\n".join(lines)


def text(report: Report) -> str:
    """A few lines for one program."""
    lines = [f"{report.program}: {report.tokens:,} tokens, compiled in {report.compile_seconds:.0f} s"]
    if not report.fits:
        lines.append(f"  DOES NOT FIT: {_size(report.peak_bytes)} of {_size(report.hbm_bytes)}")
        lines += [f"    {_size(b['bytes']):>10}  {b['shape']}  {b['operation'] or b['kind']}" for b in report.largest]
        return "\n".join(lines)
    lines.append(
        f"  bytes a chip: arguments {_size(report.argument_bytes)}, temporaries {_size(report.temp_bytes)}, "
        f"results {_size(report.output_bytes)}, code {_size(report.code_bytes)}; peak {_size(report.peak_bytes)} of "
        f"{_size(report.hbm_bytes)} ({report.peak_bytes / report.hbm_bytes:.0%})"
    )
    lines.append(
        f"  a chip: {report.flops / 1e12:.3f} TFLOP as traced, {report.model_flops / 1e12:.3f} TFLOP of the model; "
        f"HBM traffic {_size(report.hbm_traffic_bytes)}"
    )
    for entry in report.collectives:
        local = f" ({entry['local']} a machine)" if entry["local"] < entry["group"] else ""
        groups = f"{entry['count']} x {entry['kind']} in groups of {entry['group']}{local}"
        lines.append(f"  {groups}: {_size(entry['bytes'])} sent a chip")
    if not report.collectives:
        lines.append("  no collectives")
    parts = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in report.seconds_by.items())
    low, high = (1e3 * seconds for seconds in report.seconds)
    lines.append(
        f"  roofline: {parts}; step {low:.2f} to {high:.2f} ms, MFU {report.mfu[1]:.0%} to {report.mfu[0]:.0%}"
    )
    return "\n".join(lines)


def as_json(topology: str, chip: Chip, mesh: Any, reports: list[Report]) -> dict[str, Any]:
    """Everything in the reports, with the versions of the compiler."""
    compilers = packages.CUDA_PLUGINS if chip.is_gpu else ("libtpu",)
    return {
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "chip": chip._asdict(),
        "versions": packages.installed(("jax", "jaxlib", *compilers)),
        "fits": all(report.fits for report in reports),
        "programs": [dataclasses.asdict(report) for report in reports],
    }


def _size(count: float) -> str:
    if count >= 0.1 * GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
