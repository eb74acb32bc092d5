"""Causal depthwise convolution as a sum of shifted products."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_conv1d(x: jax.Array, w: jax.Array, initial_state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(y, tail): y_t = sum_j w_j x_(t - (W - 1) + j), accumulated in float32, and the last W - 1 rows of [initial_state ; x]."""
    length, taps = x.shape[1], w.shape[0]
    if initial_state is None:
        initial_state = jnp.zeros_like(x[:, :1], shape=(x.shape[0], taps - 1, *x.shape[2:]))
    rows = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    # Products of bfloat16 numbers are exact in float32, so the result is rounded once, at the end.
    y = sum(w[j].astype(jnp.float32) * rows[:, j : j + length].astype(jnp.float32) for j in range(taps))
    return y.astype(x.dtype), rows[:, length:]
