"""Where the time of a compiled function goes, kernel by kernel: JAX's profiler over a few warm calls on a GPU.

Beside each kernel stand the bytes of its operands and results, from the compiled program. Over its time they are the bandwidth that it
reached; a kernel that takes only a part of an operand reads less than that.
"""

from __future__ import annotations

import collections
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

CALLS = 10
"""Warm calls in a trace."""

FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
"""Instructions that no kernel runs for."""

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)(?:e\d\w*)?)\[([\d,]*)\]")


class Kernel(NamedTuple):
    """A kernel of one HLO instruction, its numbers for one call of the function."""

    name: str
    """As the GPU's driver knows it."""

    instruction: str
    """Name in the compiled program, "" where the trace does not tell."""

    launches: float
    ms: float
    """Of all launches."""

    bytes: float | None
    """Of operands and results, for all launches; None where the instruction is not known."""

    source: str
    """The operation in JAX that the instruction came from."""


class Instruction(NamedTuple):
    """An instruction of a compiled program."""

    bytes: float
    source: str


def _size(shapes: str) -> float:
    """Bytes of all arrays in the text of a shape."""
    found = _ARRAY.findall(shapes)
    return sum(math.prod(int(n) for n in dims.split(",") if n) * int(bits or 8) / 8 for _, bits, dims in found)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def instructions(hlo: str) -> dict[str, Instruction]:
    """By name, the instructions of a compiled program (its text) that kernels run for."""
    sizes: dict[str, float] = {}
    calls: dict[str, tuple[list[str], str]] = {}
    for line in hlo.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, rest = match[1], match[2]
        end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
        operation = re.match(r"\s*([\w-]+)\(", rest[end:])
        if operation is None:
            continue
        sizes[name] = _size(rest[:end])
        if operation[1] not in FREE:
            start = end + operation.end() - 1
            operands = re.findall(r"%([\w.-]+)", rest[start : _closing(rest, start)])
            source = re.search(r'op_name="([^"]*)"', rest)
            calls[name] = (operands, source[1] if source else "")
    return {
        name: Instruction(sizes[name] + sum(sizes.get(operand, 0.0) for operand in set(operands)), source)
        for name, (operands, source) in calls.items()
    }


def kernels(trace: Path, calls: int, program: Mapping[str, Instruction]) -> list[Kernel]:
    """The kernels that a trace (``*.xplane.pb``) of ``calls`` calls holds, the longest first.

    Raises LookupError where it holds none."""
    from jax.profiler import ProfileData

    found: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    planes = list(ProfileData.from_file(str(trace)).planes)
    for plane in planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):  # the other lines tell of the same kernels by operation or module
                continue
            for event in line.events:
                stats: dict[str, Any] = dict(event.stats)
                instruction = str(stats.get("hlo_op", ""))
                if instruction not in program:  # a fusion's kernel has its name, with an underscore for the dot
                    spellings = (event.name, re.sub(r"_(\d+)$", r".\1", event.name))
                    instruction = next((name for name in spellings if name in program), instruction)
                found[event.name, instruction].append(event.duration_ns)
    if not found:
        raise LookupError(
            f"the profiler gave no kernels of a GPU, only {', '.join(p.name for p in planes) or 'nothing'}"
        )
    rows = []
    for (name, instruction), times in found.items():
        known = program.get(instruction)
        launches = len(times) / calls
        moved = None if known is None else known.bytes * launches
        source = "" if known is None else known.source
        rows.append(Kernel(name, instruction, launches, sum(times) / calls * 1e-6, moved, source))
    return sorted(rows, key=lambda row: -row.ms)


def profile(compiled: Any, args: tuple[Any, ...], calls: int = CALLS) -> list[Kernel]:
    """The kernels of a compiled function. Raises LookupError where the profiler tells of none."""
    jax.block_until_ready(compiled(*args))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            result = None
            for _ in range(calls):
                result = compiled(*args)
            jax.block_until_ready(result)
        traces = sorted(Path(folder).rglob("*.xplane.pb"))
        if not traces:
            raise LookupError("the profiler wrote no trace")
        return kernels(traces[-1], calls, instructions(compiled.as_text()))


def table(rows: list[Kernel], ms: float) -> str:
    """Text with one line for each kernel; ``ms``: the whole call, as timed without the profiler."""
    total = sum(row.ms for row in rows)
    lines = [
        f"kernels {total:.4f} ms of a call of {ms:.4f} ms",
        "ms | share | launches | MB | TB/s | kernel | instruction | source",
    ]
    for row in rows:
        moved = ["-", "-"] if row.bytes is None else [f"{row.bytes / 1e6:.1f}", f"{row.bytes / row.ms / 1e9:.2f}"]
        share = f"{100 * row.ms / total:.1f}%"
        cells = [f"{row.ms:.4f}", share, f"{row.launches:g}", *moved, row.name[:60], row.instruction, row.source[-70:]]
        lines.append(" | ".join(cells))
    return "\n".join(lines)
