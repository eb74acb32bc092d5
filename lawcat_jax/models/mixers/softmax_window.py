"""Softmax over a window (and the first tokens), as the numerator and denominator of a joint softmax-plus-linear attention.

A window of w tokens is *sliding* (the last w tokens, the current one included) or *terraced* (the current block of w
tokens up to the current one, and the whole block before: w + 1 to 2 w tokens; blocks are counted from the start of the
sequence). The state keeps constant size: the last w (terraced: 2 w) rotated keys and their values, and those of the
first ``sinks`` tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.models import parallel
from lawcat_jax.models.cache import extend, last_rows
from lawcat_jax.models.layers import Context
from lawcat_jax.models.mixers.mixer import Rules

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    WindowState = dict[str, Array]

WINDOW_STATE_RULES: Rules = {r"window/\w+": P(parallel.BATCH, None, parallel.HEADS)}
"""How the arrays of :func:`empty_window`, kept under "window" in a mixer's state, are split over the mesh."""

BLOCK = 64
"""Queries that share one slice of keys: a multiple of this that is no smaller than the rows kept."""


class WindowTerms(NamedTuple):
    """sum_s e^(q.k_s / sqrt(d) - m) v_s and sum_s e^(...), m the largest score of the query; float32."""

    numerator: Float[Array, "B T H d"]
    denominator: Float[Array, "B T H"]


class Extended(NamedTuple):
    """Rotated keys and values of this call behind the R = :func:`kept_rows` before it: row i stands at position
    start - R + i.
    """

    k: Float[Array, "B R+T Hkv d"]
    v: Float[Array, "B R+T Hkv d"]


def kept_rows(attention: AttentionConfig) -> int:
    """R, the tokens before the current one that the state keeps: w, or 2 w where the window is terraced."""
    return attention.window_size * (2 if attention.window_kind == "terraced" else 1)


def empty_window(config: ModelConfig, attention: AttentionConfig, batch: int, dtype) -> WindowState:
    """The window's state before the first token: k, v [B, R, Hkv, d] and sink_k, sink_v [B, sinks, Hkv, d]."""
    tail = (config.num_kv_heads, config.head_dim)
    recent, sinks = (batch, kept_rows(attention), *tail), (batch, attention.sinks, *tail)
    return {
        "k": jnp.zeros(recent, dtype),
        "v": jnp.zeros(recent, dtype),
        "sink_k": jnp.zeros(sinks, dtype),
        "sink_v": jnp.zeros(sinks, dtype),
    }


def window_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T Hkv d"],
    v: Float[Array, "B T Hkv e"],
    attention: AttentionConfig,
    context: Context,
    state: WindowState | None,
    *,
    sink_q: Float[Array, "B T H d"] | None = None,
) -> tuple[WindowTerms, Extended, WindowState]:
    """Terms over the window and the first ``sinks`` tokens; q and k already rotated. ``sink_q`` are the queries that the
    sinks meet where they are not q: those of :func:`sink_positions`.

    Memory is linear in T: queries go in blocks, each with its own slice of keys. Still the scores of all layers together
    are larger than everything else of a training step: the mixers call this under ``jax.checkpoint``, whatever
    ``stage.remat`` is. Returns also the extended rows (for what leaves the window) and the next state.
    """
    size, sinks = kept_rows(attention), attention.sinks
    if sinks and context.segments is not None:
        raise UserError("attention.sinks: packed rows (data.pack) have no sinks; set sinks=0 or data.pack=False")
    state = state or {}
    rows = Extended(extend(state.get("k"), k, size), extend(state.get("v"), v, size))
    new_state = {name: last_rows(x, size, context.lengths) for name, x in rows._asdict().items()}
    for name, x in (("sink_k", k), ("sink_v", v)):
        new_state[name] = _update_sinks(state.get(name), x, sinks, context)
    first = Extended(new_state["sink_k"], new_state["sink_v"])
    terms = _terms(attention, q, sink_q, rows, first, context)
    return terms, rows, new_state


