"""The teacher's causal attention on TPUs through JAX's splash attention kernel, which forms no score matrix."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kernels_pallas import target_platform

if TYPE_CHECKING:
    from jaxtyping import Array, Float

LANES = 128
BLOCK = 512
"""Most queries and keys of one tile."""


def serves(q: Float[Array, "B T H d"]) -> bool:
    """Whether the kernel takes these queries [B, T, H, d]: on a TPU, and long enough to fill its tiles."""
    return target_platform(q) == "tpu" and q.shape[1] >= LANES


def attention(
    q: Float[Array, "B T H d"], k: Float[Array, "B T Hkv d"], v: Float[Array, "B T Hkv d"], *, window: int | None
) -> Float[Array, "B T H d"]:
    """softmax(q k^T / sqrt(d)) v, causal, over the last ``window`` positions or all (None); in q's dtype."""
    length = q.shape[1]
    padded = -(-length // LANES) * LANES
    kernel = _kernel(q.shape[2], padded, window)

    def heads_first(x):  # padding stands to the right, where causality hides it
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    scale = q.shape[-1] ** -0.5
    o = jax.vmap(kernel)(*map(heads_first, ((q * scale).astype(q.dtype), k, v)))
    return o.swapaxes(1, 2)[:, :length]


def _kernel(heads: int, length: int, window: int | None) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (BLOCK, BLOCK // 2, LANES) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = dict.fromkeys((f"block_{name}" for name in names), block)
    sizes = splash.BlockSizes(**blocks)
    make = functools.partial(splash.make_splash_mha, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return make(mask=masks.MultiHeadMask([one] * heads))
