"""Which arrays fill the memory, read from the compiler's complaint or from the traced program."""

from __future__ import annotations

import math
import re
from typing import Any

from lawcat_jax.analysis import flops

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _number(text: str) -> float:
    found = re.match(r"([\d.]+)([KMGT]?)", text)
    return float(found.group(1)) * _UNITS[found.group(2)] if found else 0.0


def needed_bytes(message: str) -> float:
    """Bytes of HBM that the compiler's complaint says it would use (0 when it does not)."""
    found = re.search(r"(?:[Uu]sed |memory required[^(]*\()([\d.]+[KMGT]?)", message)
    return _number(found.group(1)) if found else 0.0


def largest_buffers(message: str, count: int = 5) -> list[dict[str, Any]]:
    """The largest allocations in the compiler's complaint: bytes, shape and the operation that made them."""
    found = []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        shape = re.search(r"Shape: (\S+)", block)
        operator = re.search(r'op_name="([^"]*)"', block)
        kind = re.search(r"Allocation type: (.+)", block)
        found.append(
            {
                "bytes": _number(block),
                "shape": re.sub(r"\{.*", "", shape.group(1)) if shape else "",
                "operation": operator.group(1) if operator else "",
                "kind": kind.group(1).strip() if kind else "",
            }
        )
    return sorted(found, key=lambda entry: -entry["bytes"])[:count]


def largest_arrays(jaxpr: Any, devices: int, count: int = 5) -> list[dict[str, Any]]:
    """The largest distinct arrays that a traced program computes, where the compiler names no buffers: bytes of a
    device's share when all devices share, whole shape, and the operation.
    """
    found: dict[str, dict[str, Any]] = {}

    def visit(jaxpr: Any, copies: int) -> None:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                continue
            inner = flops.inner_jaxprs(equation.params)
            for part in inner:
                visit(part, devices if equation.primitive.name == "shard_map" else copies)
            for variable in [] if inner else equation.outvars:
                shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
                size = math.prod(shape) * getattr(dtype, "itemsize", 0) * copies / devices
                name = f"{dtype}{list(shape)}" + (" a device" if copies > 1 else "")
                entry = {"bytes": size, "shape": name, "operation": equation.primitive.name, "kind": "traced"}
                found.setdefault(name, entry)

    visit(jaxpr, 1)
    return sorted(found.values(), key=lambda entry: -entry["bytes"])[:count]