def sink_positions(attention: AttentionConfig, context: Context) -> Int[Array, "B T"]:
    """Where a query stands among the tokens that it sees, counted from 0, as StreamingLLM (arXiv 2309.17453) counts: its
    own position until a token has left the window, from then on ``sinks`` plus the tokens of the window before it.
    """
    positions, size = context.positions(), attention.window_size
    before = size - 1
    if attention.window_kind == "terraced":
        before = positions - (positions // size - 1) * size
    return jnp.minimum(positions, attention.sinks + before)


def _terms(
    attention: AttentionConfig, q: Any, sink_q: Any, rows: Extended, first: Extended, context: Context
) -> WindowTerms:
    """The terms of :func:`window_attention` over the extended rows and the sinks ``first``."""
    size, sinks = kept_rows(attention), attention.sinks
    batch, length, heads, width = q.shape
    kv_heads = rows.k.shape[2]
    cut = _Slices(length, size)
    block, blocks = cut.block, cut.blocks

    def grouped(queries: Any) -> Any:
        return cut.queries(queries).reshape(batch, blocks, block, kv_heads, heads // kv_heads, width)

    keys, values = (cut.rows(x) for x in rows)
    mask, _ = _visible(cut, attention, context)
    # Products of float32 arrays in full precision; those of bfloat16 arrays are exact in float32 anyway.
    dots = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    queries = grouped(q)
    scores = jnp.einsum("bnikgd,bnjkd->bnkgij", queries, keys, **dots)
    allowed = mask
    if sinks:
        queries = queries if sink_q is None else grouped(sink_q)
        sink_scores = jnp.einsum("bnikgd,bskd->bnkgis", queries, first.k, **dots)
        reachable = jnp.arange(sinks) <= cut.queries(context.positions())[..., None]  # [B, n, i, s]
        scores = jnp.concatenate([scores, sink_scores], axis=-1)
        allowed = jnp.concatenate([mask, reachable], axis=-1)
    weights = jnp.where(allowed[:, :, None, None], scores * width**-0.5, -jnp.inf)
    weights = jnp.exp(weights - jnp.max(weights, axis=-1, keepdims=True))
    numerator = jnp.einsum("bnkgij,bnjkd->bnikgd", weights[..., : block + size], values.astype(jnp.float32), **dots)
    if sinks:
        sink_v = first.v.astype(jnp.float32)
        numerator += jnp.einsum("bnkgis,bskd->bnikgd", weights[..., block + size :], sink_v, **dots)
    denominator = jnp.moveaxis(jnp.sum(weights, axis=-1), -1, 2)
    return WindowTerms(
        numerator.reshape(batch, blocks * block, heads, -1)[:, :length],
        denominator.reshape(batch, blocks * block, heads)[:, :length],
    )


class _Slices:
    """T queries in blocks, each with its slice of the R + T rows that :class:`Extended` holds."""

    def __init__(self, length: int, kept: int):
        self.block = min(-(-max(kept, 1) // BLOCK) * BLOCK, length)
        self.blocks = -(-length // self.block)
        self.kept = kept

    def queries(self, x: Float[Array, "B T ..."]) -> Float[Array, "B n i ..."]:
        """Blocks of i queries, the last one filled up with zeros."""
        return self._cut(x, self.blocks)

    def rows(self, x: Float[Array, "B R+T ..."]) -> Float[Array, "B n j ..."]:
        """The slice of j = R + i rows of each block: query number a of a block is row R + a of its slice."""
        if self.blocks == 1:
            return x[:, None]
        pieces = self._cut(x, self.blocks + 1)  # R <= i: a slice is one of these and the beginning of the next
        return jnp.concatenate([pieces[:, :-1], pieces[:, 1:, : self.kept]], axis=2)

    def _cut(self, x, count: int):
        x = jnp.pad(x, ((0, 0), (0, count * self.block - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], count, self.block, *x.shape[2:])


def _visible(
    cut: _Slices, attention: AttentionConfig, context: Context
) -> tuple[Bool[Array, "B n i j"], Bool[Array, "B n i j"]]:
    """Which rows of its slice each query has in its window, and which of the last R tokens lie before that (of a
    terraced window); sinks and what would be before the start of the sequence are in neither.
    """
    size, kept = attention.window_size, cut.kept
    distance = jnp.arange(cut.block)[:, None] + kept - jnp.arange(cut.block + kept)
    # Counted within a document, so that rows of the documents before have negative positions.
    places = cut.queries(context.positions())
    positions = places[..., None] - distance
    # The current token must stay visible in padded rows too, or their empty softmax would be NaN.
    band = (distance >= 0) & (distance < kept) & (positions >= attention.sinks)
    if attention.window_kind == "sliding":
        return band, jnp.zeros_like(band)
    inside = positions >= (places[..., None] // size - 1) * size
    return band & inside, band & ~inside


def linear_before_window(
    phi_q: Float[Array, "B T H K"],
    phi_k: Float[Array, "B R+T H K"],
    v: Float[Array, "B R+T Hkv d"],
    attention: AttentionConfig,
    context: Context,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]:
    """Numerator and denominator of linear attention without decay over those of the last R = 2 w tokens that lie before
    a terraced window, float32; ``phi_k`` are the features of the keys that :class:`Extended` holds.

    A recurrence that takes in one token per step cannot follow a window that moves by w tokens at once. It takes in
    token t - 2 w at token t, and this is the rest.
    """
    batch, length, heads, _ = phi_q.shape
    cut = _Slices(length, kept_rows(attention))
    _, before = _visible(cut, attention, context)
    dots = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    scores = jnp.einsum("bnihc,bnjhc->bnhij", cut.queries(phi_q), cut.rows(phi_k), **dots)
    scores = jnp.where(before[:, :, None], scores, 0.0)
    values = cut.rows(v.astype(jnp.float32))
    grouped = scores.reshape(batch, cut.blocks, v.shape[2], -1, *scores.shape[3:])
    numerator = jnp.einsum("bnkgij,bnjkd->bnikgd", grouped, values, **dots)
    numerator = numerator.reshape(batch, cut.blocks * cut.block, heads, -1)
    denominator = jnp.moveaxis(jnp.sum(scores, axis=-1), 2, -1).reshape(batch, -1, heads)
    return numerator[:, :length], denominator[:, :length]


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
    """Operations per token of the softmax over window and sinks; a terraced window holds 1.5 w tokens on average."""
    tokens = attention.window_size * (1.5 if attention.window_kind == "terraced" else 1)
    return 4.0 * config.num_heads * config.head_dim * (tokens + attention.sinks)


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
