"""Causal depthwise convolution as a sum of shifted products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def causal_conv1d(
    x: Float[Array, "B T *c"], w: Float[Array, "W ..."], initial_state: Float[Array, "B W-1 *c"] | None
) -> tuple[Float[Array, "B T ..."], Float[Array, "B W-1 *c"]]:
    """(y, tail): y_t = sum_j w_j x_(t - (W - 1) + j), accumulated in float32, and the last W - 1 rows of [initial_state ; x]."""
    length, taps = x.shape[1], w.shape[0]
    if initial_state is None:
        initial_state = jnp.zeros_like(x[:, :1], shape=(x.shape[0], taps - 1, *x.shape[2:]))
    rows = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    # Products of bfloat16 numbers are exact in float32, so the result is rounded once, at the end.
    y: Any = sum(w[j].astype(jnp.float32) * rows[:, j : j + length].astype(jnp.float32) for j in range(taps))
    return y.astype(x.dtype), rows[:, length:]
