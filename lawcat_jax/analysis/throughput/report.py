"""Measurements as a table, and the comparison that they are made for."""

from __future__ import annotations

import dataclasses
from typing import Any

from lawcat_jax.analysis.throughput.records import Measurement
from lawcat_jax.config import Config
from lawcat_jax.models.flops import model_flops
from lawcat_jax.runtime.chips import GIB

TARGET = 1.5
"""The goal of each stage: this many times the peer's tokens per second and device."""


def add_utilization(measurements: list[Measurement], config: Config) -> None:
    """Fill in the peer's MFU, by the same counts and peaks as ours."""
    from lawcat_jax.training.utilization import peak_flops

    for entry in measurements:
        peak = peak_flops(entry.device)
        if entry.ms and entry.mfu is None and peak is not None:
            assert config.teacher.architecture is not None  # the request states it
            assert entry.tokens_per_second is not None  # comes with ms
            operations = model_flops(entry.stage, config, config.teacher.architecture, entry.length)
            entry.mfu = operations * entry.tokens_per_second / (peak * entry.devices)


def comparisons(measurements: list[Measurement]) -> dict[str, dict[str, Any]]:
    """Per stage, how our speed compares with the peer's: ``ratio`` of tokens per second and device, ours over those of its
    fastest variant, which ``variant`` names; or the ``problem`` that keeps the two from being compared.
    """
    found: dict[str, dict[str, Any]] = {}
    for stage in dict.fromkeys(entry.stage for entry in measurements):
        sides = {side: [e for e in measurements if e.stage == stage and e.side == side] for side in ("jax", "torch")}
        if not sides["torch"]:
            continue
        timed = {side: [e for e in entries if e.ms] for side, entries in sides.items()}
        missing = next((side for side in timed if not timed[side]), None)
        if missing is not None:
            problems = dict.fromkeys(entry.problem for entry in sides[missing] if entry.problem)
            found[stage] = {"problem": f"{missing} not measured: {'; '.join(problems) or 'it did not run'}"}
            continue
        ours, peer = timed["jax"][0], max(timed["torch"], key=_speed)
        found[stage] = {"ratio": _speed(ours) / _speed(peer), "variant": peer.variant}
        if peer.notes.get("gla") == "fla":  # the recurrence in plain PyTorch is no competitor
            found[stage]["target"] = TARGET
        if ours.trainable != peer.trainable:
            found[stage] = {
                "problem": f"not comparable: {ours.trainable:,} trainable parameters here, {peer.trainable:,} there"
            }
    return found


def _speed(entry: Measurement) -> float:
    assert entry.tokens_per_second is not None  # comes with ms
    return entry.tokens_per_second / entry.devices


HEADINGS = ("stage", "side", "form", "batch", "ms/step", "tokens/s", "MFU", "peak GiB", "compile s", "loss")


def text(measurements: list[Measurement], versions: dict[str, str], date: str) -> str:
    """A heading, one line a measurement, and one line a comparison."""
    rows = [HEADINGS, *map(_row, measurements)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    devices = dict.fromkeys(f"{e.devices} x {e.device} ({e.side})" for e in measurements if e.device)
    heading = [", ".join(devices), ", ".join(f"{name} {version}" for name, version in versions.items()), date]
    notes = [f"  {_named(e)} not measured: {e.problem}" for e in measurements if not e.ms]
    notes += [f"  {_named(e)}: {e.notes['unfinished']}" for e in measurements if "unfinished" in e.notes]
    return "\n".join([*filter(None, heading), *lines, *notes, *map(_comparison, comparisons(measurements).items())])


def _named(entry: Measurement) -> str:
    return f"{entry.stage} {entry.side}" + (f" ({entry.variant})" if entry.variant else "")


def _row(entry: Measurement) -> tuple[str, ...]:
    size = f"{entry.batch} x {entry.length}"
    if not entry.ms:
        return (entry.stage, entry.side, entry.variant, size, "-", "-", "-", "-", _seconds(entry), "-")
    return (
        entry.stage,
        entry.side,
        entry.variant,
        size,
        f"{entry.ms['median']:.2f}",
        f"{entry.tokens_per_second:,.0f}",
        "-" if entry.mfu is None else f"{entry.mfu:.1%}",
        "-" if entry.peak_bytes is None else f"{entry.peak_bytes / GIB:.2f}",
        _seconds(entry),
        " to ".join(f"{loss:.4g}" for loss in entry.losses),
    )


def _seconds(entry: Measurement) -> str:
    found = entry.compile_seconds if entry.side == "jax" else entry.first_step_seconds
    return "-" if found is None else f"{found:.1f}"


def _comparison(item: tuple[str, dict[str, Any]]) -> str:
    stage, found = item
    if "problem" in found:
        return f"{stage}: {found['problem']}"
    line = f"{stage}: {found['ratio']:.2f} times the tokens/s a device of PyTorch ({found['variant']})"
    if "target" not in found:
        return f"{line}, which did not run fla"
    return f"{line}; target {found['target']}: {'met' if found['ratio'] >= found['target'] else 'missed'}"


def as_json(measurements: list[Measurement], versions: dict[str, str], date: str, **about: Any) -> dict[str, Any]:
    """Everything that was measured and under which circumstances."""
    return {
        "date": date,
        **about,
        "versions": versions,
        "comparisons": comparisons(measurements),
        "measurements": [dataclasses.asdict(entry) for entry in measurements],
    }
