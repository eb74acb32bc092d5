"""Causal softmax attention: the teacher's, over full or sliding windows, with or without a key-value cache."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels_pallas import target_platform
from lawcat_jax.models import parallel, splash

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

SCORE_BUDGET_BYTES = 256 * 2**20
"""Largest float32 score matrix formed at once; longer sequences take the queries in blocks."""


def softmax_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S Hkv d"],
    v: Float[Array, "B S Hkv d"],
    *,
    start: Int[Array, " B"] | None = None,
    window: int | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H d"]:
    """softmax(q k^T / sqrt(d)) v with a causal mask; query head h reads kv head h // (H / Hkv).

    ``start`` None: keys and queries are the same tokens. Else key i stands at position i and query t at ``start[b] +
    t`` (a cache). ``window``: a query sees the last ``window`` positions, its own included (Mistral), or all (None).
    ``segments``: documents of packed rows, which do not see each other; only without ``start``, and in plain XLA.
    Output in q's dtype. Right padding needs no mask, because no valid token looks to the right, as long as k and v are
    finite there: a weight of 0 times NaN is NaN.
    """
    return parallel.softmax(functools.partial(_attention, window=window), q, k, v, start, segments)


def _attention(q, k, v, start, segments, key_segments, *, window: int | None):
    if start is None and segments is None and _cudnn_serves(q):
        span = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=span, implementation="cudnn")
    if start is None and segments is None and splash.serves(q):
        return splash.attention(q, k, v, window=window)
    batch, length, heads, width = q.shape
    offset = jnp.zeros((batch,), jnp.int32) if start is None else start
    positions = offset[:, None] + jnp.arange(length, dtype=jnp.int32)
    block = _query_block(batch * heads, length, k.shape[1])
    if block >= length:
        return _masked_attention(q, k, v, positions, window, segments, key_segments)

    @jax.checkpoint
    def attend(part):
        queries, places, owners = part
        return _masked_attention(queries, k, v, places, window, owners, key_segments)

    blocks = -(-length // block)
    padding = blocks * block - length
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(batch, blocks, block, heads, width), 1, 0)

    def cut(x):
        return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, padding))).reshape(batch, blocks, block), 1, 0)

    o = jax.lax.map(attend, (q, *jax.tree.map(cut, (positions, segments))))
    return jnp.moveaxis(o, 0, 1).reshape(batch, blocks * block, heads, width)[:, :length]


def _cudnn_serves(q: jax.Array) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[1] > 1 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and target_platform(q) == "cuda"


def _query_block(rows: int, length: int, keys: int) -> int:
    """The largest power of two of queries whose scores fit the budget (at least 16)."""
    fitting = max(16, SCORE_BUDGET_BYTES // (4 * rows * keys))
    return length if fitting >= length else 2 ** int(math.log2(fitting))


def _masked_attention(q, k, v, positions, window: int | None, segments, key_segments):
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)
    mask = keys <= positions[:, :, None]
    if window is not None:
        mask &= keys > positions[:, :, None] - window
    if segments is not None:
        mask &= segments[:, :, None] == key_segments[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
