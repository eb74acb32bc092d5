"""Timing of functions on a device.

JAX: the compiled function is dispatched ``few`` times and then ``many`` times without waiting in between, blocking once
at the end of each; the difference of the two times over ``many - few`` calls holds neither dispatch nor synchronisation
as long as a call takes longer than its dispatch. (Repeating a call inside one compiled function measures nothing: XLA
merges identical kernels.) The median over samples counts.

PyTorch: CUDA events around a run of calls, median over runs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def _elapsed(function: Callable[..., Any], args: tuple[Any, ...], calls: int) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = function(*args)
    jax.block_until_ready(result)
    return time.perf_counter() - start


def measure(
    function: Callable[..., Any], args: tuple[Any, ...], *, samples: int = 5, budget: float = 1.0
) -> dict[str, float]:
    """Milliseconds per call of a compiled function: {median, least, most, calls}; ``budget`` seconds for all samples."""
    jax.block_until_ready(function(*args))
    once = max(_elapsed(function, args, 3) / 3, 1e-5)
    many = int(min(400, max(6, budget / samples / once)))
    few = max(1, many // 4)
    times = [
        (_elapsed(function, args, many) - _elapsed(function, args, few)) * 1e3 / (many - few) for _ in range(samples)
    ]
    return {"median": statistics.median(times), "least": min(times), "most": max(times), "calls": many}


def measure_torch(function: Callable[[], Any], *, samples: int = 9, budget: float = 0.8) -> dict[str, float]:
    """The same as :func:`measure` for a PyTorch function on the current CUDA device."""
    import torch

    def run(calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls

    run(2)
    calls = int(min(200, max(3, budget * 1e3 / samples / max(run(3), 1e-3))))
    times = [run(calls) for _ in range(samples)]
    return {"median": statistics.median(times), "least": min(times), "most": max(times), "calls": calls}


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON beside the target and then renames it, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
