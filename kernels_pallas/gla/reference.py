"""Gated linear attention as the plain float32 token recurrence; every other backend is judged by what this one
computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import EPS, match_varying


def _recurrence(q, k, v, log_g, S, z, normalize: bool):
    """One token after the other; all arguments float32, gates and values with their own number of heads."""
    heads, value_heads, gate_heads = q.shape[2], v.shape[2], log_g.shape[2]

    def step(state, token):
        S, z = state
        q, k, v, log_g = token
        decay = jnp.exp(jnp.repeat(log_g, heads // gate_heads, axis=1))
        v = jnp.repeat(v, heads // value_heads, axis=1)
        S = decay[..., None] * S + k[..., None] * v[..., None, :]
        z = decay * z + k
        o = jnp.sum(S * q[..., None], axis=-2)
        if normalize:
            o = o / (jnp.sum(z * q, axis=-1, keepdims=True) + EPS)
        return (S, z), o

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
    return *(x.astype(jnp.float32) for x in (q, k, v, log_g)), S, z


def forward(q, k, v, log_g, initial_state, *, normalize: bool, lower_bound: float | None, save_residuals: bool) -> Any:
    """See ``kernels_pallas.gla`` for the signature; ``lower_bound`` does not matter here."""
    o, state = _recurrence(*_float32(q, k, v, log_g, initial_state), normalize)
    return o.astype(v.dtype), state, (q, k, v, log_g, initial_state) if save_residuals else None


def backward(residuals, do, dstate, *, normalize: bool, lower_bound: float | None) -> Any:
    """Automatic differentiation of the recurrence, in float32."""
    q, k, v, log_g, initial_state = residuals
    inputs = _float32(q, k, v, log_g, initial_state)
    _, pullback = jax.vjp(lambda *args: _recurrence(*args, normalize), *inputs)
    dq, dk, dv, dlog_g, dS0, dz0 = pullback((do.astype(jnp.float32), dstate))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dlog_g.astype(log_g.dtype), (dS0, dz0)
