"""Errors of a backend on this device against the float64 recurrence (``python -m kernels_pallas.benchmark --check``).

Oracle, gate regimes and tolerances are those of ``kernels_pallas.testing``. Each case is tried on its own; an exception is
recorded as the case's result.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas as kp
from kernels_pallas.testing import oracle
from kernels_pallas.testing.cases import BY_NAME, TOLERANCES, Regime, draw_gates, errors, failures


class Case(NamedTuple):
    """One call: shapes, number type, and the name of a regime of ``kernels_pallas.testing.cases``."""

    batch: int
    length: int
    heads: int
    value_heads: int
    gate_heads: int
    features: int
    values: int
    dtype: str
    gates: str
    normalize: bool = True
    state: bool = True

    @property
    def regime(self) -> Regime:
        """How gates are drawn, and the bound told to the kernel."""
        return BY_NAME[self.gates]


def cases(levels: bool = False) -> Iterator[Case]:
    """Gate regimes, lengths, groups, states, normalisation, number types; ``levels``: also gates without a bound."""
    for d in (64, 128):
        for regime in ("one", "weak", "initial", "gla", "memory", "bound", "below", "mixed"):
            yield Case(1, 200, 4, 1, 1, d, d, "bfloat16", regime)
        yield Case(1, 200, 2, 2, 2, d, d, "bfloat16", "saturated")
        yield Case(1, 200, 2, 2, 2, d, d, "bfloat16", "mix")
        for length in (1, 17, 64, 1000):
            yield Case(2, length, 4, 2, 4, d, d, "bfloat16", "gla")
        yield Case(1, 1024, 4, 1, 1, d, d, "bfloat16", "gla", False)
        yield Case(1, 192, 2, 1, 1, d, d, "bfloat16", "gla", True, False)
        yield Case(1, 200, 2, 1, 1, d, d, "float32", "gla")
        yield Case(1, 130, 2, 1, 1, d, d, "float32", "bound")
    yield Case(1, 200, 2, 2, 2, 64, 128, "bfloat16", "gla")
    yield Case(1, 200, 2, 2, 2, 32, 16, "bfloat16", "gla")
    yield Case(8, 200, 4, 1, 1, 64, 64, "bfloat16", "gla")
    for d in (64, 128):
        yield Case(1, 4096, 2, 1, 1, d, d, "bfloat16", "memory")
    if levels:
        yield Case(1, 200, 2, 2, 2, 64, 64, "bfloat16", "unbounded")
    yield Case(1, 65536, 1, 1, 1, 64, 64, "bfloat16", "memory")


def draw(case: Case, seed: int) -> dict[str, Any]:
    """Inputs and cotangents as NumPy arrays already rounded to the case's number type."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)

    def soft(*shape: int) -> np.ndarray:
        x = np.exp(rng.normal(size=shape))
        return (2 * x / x.sum(-1, keepdims=True)).astype(dtype)

    def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    B, T, H, K, V = case.batch, case.length, case.heads, case.features, case.values
    state = (np.abs(normal(B, H, K, V)), np.abs(normal(B, H, K)) + 1) if case.state else None
    return {
        "q": soft(B, T, H, K),
        "k": soft(B, T, H, K),
        "v": normal(B, T, case.value_heads, V, dtype=dtype),
        "log_g": draw_gates(case.regime, rng, (B, T, case.gate_heads, K)),
        "state": state,
        "cotangents": (normal(B, T, H, V, dtype=dtype), normal(B, H, K, V), normal(B, H, K)),
    }


def run_case(case: Case, data: dict[str, Any], implementation: str | None) -> dict[str, np.ndarray]:
    """o, S, z and every gradient of the backend."""
    options = {"normalize": case.normalize, "gate_lower_bound": case.regime.bound, "implementation": implementation}

    def call(q, k, v, log_g, state):
        return kp.gated_linear_attention(q, k, v, log_g, initial_state=state, **options)

    def both(cotangents, *args):
        (o, state), pullback = jax.vjp(call, *args)
        return o, state, pullback((cotangents[0], (cotangents[1], cotangents[2])))

    args = (data["q"], data["k"], data["v"], data["log_g"], data["state"])
    o, (S, z), (dq, dk, dv, dlog_g, dstate) = jax.device_get(jax.jit(both)(data["cotangents"], *args))
    out = {"o": o, "S": S, "z": z, "dq": dq, "dk": dk, "dv": dv, "dlog_g": dlog_g}
    if dstate is not None:
        out |= {"dS0": dstate[0], "dz0": dstate[1]}
    return out


def judge(case: Case, got: dict[str, Any], want: dict[str, np.ndarray]) -> dict[str, Any]:
    """The record of a case: {case, errors, failed}."""
    failed = failures(got, want, TOLERANCES[case.dtype])
    return {"case": case._asdict(), "errors": errors(got, want), "failed": failed}


def run(
    implementation: str | None, report: Callable[[dict[str, Any]], None], *, chosen: Any = None, workers: int = 8
) -> int:
    """Run all cases and hand each result to ``report``; returns the number of failures."""
    chosen = list(cases() if chosen is None else chosen)
    failures = 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        # Longest first: the oracle is a Python loop over tokens and runs while the device compiles.
        order = sorted(range(len(chosen)), key=lambda i: -chosen[i].length)
        inputs = {i: draw(chosen[i], i) for i in order}
        wants = {}
        for i in order:
            case, data = chosen[i], inputs[i]
            wide = {n: np.asarray(data[n], np.float64) for n in ("q", "k", "v", "log_g")}
            cotangents = tuple(np.asarray(x, np.float64) for x in data["cotangents"])
            wants[i] = pool.submit(
                oracle.gla,
                *wide.values(),
                state=data["state"],
                normalize=case.normalize,
                bound=case.regime.bound,
                cotangents=cotangents,
            )
        for i in reversed(order):
            start = time.time()
            try:
                result = judge(chosen[i], run_case(chosen[i], inputs[i], implementation), wants[i].result())
            except Exception:
                result = {"case": chosen[i]._asdict(), "error": traceback.format_exc(limit=-3)[-1500:]}
            result["seconds"] = round(time.time() - start, 2)
            failures += bool(result.get("failed") or "error" in result)
            report(result)
    return failures
