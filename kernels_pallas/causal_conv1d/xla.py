"""Causal depthwise convolution as a sum of shifted products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

if TYPE_CHECKING:
    import jax
    from jaxtyping import Array, Float, Int


def causal_conv1d(
    x: Float[Array, "B T *c"],
    w: Float[Array, "W ..."],
    initial_state: Float[Array, "B W-1 *c"] | None,
    numbers: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B W-1 *c"]]:
    """(y, tail): y_t = sum_j w_j x_(t - (W - 1) + j), accumulated in float32, and the last W - 1 rows of [initial_state ; x].

    ``numbers``: segments that grow from 0, to which the initial rows belong; rows of other segments than the
    token's (in ``tail``: the last token's) are zeros to it.
    """
    length, taps = x.shape[1], w.shape[0]
    if initial_state is None:
        initial_state = jnp.zeros_like(x[:, :1], shape=(x.shape[0], taps - 1, *x.shape[2:]))
    rows = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    # Products of bfloat16 numbers are exact in float32, so the result is rounded once, at the end.
    if numbers is None:
        y: Any = sum(w[j].astype(jnp.float32) * rows[:, j : j + length].astype(jnp.float32) for j in range(taps))
        return y.astype(x.dtype), rows[:, length:]
    owners = jnp.pad(numbers, ((0, 0), (taps - 1, 0)))

    def kept(part: slice, numbers: jax.Array) -> jax.Array:
        same = owners[:, part] == numbers
        return jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), rows[:, part], 0)

    parts = (kept(slice(j, j + length), numbers).astype(jnp.float32) for j in range(taps))
    y = sum(w[j].astype(jnp.float32) * part for j, part in enumerate(parts))
    return y.astype(x.dtype), kept(slice(length, None), numbers[:, -1:])
