"""The rows of a sweep as a table: what was measured, and beside each figure what ``aot`` predicts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lawcat_jax.analysis.throughput.records import Measurement
from lawcat_jax.runtime.chips import GIB


@dataclasses.dataclass
class Row:
    """A program on a mesh: ``batch`` sequences of ``length`` tokens per call over all devices.

    ``measured``: None, or few repeats, with a ``problem``. ``predicted``: the report of ``aot`` (the fields of
    :class:`lawcat_jax.analysis.compile_report.Report`), None with a ``prediction_problem``; ``comparable`` when it is for
    the devices that were measured. ``efficiency``: tokens per second and device as a share of those on the mesh
    ``against``; ``predicted_efficiency``: the same of the predictions' upper bounds of the time.
    """

    text: str
    mesh: dict[str, int]
    program: str
    batch: int
    length: int
    problem: str = ""
    measured: Measurement | None = None
    prediction_problem: str = ""
    predicted: dict[str, Any] | None = None
    comparable: bool = False
    efficiency: float | None = None
    predicted_efficiency: float | None = None
    against: str = ""

    @property
    def devices(self) -> int:
        """How many devices the mesh takes."""
        return math.prod(self.mesh.values())

    def ratios(self) -> dict[str, Any]:
        """Measured over predicted: ``bytes`` (peak of the fullest device), ``seconds`` (over the lower and over the upper
        bound) and whether the time lies ``inside`` the range; only what can be compared.
        """
        if not (self.measured and self.measured.ms and self.predicted and self.comparable):
            return {}
        found: dict[str, Any] = {}
        if self.measured.peak_bytes and self.predicted["peak_bytes"]:
            found["bytes"] = self.measured.peak_bytes / self.predicted["peak_bytes"]
        low, high = self.predicted["seconds"]
        if high:
            seconds = self.measured.ms["median"] / 1e3
            found["seconds"] = [seconds / low, seconds / high]
            found["inside"] = low <= seconds <= high
        return found


def add_efficiency(rows: list[Row]) -> None:
    """Hold every row against the first measured one of the same program, or where none is, the first predicted one."""
    for program in dict.fromkeys(row.program for row in rows):
        own = [row for row in rows if row.program == program]
        measured, predicted = [row for row in own if row.measured], [row for row in own if _bound(row)]
        base = next(iter(measured or predicted), None)
        for row in own if base else []:
            assert base is not None
            row.against = base.text
            if row.measured:
                row.efficiency = _speed(row) / _speed(base)
            if (seconds := _bound(row)) and (least := _bound(base)):
                share = row.batch * row.length / row.devices / (base.batch * base.length / base.devices)
                row.predicted_efficiency = share * least / seconds


def _speed(row: Row) -> float:
    assert row.measured is not None
    assert row.measured.tokens_per_second is not None  # comes with a measurement
    return row.measured.tokens_per_second / row.devices


def _bound(row: Row) -> float:
    """The predicted upper bound of the time in seconds, 0 without one."""
    return row.predicted["seconds"][1] if row.predicted and row.predicted["fits"] else 0.0


def as_json(rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that is known of the rows, under the circumstances ``about``."""
    return {
        **about,
        "rows": [{"devices": row.devices, **dataclasses.asdict(row), "ratios": row.ratios()} for row in rows],
    }


HEADINGS = (
    "mesh",
    "devices",
    "program",
    "batch",
    "ms",
    "aot ms (measured / upper bound)",
    "tokens/s",
    "efficiency",
    "aot efficiency",
    "MFU",
    "aot MFU",
    "peak GiB a device",
    "compiled GiB",
    "aot GiB (peak / aot)",
)


def table(rows: list[Row]) -> str:
    """A Markdown table, one line a row, and under it why some rows lack numbers."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(_cells, rows)]
    notes = [f"* {row.text}, {row.program}: {row.problem}" for row in rows if row.problem]
    # One line for all rows with the same reason.
    reasons = dict.fromkeys(row.prediction_problem for row in rows if row.prediction_problem)
    for reason in reasons:
        whose = [row for row in rows if row.prediction_problem == reason]
        named = "all rows" if len(whose) == len(rows) else "; ".join(f"{row.text}, {row.program}" for row in whose)
        notes.append(f"* no prediction or a warning of aot for {named}: {reason}")
    against = {row.program: row.against for row in rows if row.against}
    if against:
        named = ", ".join(f"{program} {text}" for program, text in against.items())
        notes.append(f"* efficiency: tokens/s a device, as a share of those on the mesh named ({named})")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n" + "\n".join(notes)


def line(row: Row) -> str:
    """One row as soon as it is measured."""
    if not row.measured:
        return f"{row.text}, {row.program}: {row.problem}"
    _, _, _, batch, ms, _, speed, efficiency, _, mfu, _, peak, compiled, _ = _cells(row)
    return (
        f"{row.text}, {row.program}: {batch} tokens, {ms} ms, {speed} tokens/s, efficiency {efficiency}, MFU {mfu}, "
        f"peak {peak} GiB a device, compiled {compiled} GiB{row.problem and f'; {row.problem}'}"
    )


def _cells(row: Row) -> tuple[str, ...]:
    measured, predicted, ratios = row.measured, row.predicted, row.ratios()
    ms, speed, mfu, peak, compiled = "not run" if row.problem.startswith("not run") else "-", "-", "-", "-", "-"
    if measured and measured.ms:
        ms, speed = f"{measured.ms['median']:.2f}", f"{measured.tokens_per_second:,.0f}"
        mfu = _optional(measured.mfu, ".1%")
        peak = _optional(measured.peak_bytes and measured.peak_bytes / GIB, ".3g")
        compiled = _optional(sum(measured.memory.values()) / GIB if measured.memory else None, ".3g")
    aot_ms = aot_mfu = aot_bytes = "-"
    if predicted and predicted["fits"]:
        low, high = (1e3 * second for second in predicted["seconds"])
        aot_ms = f"{low:.3g} to {high:.3g}"
        if "seconds" in ratios:
            aot_ms += f" ({ratios['seconds'][1]:.2f}{', inside' if ratios['inside'] else ', OUTSIDE'})"
        aot_mfu = f"{predicted['mfu'][1]:.0%} to {predicted['mfu'][0]:.0%}"
    if predicted:
        aot_bytes = f"{predicted['peak_bytes'] / GIB:.3g}" + ("" if predicted["fits"] else " does not fit")
        aot_bytes += f" ({ratios['bytes']:.2f})" if "bytes" in ratios else ""
    return (
        row.text,
        str(row.devices),
        row.program,
        f"{row.batch} x {row.length}",
        ms,
        aot_ms,
        speed,
        _optional(row.efficiency, ".1%"),
        _optional(row.predicted_efficiency, ".1%"),
        mfu,
        aot_mfu,
        peak,
        compiled,
        aot_bytes,
    )


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
