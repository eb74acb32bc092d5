"""Token mixing on a mesh: kernels run per device, on that device's sequences, tokens and heads.

XLA partitions matrix products and elementwise operations by itself, but neither Pallas kernels nor a recurrence over
tokens. Here they are wrapped in ``jax.shard_map`` over the mesh in context (``jax.set_mesh`` or
``jax.sharding.use_abstract_mesh``): sequences over ``data`` and ``fsdp``, heads over ``tensor``, tokens over
``sequence`` with the context-parallel operations of ``kernels_pallas``. Without such a mesh, or on one device, nothing
is wrapped. What an axis does not divide stays whole on that axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import kernels_pallas as kernels

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

BATCH = ("data", "fsdp")
HEADS = "tensor"
TOKENS = "sequence"


class Split(NamedTuple):
    """Mesh axes (None: whole) over which sequences, tokens and heads are split."""

    batch: tuple[str, ...] | None
    tokens: str | None
    heads: str | None

    def rows(self) -> P:
        """Of arrays [B, T, heads, ...]."""
        return P(self.batch, self.tokens, self.heads)

    def ids(self) -> P:
        """Of arrays [B, T]."""
        return P(self.batch, self.tokens)


def mesh() -> AbstractMesh | None:
    """The mesh in context when there is something to split, else None (inside ``shard_map``, too)."""
    found = jax.sharding.get_abstract_mesh()
    if found.empty or found.size == 1 or not {*BATCH, HEADS, TOKENS} <= set(found.axis_names):
        return None
    return None if AxisType.Manual in found.axis_types else found


def split(batch: int, length: int, heads: tuple[int, ...] = (), least_tokens: int = 1) -> Split | None:
    """How arrays of these sizes lie on the mesh in context; None without one. ``heads``: all head counts of the arrays
    (1 is never split); ``least_tokens``: fewest tokens a device may hold.
    """
    found = mesh()
    if found is None:
        return None
    shards = found.shape[TOKENS]
    rows = found.shape[BATCH[0]] * found.shape[BATCH[1]]
    by_tokens = shards > 1 and length % shards == 0 and length // shards >= least_tokens
    by_heads = found.shape[HEADS] > 1 and all(count == 1 or count % found.shape[HEADS] == 0 for count in heads)
    return Split(
        batch=BATCH if rows > 1 and batch % rows == 0 else None,
        tokens=TOKENS if by_tokens else None,
        heads=HEADS if by_heads else None,
    )


def constrain(x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    """Hidden states [B, T, ...] split over sequences and tokens; the same array without a mesh."""
    found = split(x.shape[0], x.shape[1])
    return x if found is None else jax.lax.with_sharding_constraint(x, P(found.batch, found.tokens))


def whole_rows(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """An embedding table [V, D] with rows split over ``tensor`` at most: looking up rows that are cut over the axes of
    the batch would make XLA replicate the result first.
    """
    found = mesh()
    if found is None:
        return table
    rows = HEADS if table.shape[0] % found.shape[HEADS] == 0 else None
    return jax.lax.with_sharding_constraint(table, P(rows, None))


def _per_device(function: Callable, arguments: tuple, in_specs: tuple, out_specs: Any, *, check: bool = True) -> Any:
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check)(*arguments)


def softmax(
    attend: Callable,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S Hkv d"],
    v: Float[Array, "B S Hkv d"],
    start: Int[Array, " B"] | None,
    segments: Int[Array, "B T"] | None,
) -> Float[Array, "B T H d"]:
    """``attend(q, k, v, start, segments of q, segments of k)`` on every device's share; q [B, T, H, d], k and v
    [B, S, Hkv, d], ``start`` [B] or None, ``segments`` [B, T] or None (else S = T).

    With split tokens a device holds some queries and all keys (XLA gathers them), and its queries start further on.
    """
    found = split(*q.shape[:2], heads=(q.shape[2], k.shape[2]))
    if found is None:
        return attend(q, k, v, start, segments, segments)

    def local(q, k, v, start, segments, key_segments):
        if found.tokens:
            before = jax.lax.axis_index(found.tokens) * q.shape[1]
            start = (jnp.zeros((q.shape[0],), jnp.int32) if start is None else start) + before
        return attend(q, k, v, start, segments, key_segments)

    keys = P(found.batch, None, found.heads)
    in_specs = (found.rows(), keys, keys, P(found.batch), found.ids(), P(found.batch))
    # Kernels of other libraries do not say over which axes their results vary.
    return _per_device(local, (q, k, v, start, segments, segments), in_specs, found.rows(), check=False)


def lawcat_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T Hkv d"],
    v: Float[Array, "B T Hkv e"],
    gate_logits: Float[Array, "B T Hkv K"],
    conv_q: Float[Array, "H W d"],
    conv_k: Float[Array, "H W d"],
    phi: Float[Array, "H d f"],
    *,
    initial_state: tuple[Float[Array, "B H K e"], Float[Array, "B H K"]] | None = None,
    conv_state: tuple[Float[Array, "B W-1 H d"], Float[Array, "B W-1 Hkv d"]] | None = None,
    lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T H e"], tuple[Array, Array], tuple[Array, Array]]:
    """``kernels_pallas.lawcat_attention`` on the mesh in context; same arguments and results."""
    found = split(*q.shape[:2], heads=(q.shape[2], k.shape[2]), least_tokens=conv_q.shape[1])
    operation = kernels.lawcat_attention
    if found is not None and found.tokens:
        operation = functools.partial(kernels.context_parallel.lawcat_attention, axis_name=found.tokens)

    def local(q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths, segment_ids):
        known = {"lengths": lengths, "segment_ids": segment_ids}
        states = {"initial_state": initial_state, "conv_state": conv_state}
        return operation(q, k, v, gate_logits, conv_q, conv_k, phi, **states, **known, **options)

    arguments = (q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths, segment_ids)
    if found is None:
        return local(*arguments)
    rows, state, tail = found.rows(), P(found.batch, found.heads), P(found.batch, None, found.heads)
    taps = P(found.heads)
    in_specs = (rows, rows, rows, rows, taps, taps, taps, state, tail, P(found.batch), found.ids())
    return _per_device(local, arguments, in_specs, (rows, state, tail))


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv e"],
    log_g: Float[Array, "B T Hg K"],
    *,
    initial_state: tuple[Float[Array, "B H K e"], Float[Array, "B H K"]] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T H e"], tuple[Float[Array, "B H K e"], Float[Array, "B H K"]]]:
    """``kernels_pallas.gated_linear_attention`` on the mesh in context; same arguments and results."""
    found = split(*q.shape[:2], heads=tuple(x.shape[2] for x in (q, v, log_g)))
    operation = kernels.gated_linear_attention
    if found is not None and found.tokens:
        operation = functools.partial(kernels.context_parallel.gated_linear_attention, axis_name=found.tokens)

    def local(q, k, v, log_g, initial_state, segment_ids):
        return operation(q, k, v, log_g, initial_state=initial_state, segment_ids=segment_ids, **options)

    if found is None:
        return local(q, k, v, log_g, initial_state, segment_ids)
    specs = tuple(P(found.batch, found.tokens, found.heads if x.shape[2] > 1 else None) for x in (q, k, v, log_g))
    state = P(found.batch, found.heads if q.shape[2] > 1 else None)
    in_specs = (*specs, state, found.ids())
    return _per_device(local, (q, k, v, log_g, initial_state, segment_ids), in_specs, (specs[0], state))
