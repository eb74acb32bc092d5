"""Inputs of gated linear attention, and the judgement of an implementation's outputs and gradients.

The tolerances are fixed: a kernel is mended, not its tolerance.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas as kp
from kernels_pallas.testing import oracle


@dataclass(frozen=True)
class Regime:
    """How gates are drawn (see :func:`draw_gates`) and the bound that the kernel is told (None: no bound)."""

    name: str
    draw: str
    bound: float | None = -1.25
    slow: bool = False
    """Left out of quick test runs."""


REGIMES = (
    Regime("one", "zero"),
    Regime("weak", "constant -0.02", slow=True),
    Regime("initial", "constant -0.0433", slow=True),
    Regime("gla", "uniform -0.6"),
    Regime("bound", "constant -1.25"),
    Regime("below", "uniform -2.5"),
    Regime("saturated", "constant -5", -5.0),
    Regime("mix", "mix -5", -5.0, slow=True),
    Regime("unbounded", "rare -80", None),
    Regime("jumps", "jumps", None, slow=True),
)
"""What tests go through; a bound of None allows any gate."""

MIXED = Regime("mixed", "mix -1.25")
MEMORY = Regime("memory", "exponents 1e-5 0.05")
"""Gates whose memories reach from 20 to 100 000 tokens."""

BY_NAME = {regime.name: regime for regime in (*REGIMES, MIXED, MEMORY)}

LENGTHS = (1, 2, 63, 64, 65, 200, 1024)

REQUIRED = (*(BY_NAME[name] for name in ("one", "weak", "gla", "bound")), MIXED)
"""Gates that every backend must take, with K = V = 64 and 128 and both number types, in the shapes of REQUIRED_SIZES."""

REQUIRED_SIZES = ((8, 1, 4), (1, 17, 1), (8, 64, 1), (1, 1000, 4), (8, 1000, 4), (1, 4096, 1))
"""Batch, length, and query heads that share a value head and a gate head."""

FLOAT32 = dict.fromkeys(("o", "S", "z", "dq", "dk", "dv", "dlog_g", "dS0", "dz0"), 1e-5)
"""Largest relative root mean square error against float64, by output or gradient."""

BFLOAT16 = {
    "o": 5e-3,
    "S": 5e-3,
    "z": 5e-3,
    "dq": 1e-2,
    "dk": 1e-2,
    "dv": 1e-2,
    "dlog_g": 3e-2,
    "dS0": 1e-2,
    "dz0": 1e-2,
}
"""The same for bfloat16 inputs."""

TOLERANCES = {"float32": FLOAT32, "bfloat16": BFLOAT16}


def draw_gates(regime: Regime, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """log_g float32 of ``shape`` [B, T, Hg, K], as the regime's ``draw`` says: a kind and its numbers.

    "zero"; "constant X"; "uniform X" (from X to 0); "mix X" (0 or X, evenly); "rare X" (X at every 64th token, else
    -0.02); "exponents X Y" (-X to -Y, uniform in the logarithm); "jumps" (-10 to -300 at 2 % of the places, else -0.05).
    """
    kind, *values = regime.draw.split()
    numbers = [float(x) for x in values]
    value = numbers[0] if numbers else 0.0
    if kind == "zero":
        gates = np.zeros(shape)
    elif kind == "constant":
        gates = np.full(shape, value)
    elif kind == "uniform":
        gates = rng.uniform(value, 0, shape)
    elif kind == "mix":
        gates = np.where(rng.uniform(size=shape) < 0.5, 0.0, value)
    elif kind == "rare":
        gates = np.full(shape, -0.02)
        gates[:, 5::64] = value
    elif kind == "exponents":
        gates = -np.exp(rng.uniform(*np.log(numbers), size=shape))
    elif kind == "jumps":
        gates = np.where(rng.uniform(size=shape) < 0.02, -rng.uniform(10, 300, shape), -0.05)
    else:
        raise ValueError(f"draw: unknown kind {kind!r}")
    return gates.astype(np.float32)


def features(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Non-negative features of ``shape`` [..., K] as the layer makes them: two softmaxes of half the width. float32."""
    x = rng.normal(size=(*shape[:-1], shape[-1] // 2)) * 1.5
    x = np.concatenate([x, -x], axis=-1).reshape(*shape[:-1], 2, -1)
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return (x / x.sum(axis=-1, keepdims=True)).reshape(shape).astype(np.float32)


@dataclass
class Case:
    """One call: (q, k, v, log_g) already rounded to their dtype, the initial state or None, the cotangents
    (do, dS, dz), and the options ``normalize``, ``gate_lower_bound`` and, of packed rows, ``segment_ids``."""

    arrays: tuple
    state: tuple | None
    cotangents: tuple
    options: dict


def make_case(
    regime: Regime = BY_NAME["gla"],
    *,
    batch=1,
    length=65,
    heads=4,
    value_heads=None,
    gate_heads=None,
    K=64,
    V=64,
    state=True,
    normalize=True,
    dtype=jnp.float32,
    seed=0,
) -> Case:
    """Random inputs of one call; ``dtype`` is that of q, k, v and do, and ``state`` whether there is an initial one."""
    rng = np.random.default_rng(seed)
    value_heads, gate_heads = value_heads or heads, gate_heads or heads
    q, k = features(rng, (batch, length, heads, K)), features(rng, (batch, length, heads, K))
    v = rng.normal(size=(batch, length, value_heads, V)).astype(np.float32)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    log_g = jnp.asarray(draw_gates(regime, rng, (batch, length, gate_heads, K)))
    S, z = rng.normal(size=(batch, heads, K, V)) * 0.3, rng.uniform(0.1, 1, size=(batch, heads, K))
    start = (jnp.asarray(S, jnp.float32), jnp.asarray(z, jnp.float32)) if state else None
    do = jnp.asarray(rng.normal(size=(batch, length, heads, V)), dtype)
    dS = jnp.asarray(rng.normal(size=(batch, heads, K, V)) * 0.1, jnp.float32)
    dz = jnp.asarray(rng.normal(size=(batch, heads, K)) * 0.1, jnp.float32)
    options = {"normalize": normalize, "gate_lower_bound": regime.bound}
    return Case((q, k, v, log_g), start, (do, dS, dz), options)


@functools.partial(jax.jit, static_argnames=("normalize", "gate_lower_bound", "implementation"))
def run_vjp(arrays, state, cotangents, **options) -> dict[str, jax.Array]:
    """{o, S, z, dq, dk, dv, dlog_g[, dS0, dz0]} of ``gated_linear_attention`` with these options."""

    def call(arrays, state):
        return kp.gated_linear_attention(*arrays, initial_state=state, **options)

    (o, (S, z)), pullback = jax.vjp(call, arrays, state)
    (dq, dk, dv, dlog_g), dstate = pullback((cotangents[0], (cotangents[1], cotangents[2])))
    out = {"o": o, "S": S, "z": z, "dq": dq, "dk": dk, "dv": dv, "dlog_g": dlog_g}
    return out if dstate is None else out | {"dS0": dstate[0], "dz0": dstate[1]}


def expected(case: Case) -> dict[str, np.ndarray]:
    """What :func:`run_vjp` should give, in float64; of packed rows by running each segment alone."""

    def f64(x):
        return np.asarray(x).astype(np.float64)

    arrays = [f64(x) for x in case.arrays]
    state = None if case.state is None else [f64(x) for x in case.state]
    do, *dstate = (f64(x) for x in case.cotangents)
    options = {"normalize": case.options["normalize"], "bound": case.options["gate_lower_bound"]}
    ids = case.options.get("segment_ids")
    if ids is None:
        return oracle.gla(*arrays, state=state, **options, cotangents=[do, *dstate])
    rows = []
    for row, numbers in enumerate(np.asarray(ids)):
        one = slice(row, row + 1)
        cuts = [0, *np.flatnonzero(np.diff(numbers)) + 1, len(numbers)]
        parts = []
        for first, last in itertools.pairwise(cuts):
            start = None if state is None or first else [x[one] for x in state]
            end = [x[one] if last == len(numbers) else np.zeros_like(x[one]) for x in dstate]
            part = [x[one, first:last] for x in arrays]
            parts.append(oracle.gla(*part, state=start, **options, cotangents=[do[one, first:last], *end]))
        along = {name: np.concatenate([p[name] for p in parts], axis=1) for name in ("o", "dq", "dk", "dv", "dlog_g")}
        rows.append(along | {n: parts[-1][n] for n in ("S", "z")} | {n: parts[0][n] for n in ("dS0", "dz0")})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def errors(got: dict[str, Any], want: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative root mean square error of each output, infinite where it holds a number that is not finite."""

    def error(name: str) -> float:
        x = np.asarray(got[name]).astype(np.float64)
        return oracle.error(x, want[name]) if np.all(np.isfinite(x)) else float("inf")

    return {name: error(name) for name in got}


def failures(got: dict[str, Any], want: dict[str, np.ndarray], tolerances: dict[str, float]) -> list[str]:
    """Names of the outputs whose :func:`errors` are above their tolerance.

    What is zero everywhere in the oracle (the gate gradient when all gates are below the bound) must be exactly zero.
    """
    limits = {name: tolerances[name] if np.any(want[name]) else 0.0 for name in got}
    return [name for name, error in errors(got, want).items() if not error <= limits[name]]
