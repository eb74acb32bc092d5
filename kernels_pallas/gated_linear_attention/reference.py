"""Gated linear attention as the plain float32 token recurrence; every other backend is judged by what this one
computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import EPS, match_varying


def _read(q, k, v, S, z):
    """Weighted mean of the values in S and v."""
    return (_times(q, S) + _sum(q * k) * v) / (_sum(q * (z + k)) + EPS)


def _read_for_gradients(q, k, v, S, z):
    """The same as v + (o - v), which differentiates without cancellation where the token's own weight is next to all
    (strong gates). It is not as exact where there are no weights at all."""
    before = _sum(q * z) + EPS
    return v + (_times(q, S) - before * v) / (before + _sum(q * k))


def _read_sum(q, k, v, S, z):
    """Weighted sum of the values in S and v."""
    return _times(q, S) + _sum(q * k) * v


def _times(q, S):
    return jnp.sum(S * q[..., None], axis=-2)


def _sum(x):
    return jnp.sum(x, axis=-1, keepdims=True)


def _recurrence(q, k, v, log_g, S, z, read):
    """One token after the other; all arguments float32, gates and values with their own number of heads. ``read`` (q,
    k, v, S, z) gives the output from the state before the token."""
    heads, value_heads, gate_heads = q.shape[2], v.shape[2], log_g.shape[2]

    def step(state, token):
        S, z = state
        q, k, v, log_g = token
        decay = jnp.exp(jnp.repeat(log_g, heads // gate_heads, axis=1))
        v = jnp.repeat(v, heads // value_heads, axis=1)
        S, z = decay[..., None] * S, decay * z
        return (S + k[..., None] * v[..., None, :], z + k), read(q, k, v, S, z)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_g))
    state, o = lax.scan(step, (S, z), tokens)
    return jnp.moveaxis(o, 0, 1), state


def _float32(q, k, v, log_g, initial_state):
    batch, _, heads, features = q.shape
    if initial_state is None:
        initial_state = (
            jnp.zeros((batch, heads, features, v.shape[-1]), jnp.float32),
            jnp.zeros((batch, heads, features), jnp.float32),
        )
    S, z = (match_varying(x, q, k, v, log_g) for x in initial_state)
    q, k, v, log_g = (x.astype(jnp.float32) for x in (q, k, v, log_g))
    return q, k, v, log_g, S, z


def supports(q, k, v, log_g, *, normalize: bool, lower_bound: float | None, differentiated: bool) -> str | None:
    """None: it takes every call."""
    return None


def forward(q, k, v, log_g, initial_state, *, normalize: bool, lower_bound: float | None, save_residuals: bool) -> Any:
    """See ``kernels_pallas.contract``; ``lower_bound`` does not matter here."""
    o, state = _recurrence(*_float32(q, k, v, log_g, initial_state), _read if normalize else _read_sum)
    return o.astype(v.dtype), state, (q, k, v, log_g, initial_state) if save_residuals else None


def backward(residuals, do, dstate, *, normalize: bool, lower_bound: float | None) -> Any:
    """Automatic differentiation of the recurrence, in float32."""
    q, k, v, log_g, initial_state = residuals
    inputs = _float32(q, k, v, log_g, initial_state)
    read = _read_for_gradients if normalize else _read_sum
    _, pullback = jax.vjp(lambda *args: _recurrence(*args, read=read), *inputs)
    dq, dk, dv, dlog_g, dS0, dz0 = pullback((do.astype(jnp.float32), dstate))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dlog_g.astype(log_g.dtype), (dS0, dz0)
