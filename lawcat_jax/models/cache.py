"""Decoding caches: a key-value buffer for softmax layers, and what the recurrent layers keep of the past.

A cache is a plain pytree: ``position`` [B] int32 (tokens seen by each sequence), ``softmax`` {k, v} [N, B, S, Hkv, d]
for the N softmax layers, ``linear`` the stacked states of the M linearised layers. Sequences of one batch may stand at
different positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Cache = dict[str, Any]


def empty_kv(
    layers: int, batch: int, length: int, kv_heads: int, width: int, dtype
) -> dict[str, Float[Array, "N B S Hkv d"]]:
    """An empty key-value buffer for ``layers`` softmax layers and ``length`` positions."""
    shape = (layers, batch, length, kv_heads, width)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def write_kv(
    buffer: Float[Array, "N B S Hkv d"], layer: Int[Array, ""], start: Int[Array, " B"], rows: Float[Array, "B T Hkv d"]
) -> Float[Array, "N B S Hkv d"]:
    """Put ``rows`` at positions start .. start + T - 1 of one layer.

    Rows of padding land beyond the valid positions, where causality hides them until they are overwritten; rows beyond
    the buffer are dropped.
    """
    batch, length = rows.shape[:2]
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    sequences = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return buffer.at[layer, sequences, positions].set(rows.astype(buffer.dtype), mode="drop", unique_indices=True)


def extend(rows: Float[Array, "B R ..."] | None, x: Float[Array, "B T ..."], count: int) -> Float[Array, "B R+T ..."]:
    """[rows ; x] along time, with ``count`` rows of zeros for the start of a sequence (``rows`` None)."""
    if rows is None:
        rows = jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype)
    return jnp.concatenate([rows.astype(x.dtype), x], axis=1)


def last_rows(
    extended: Float[Array, "B R+T ..."], count: int, lengths: Int[Array, " B"] | None
) -> Float[Array, "B R ..."]:
    """The last ``count`` valid rows of what :func:`extend` returned, where only ``lengths`` of the new tokens are
    valid.
    """
    if lengths is None:
        return extended[:, extended.shape[1] - count :]
    index = lengths[:, None] + jnp.arange(count)
    return jnp.take_along_axis(extended, index.reshape(*index.shape, *(1,) * (extended.ndim - 2)), axis=1)
