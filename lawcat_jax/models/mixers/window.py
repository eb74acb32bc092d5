"""Softmax over a sliding window (and the first tokens), as the numerator and denominator of a joint softmax-plus-linear
attention.

The state keeps constant size: the last w rotated keys and their values, and those of the first ``sinks`` tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models import parallel
from lawcat_jax.models.cache import extend, last_rows
from lawcat_jax.models.layers import Context
from lawcat_jax.models.mixers.mixer import Rules

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    WindowState = dict[str, Array]

WINDOW_STATE_RULES: Rules = {r"window/\w+": P(parallel.BATCH, None, parallel.HEADS)}
"""How the arrays of :func:`empty_window`, kept under "window" in a mixer's state, are split over the mesh."""

BLOCK = 64
"""Fewest queries that share one slice of keys."""


class WindowTerms(NamedTuple):
    """sum_s e^(q.k_s / sqrt(d) - m) v_s and sum_s e^(...), m the largest score of the query; float32."""

    numerator: Float[Array, "B T H d"]
    denominator: Float[Array, "B T H"]


class Extended(NamedTuple):
    """Rotated keys and values of this call behind the w rows before it: row i stands at position start - w + i."""

    k: Float[Array, "B w+T Hkv d"]
    v: Float[Array, "B w+T Hkv d"]


def empty_window(config: ModelConfig, attention: AttentionConfig, batch: int, dtype) -> WindowState:
    """The window's state before the first token: k, v [B, w, Hkv, d] and sink_k, sink_v [B, sinks, Hkv, d]."""
    tail = (config.num_kv_heads, config.head_dim)
    recent, sinks = (batch, attention.window_size, *tail), (batch, attention.sinks, *tail)
    return {
        "k": jnp.zeros(recent, dtype),
        "v": jnp.zeros(recent, dtype),
        "sink_k": jnp.zeros(sinks, dtype),
        "sink_v": jnp.zeros(sinks, dtype),
    }


def window_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T Hkv d"],
    v: Float[Array, "B T Hkv d"],
    attention: AttentionConfig,
    context: Context,
    state: WindowState | None,
) -> tuple[WindowTerms, Extended, WindowState]:
    """Terms over the last ``window_size`` tokens (the current one included) and the first ``sinks``; q and k already
    rotated.

    Memory is linear in T: queries go in blocks, each with its own slice of keys. Returns also the extended rows (for
    what leaves the window) and the next state.
    """
    size, sinks = attention.window_size, attention.sinks
    state = state or {}
    rows = Extended(extend(state.get("k"), k, size), extend(state.get("v"), v, size))
    new_state = {name: last_rows(x, size, context.lengths) for name, x in rows._asdict().items()}
    for name, x in (("sink_k", k), ("sink_v", v)):
        new_state[name] = _update_sinks(state.get(name), x, sinks, context)

    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    block = min(max(size, BLOCK), length)
    blocks = -(-length // block)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, blocks * block - length), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    grouped = pad(q).reshape(batch, blocks, block, kv_heads, heads // kv_heads, width)
    index = jnp.arange(blocks)[:, None] * block + jnp.arange(block + size)
    keys, values = (jnp.take(pad(x), index, axis=1) for x in rows)
    mask = _band(index, block, size, sinks, context)

    dots = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    scores = jnp.einsum("bnikgd,bnjkd->bnkgij", grouped, keys, **dots)
    sink_scores = jnp.einsum("bnikgd,bskd->bnkgis", grouped, new_state["sink_k"], **dots)
    positions = context.start[:, None, None] + index[:, :block]
    reachable = jnp.arange(sinks) <= positions[..., None]  # [B, n, i, s]
    everything = jnp.concatenate([scores, sink_scores], axis=-1) * width**-0.5
    allowed = jnp.concatenate([mask, reachable], axis=-1)[:, :, None, None]
    weights = jnp.where(allowed, everything, -jnp.inf)
    weights = jnp.exp(weights - jnp.max(weights, axis=-1, keepdims=True))
    recent, first = weights[..., : block + size], weights[..., block + size :]
    numerator = jnp.einsum("bnkgij,bnjkd->bnikgd", recent, values.astype(jnp.float32), **dots)
    numerator += jnp.einsum("bnkgis,bskd->bnikgd", first, new_state["sink_v"].astype(jnp.float32), **dots)
    denominator = jnp.moveaxis(jnp.sum(weights, axis=-1), -1, 2)
    terms = WindowTerms(
        numerator.reshape(batch, blocks * block, heads, width)[:, :length],
        denominator.reshape(batch, blocks * block, heads)[:, :length],
    )
    return terms, rows, new_state


def _band(index, block: int, size: int, sinks: int, context: Context) -> Bool[Array, "B n i j"]:
    """Which rows of its slice each query sees: the last ``size`` up to itself, from the start of the sequence, sinks
    excluded.
    """
    distance = jnp.arange(block)[:, None] + size - jnp.arange(block + size)
    positions = context.start[:, None, None] - size + index
    # The current token must stay visible in padded rows too, or their empty softmax would be NaN.
    return ((distance >= 0) & (distance < size))[None, None] & (positions >= sinks)[:, :, None, :]


def _update_sinks(old, x, sinks: int, context: Context):
    """Put those of the new rows that stand at positions < sinks into the buffer of the first tokens."""
    if sinks == 0:
        return x[:, :0]
    source = jnp.arange(sinks) - context.start[:, None]  # row of this call that holds each sink
    limit = x.shape[1] if context.lengths is None else context.lengths[:, None]
    taken = jnp.take_along_axis(x, jnp.clip(source, 0, x.shape[1] - 1)[:, :, None, None], axis=1)
    fresh = ((source >= 0) & (source < limit))[:, :, None, None]
    return jnp.where(fresh, taken, jnp.zeros_like(taken) if old is None else old.astype(x.dtype))


def window_flops(config: ModelConfig, attention: AttentionConfig) -> float:
    """Operations per token of the softmax over window and sinks."""
    return 4.0 * config.num_heads * config.head_dim * (attention.window_size + attention.sinks)


def joint(
    window: WindowTerms,
    linear_numerator: Float[Array, "B T H d"],
    linear_denominator: Float[Array, "B T H"],
    factor: Float[Array, " H"],
    *,
    affine: bool,
) -> Float[Array, "B T H d"]:
    """One denominator over both branches: [s W + l L v] / [s W + l L], s = sigmoid(factor), l = 1 or (affine) 1 - s;
    float32.
    """
    share = jax.nn.sigmoid(factor)
    rest = 1 - share if affine else jnp.ones_like(share)
    numerator = share[:, None] * window.numerator + rest[:, None] * linear_numerator
    denominator = share * window.denominator + rest * linear_denominator
    return numerator / (denominator + 1e-10)[..., None]
