"""Inputs of LAWCAT attention with padding and packed documents, and what it should give, by running each document alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas as kp
from kernels_pallas.testing import oracle
from kernels_pallas.testing.cases import BFLOAT16, FLOAT32

TAPS = 4

PER_TOKEN = ("q", "k", "v", "gate_logits")
PARAMETERS = ("conv_q", "conv_k", "phi")

TOLERANCES = {
    "float32": dict.fromkeys(("dgate_logits", "dconv_q", "dconv_k", "dphi", "drows_q", "drows_k"), 1e-5) | FLOAT32,
    "bfloat16": dict.fromkeys(("dconv_q", "dconv_k", "dphi", "drows_q", "drows_k"), 1e-2)
    | BFLOAT16
    # The state sums features that are rounded alike, where that of the attention alone sums features given.
    | {"S": 1e-2, "z": 1e-2, "dgate_logits": 3e-2},
}
"""As ``cases.TOLERANCES``, for the layer: largest relative root mean square error against float64."""

PADDING = (jnp.nan, jnp.inf, jnp.nan, -jnp.inf)
"""What :func:`make_case` puts at padding, into q, k, v and the gate logits."""


@dataclass
class Case:
    """One call: its arrays by name, the cotangents (do, dS, dz, those of the rows of q and of k), ``lengths`` [B] and
    ``segment_ids`` [B, T], or None."""

    arrays: dict[str, Any]
    cotangents: tuple
    lengths: jax.Array | None
    segment_ids: jax.Array | None


def segment_ids(starts: Sequence[Sequence[int]], length: int) -> jax.Array:
    """int32 [B, T] of rows whose documents begin at ``starts``: ids that come again, 0, 1, 2, 0, 1, ..."""
    rows = [np.searchsorted(row, np.arange(length), side="right") - 1 for row in starts]
    return jnp.asarray(np.stack(rows) % 3, jnp.int32)


def make_case(
    *,
    length: int,
    heads: int = 2,
    kv_heads: int = 1,
    width: int = 64,
    dtype: Any = jnp.float32,
    lengths: Sequence[int] | None = None,
    starts: Sequence[Sequence[int]] | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> Case:
    """Random inputs with K = V = d = ``width``. What stands at padding is :data:`PADDING`."""
    batch = batch or len(lengths or starts or [0])
    rng = np.random.default_rng(seed)

    def normal(*shape: int, kind: Any = dtype, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32).astype(kind)

    wide = functools.partial(normal, kind=jnp.float32)
    arrays: dict[str, Any] = {
        "q": normal(batch, length, heads, width),
        "k": normal(batch, length, kv_heads, width),
        "v": normal(batch, length, kv_heads, width),
        "gate_logits": wide(batch, length, kv_heads, width, scale=4),
        "conv_q": wide(heads, TAPS, width, scale=0.4),
        "conv_k": wide(heads, TAPS, width, scale=0.4),
        "phi": wide(heads, width, width // 2, scale=0.2),
        "initial_state": (
            jnp.abs(wide(batch, heads, width, width)),
            jnp.abs(wide(batch, heads, width)) + 1,
        ),
        "conv_state": (normal(batch, TAPS - 1, heads, width), normal(batch, TAPS - 1, kv_heads, width)),
    }
    cotangents = (
        normal(batch, length, heads, width),
        wide(batch, heads, width, width, scale=0.1),
        wide(batch, heads, width, scale=0.1),
        normal(batch, TAPS - 1, heads, width),
        normal(batch, TAPS - 1, kv_heads, width),
    )
    counts = None
    if lengths is not None:
        counts = jnp.asarray(lengths, jnp.int32)
        valid = (jnp.arange(length) < counts[:, None])[..., None, None]
        arrays |= {n: jnp.where(valid, arrays[n], x) for n, x in zip(PER_TOKEN, PADDING, strict=True)}
    return Case(arrays, cotangents, counts, None if starts is None else segment_ids(starts, length))


@functools.partial(jax.jit, static_argnames="implementation")
def run_vjp(arrays, cotangents, lengths, ids, *, implementation: str | None = None) -> dict[str, jax.Array]:
    """Outputs, state, rows and every gradient of ``lawcat_attention``, by the names of ``oracle.lawcat_attention``."""

    def call(arrays):
        return kp.lawcat_attention(**arrays, lengths=lengths, segment_ids=ids, implementation=implementation)

    out, pullback = jax.vjp(call, arrays)
    do, dS, dz, *drows = cotangents
    return named(*out, *pullback((do, (dS, dz), tuple(drows))))


def named(o, state, rows, d: dict[str, Any]) -> dict[str, jax.Array]:
    """What ``lawcat_attention`` returned, and ``d``, the gradients by the names of its arrays, as :func:`run_vjp` gives
    them."""
    (S, z), (rows_q, rows_k) = state, rows
    out = {"o": o, "S": S, "z": z, "rows_q": rows_q, "rows_k": rows_k}
    out |= {f"d{name}": d[name] for name in (*PER_TOKEN, *PARAMETERS)}
    return out | dict(zip(("dS0", "dz0", "drows_q", "drows_k"), (*d["initial_state"], *d["conv_state"]), strict=True))


def expected(case: Case) -> dict[str, np.ndarray]:
    """What :func:`run_vjp` should give, in float64; zeros at padding, of what has no tokens the states that it began with."""
    a, cotangents = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), (case.arrays, case.cotangents))
    do, dS, dz, *drows = cotangents
    batch, length = a["q"].shape[:2]
    parameters: dict[str, Any] = {name: a[name] for name in PARAMETERS}
    out = {name: np.zeros_like(a[name[1:]]) for name in ("dq", "dk", "dv", "dgate_logits")} | {"o": np.zeros_like(do)}
    out |= {f"d{name}": np.zeros_like(x) for name, x in parameters.items()}
    names = ("S", "z", "rows_q", "rows_k")
    starts = dict(zip(names, (*a["initial_state"], *a["conv_state"]), strict=True))
    ends = dict(zip(names, (dS, dz, *drows), strict=True))
    gradients = dict(zip(names, ("dS0", "dz0", "drows_q", "drows_k"), strict=True))
    out |= {name: x.copy() for name, x in starts.items()}
    out |= {gradients[name]: x.copy() for name, x in ends.items()}
    for row in range(batch):
        count = length if case.lengths is None else int(case.lengths[row])
        ids = np.zeros(length) if case.segment_ids is None else np.asarray(case.segment_ids[row])
        cuts = [0, *np.flatnonzero(np.diff(ids[:count])) + 1, count]
        one = slice(row, row + 1)
        for first, last in itertools.pairwise(cuts):
            if first == last:  # no tokens at all
                continue
            given = [starts[n][one] if first == 0 else np.zeros_like(starts[n][one]) for n in names]
            end = [ends[n][one] if last == count else np.zeros_like(ends[n][one]) for n in names]
            part: dict[str, Any] = {n: a[n][one, first:last] for n in PER_TOKEN}
            states: dict[str, Any] = {"initial_state": given[:2], "conv_state": given[2:]}
            got: Any = oracle.lawcat_attention(**part, **parameters, **states, cotangents=[do[one, first:last], *end])
            for name in ("o", "dq", "dk", "dv", "dgate_logits"):
                out[name][one, first:last] = got[name]
            for name in PARAMETERS:
                out[f"d{name}"] += got[f"d{name}"]
            if first == 0:
                for name in gradients.values():
                    out[name][one] = got[name]
            if last == count:
                out["S"][one], out["z"][one] = got["S"], got["z"]
                for name, x, before in zip(("rows_q", "rows_k"), (part["q"], part["k"]), given[2:], strict=True):
                    out[name][one] = np.concatenate([before, x], axis=1)[:, -(TAPS - 1) :]
    return out


def problems(case: Case, got: dict[str, Any], tolerances: dict[str, float]) -> tuple[list[str], dict[str, float]]:
    """(names of what is wrong, relative errors).

    Convolution rows must be equal; outputs and gradients at padding exactly zero, and all else within ``tolerances``.
    """
    want, bad, errors = expected(case), [], {}
    arrays = {name: np.asarray(x).astype(np.float64) for name, x in got.items()}
    for name, x in arrays.items():
        if not np.all(np.isfinite(x)):
            bad.append(f"{name} is not finite")
        elif name in ("rows_q", "rows_k"):
            bad += [] if np.array_equal(x, want[name]) else [name]
        else:
            errors[name] = oracle.error(x, want[name])
            bad += [] if errors[name] <= (tolerances[name] if np.any(want[name]) else 0.0) else [name]
    if case.lengths is not None:
        padding = np.arange(case.arrays["q"].shape[1]) >= np.asarray(case.lengths)[:, None]
        names = ("o", *(f"d{name}" for name in PER_TOKEN))
        bad += [f"{name} at padding" for name in names if np.any(arrays[name][padding])]
    return bad, errors
