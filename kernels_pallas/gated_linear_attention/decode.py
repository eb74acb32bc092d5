"""One decoding step of gated linear attention in plain XLA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from kernels_pallas.common import EPS

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def decode(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B Hv V"],
    log_g: Float[Array, "B Hg K"],
    state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]],
    *,
    normalize: bool,
) -> tuple[Float[Array, "B H V"], tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]]:
    """S <- e^g S + k v^T; z <- e^g z + k; o = S^T q / (z.q + eps), in float32.

    q, k [B, H, K]; v [B, Hv, V]; log_g [B, Hg, K] already bounded; state (S [B, H, K, V], z [B, H, K]) float32.
    Returns (o [B, H, V] in v.dtype, state). Grouped heads are broadcast, never repeated.
    """
    S, z = state
    batch, heads, features = q.shape
    value_heads, gate_heads = v.shape[1], log_g.shape[1]
    dtype, width = v.dtype, v.shape[-1]
    q, k, v, log_g = (x.astype(jnp.float32) for x in (q, k, v, log_g))

    decay = jnp.broadcast_to(jnp.exp(log_g)[:, :, None], (batch, gate_heads, heads // gate_heads, features))
    decay = decay.reshape(batch, heads, features)
    update = k.reshape(batch, value_heads, -1, features)[..., None] * v[:, :, None, None, :]
    S = decay[..., None] * S + update.reshape(batch, heads, features, width)
    z = decay * z + k
    o = jnp.sum(S * q[..., None], axis=-2)
    if normalize:
        o = o / (jnp.sum(z * q, axis=-1, keepdims=True) + EPS)
    return o.astype(dtype), (S, z)
