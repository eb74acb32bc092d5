"""Timing of JAX functions on a device.

A call runs ``repeats`` times inside one compiled function; an optimization barrier ties each run to the result of the one before, so that
they run one after the other and none is merged or hoisted. The time between two ``block_until_ready`` over ``repeats`` then holds
next to no dispatch overhead. The median over samples counts.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import lax


def chained(function: Callable[..., Any], repeats: int) -> Callable[..., Any]:
    """``function`` run ``repeats`` times, each run waiting for the one before; returns the last result."""

    def run(first, *rest):
        result = function(first, *rest)
        for _ in range(repeats - 1):
            first, _ = lax.optimization_barrier((first, result))
            result = function(first, *rest)
        return result

    return run


def measure(compiled: Callable[..., Any], args: tuple[Any, ...], repeats: int, *, samples: int = 7) -> dict[str, float]:
    """Milliseconds a run of a compiled :func:`chained` function: {median, least, most}; one warm-up call first."""
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append((time.perf_counter() - start) * 1e3 / repeats)
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def measure_function(function: Callable[..., Any], args: tuple[Any, ...], *, repeats: int = 8, samples: int = 7):
    """Compile and :func:`measure`."""
    compiled = jax.jit(chained(function, repeats)).lower(*args).compile()
    return measure(compiled, args, repeats, samples=samples)


def write_json(path: str | Path, value: Any) -> None:
    """Written beside the target, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
