"""The operations on sequences sharded over a mesh axis, to be called inside ``jax.shard_map``.

Every device holds T / P consecutive tokens, in the order of the axis. A shard's effect on the state is its summary
(L = sum of log_g, S, z), and summaries compose as (e^(L_a + L_b), e^L_b S_a + S_b, e^L_b z_a + z_b), so one exchange of
summaries gives each shard the state of all tokens before it, exactly. Fewer than 8 shards gather all summaries at once
(LASP-2, arXiv 2502.07563); more use a shift and log2 P permutations (Hillis and Steele). The backward pass does the
same from the right. The convolution fetches the W - 1 rows before the shard from its left neighbour.

Packed documents (``segment_ids``): a shard in which a document begins, at its first token or later, hands on nothing of
what came before it, so the decay of its summary is 0 and its S and z are those of its last document. The state before it
reaches the tokens of its first document only, and none of them where that document begins with the shard.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import dispatch
from kernels_pallas.causal_conv1d import xla as conv_xla
from kernels_pallas.causal_conv1d.checks import check_conv
from kernels_pallas.checks import check_bound, check_flag, check_normalizer, check_segments, check_state
from kernels_pallas.common import match_varying_all, segment_numbers, segment_starts, valid_tokens, without_padding
from kernels_pallas.gated_linear_attention import scan
from kernels_pallas.gated_linear_attention.checks import check_qkvg
from kernels_pallas.gated_linear_attention.vjp import OP, AttentionSpec, attention_spec, bounded, restarted
from kernels_pallas.lawcat_attention import xla as lawcat_xla
from kernels_pallas.lawcat_attention.checks import check_layer
from kernels_pallas.lawcat_attention.vjp import next_conv_state

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

GATHER_BELOW = 8
"""With fewer shards than this one all-gather moves less than log2 P permutations."""


class _Documents(NamedTuple):
    """The documents of a shard's tokens."""

    numbers: Int[Array, "B T"]
    """Of :func:`kernels_pallas.common.segment_numbers`: 0 in the shard's first document."""

    fresh: Bool[Array, " B"]
    """Whether that one begins with the shard, so that nothing before the shard belongs to it."""

    def of_last(self, numbers: Int[Array, "B R"]) -> Bool[Array, "B R"]:
        """Which of these numbers are the shard's last document's."""
        return numbers == self.numbers[:, -1:]

    def starts(self) -> Bool[Array, "B T"]:
        """With which tokens a document begins."""
        return segment_starts(self.numbers).at[:, 0].set(self.fresh)

    def passing(self) -> Bool[Array, " B"]:
        """Whether what is before the shard and what is after it may belong to one document."""
        return ~self.fresh & (self.numbers[:, -1] == 0)


def _documents(segment_ids, valid, axis_name: str, size: int, index) -> _Documents:
    """``valid`` [B, T] bool or None: which tokens are not padding."""
    first, last = segment_ids[:, 0], segment_ids[:, -1]
    before = lax.ppermute(last, axis_name, [(i, i + 1) for i in range(size - 1)])
    fresh = (index > 0) & (first != before)
    return _Documents(segment_numbers(segment_ids, valid), fresh if valid is None else fresh & valid[:, 0])


def _where(keep: jax.Array | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays [B, ...] with zeros where ``keep`` [B] is False; None is all."""
    if keep is None:
        return arrays
    return tuple(jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0) for x in arrays)


def _exclusive(decay, S, z, axis_name: str, *, reverse: bool = False):
    """(S, z) of all shards before this one, or of all after it when ``reverse``, from the summaries of the shards.

    The first shard (the last when ``reverse``) gets zeros."""
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    if size == 1:
        return jnp.zeros_like(S), jnp.zeros_like(z)
    if size < GATHER_BELOW:
        decays, Ss, zs = (lax.all_gather(x, axis_name) for x in (decay, S, z))
        S, z = jnp.zeros_like(S), jnp.zeros_like(z)
        for shard in range(size - 1, 0, -1) if reverse else range(size - 1):
            use = shard > index if reverse else shard < index
            S = jnp.where(use, decays[shard][..., None] * S + Ss[shard], S)
            z = jnp.where(use, decays[shard] * z + zs[shard], z)
        return S, z

    def shifted(x, distance: int):
        pairs = [(i, i + distance) for i in range(size - distance)]
        return lax.ppermute(x, axis_name, [(b, a) for a, b in pairs] if reverse else pairs)

    # A device without a sender receives zeros: a summary that adds nothing, and whose decay only meets states that are
    # zero.
    decay, S, z = (shifted(x, 1) for x in (decay, S, z))
    distance = 1
    while distance < size - 1:
        decay_a, S_a, z_a = (shifted(x, distance) for x in (decay, S, z))
        S, z, decay = decay[..., None] * S_a + S, decay * z_a + z, decay * decay_a
        distance *= 2
    return S, z


def _spread(L: jax.Array, heads: int) -> jax.Array:
    """e^L for every query head [B, H, K], from L [B, Hg, K]: small, so that the repeat costs nothing."""
    return jnp.repeat(jnp.exp(L), heads // L.shape[1], axis=1)


def _run(
    spec: AttentionSpec, axis_name: str, q, k, v, log_g, S0, z0, documents: _Documents | None, save_residuals: bool
):
    backend = dispatch.forward_module(OP, spec.implementation)
    summary = getattr(backend, "segment_state", scan.segment_state)
    # Keys of zero keep earlier documents out of the summary: the gates, and their bound, stay as they are.
    (last_k,) = without_padding(None if documents is None else documents.of_last(documents.numbers), k)
    L, S, z = summary(last_k, v, log_g, lower_bound=spec.lower_bound)
    decay = _spread(L, q.shape[2])
    if documents is not None:
        (decay,) = _where(documents.passing(), decay)
    S, z = _exclusive(decay, S + decay[..., None] * S0, z + decay * z0, axis_name)
    S, z = _where(None if documents is None else ~documents.fresh, S, z)
    options = {"normalize": spec.normalize, "lower_bound": spec.lower_bound, "save_residuals": save_residuals}
    if documents is not None and dispatch.takes_segments(spec.implementation):
        options["numbers"] = documents.numbers
    elif documents is not None:
        log_g, options["lower_bound"] = restarted(log_g, documents.numbers), None
    o, state, residuals = backend.forward(q, k, v, log_g, (S + S0, z + z0), **options)
    return (o, state), (residuals, decay, documents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sharded(spec: AttentionSpec, axis_name: str, q, k, v, log_g, S0, z0, documents):
    """(o, the state at the end of this shard). S0 and z0 are added to the state at its start; zeros but on the first."""
    return _run(spec, axis_name, q, k, v, log_g, S0, z0, documents, False)[0]


def _sharded_forward(spec: AttentionSpec, axis_name: str, q, k, v, log_g, S0, z0, documents):
    return _run(spec, axis_name, q, k, v, log_g, S0, z0, documents, True)


def _sharded_backward(spec: AttentionSpec, axis_name: str, residuals, cotangents):
    residuals, decay, documents = residuals
    do, (dS, dz) = cotangents
    backend = dispatch.backward_module(OP, spec.implementation)
    options, starts = {"normalize": spec.normalize, "lower_bound": spec.lower_bound}, None
    if documents is not None and not dispatch.takes_segments(spec.implementation):
        options["lower_bound"], starts = None, documents.starts()[:, :, None, None]
    if hasattr(backend, "segment_dstate"):
        S, z = backend.segment_dstate(residuals, do, **options)
    else:
        # Only the cotangent of the initial state is used: in plain XLA the rest of this pass is dead code.
        *_, (S, z) = backend.backward(residuals, do, (jnp.zeros_like(dS), jnp.zeros_like(dz)), **options)
    S, z = _where(None if documents is None else ~documents.fresh, S, z)
    S, z = _exclusive(decay, S + decay[..., None] * dS, z + decay * dz, axis_name, reverse=True)
    *grads, dlog_g, (dS0, dz0) = backend.backward(residuals, do, (dS + S, dz + z), **options)
    if starts is not None:  # those gates were replaced by one that forgets everything
        dlog_g = jnp.where(starts, 0, dlog_g)
    return *grads, dlog_g, dS0, dz0, None


_sharded.defvjp(_sharded_forward, _sharded_backward)


def _check_axis(axis_name: Any) -> tuple[int, jax.Array]:
    try:
        return lax.axis_size(axis_name), lax.axis_index(axis_name)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            f"axis_name: {axis_name!r} is not an axis of an enclosing jax.shard_map; call this inside one"
        ) from None


def _from_shard(x: jax.Array, axis_name: str, here: jax.Array) -> jax.Array:
    """On every shard the value of the one where ``here`` is True, for all of x or for each row [B, ...]."""
    here = here.reshape(-1, *(1,) * (x.ndim - 1)) if here.ndim else here
    return lax.psum(jnp.where(here, x, jnp.zeros_like(x)), axis_name)


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    log_g: Float[Array, "B T Hg K"],
    *,
    axis_name: str,
    initial_state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]] | None = None,
    normalize: bool = True,
    gate_lower_bound: float | None = -1.25,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]]:
    """``kernels_pallas.gated_linear_attention`` of a sequence whose T is sharded over mesh axis ``axis_name``.

    The arrays, ``segment_ids`` among them, are this shard's tokens; a document may span several shards.
    initial_state (of the whole sequence) and the returned state (after its last token) are the same on every shard of
    the axis. Raises ValueError naming the argument, also when called outside ``jax.shard_map``.
    """
    check_qkvg(q, k, v, log_g, 4)
    check_bound(gate_lower_bound)
    check_flag("normalize", normalize)
    if initial_state is not None:
        check_state(initial_state, q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    size, index = _check_axis(axis_name)
    documents = None
    if segment_ids is not None:
        check_segments(segment_ids, *q.shape[:2])
        documents = _documents(segment_ids, None, axis_name, size, index)
    options = {"normalize": normalize, "gate_lower_bound": gate_lower_bound, "implementation": implementation}
    return _attend(q, k, v, log_g, initial_state, documents, axis_name, **options)


def _attend(
    q,
    k,
    v,
    log_g,
    initial_state,
    documents: _Documents | None,
    axis_name: str,
    *,
    normalize: bool,
    gate_lower_bound: float | None,
    implementation: str | None,
):
    """:func:`gated_linear_attention` of arguments that have been checked."""
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    batch, _, heads, features = q.shape
    shapes = ((batch, heads, features, v.shape[3]), (batch, heads, features))
    if initial_state is None:
        start = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    else:
        start = tuple(jnp.where(index == 0, x, 0.0) for x in initial_state)
    name = dispatch.implementation_for(
        q,
        k,
        v,
        log_g,
        normalize=normalize,
        gate_lower_bound=gate_lower_bound,
        segments=documents is not None,
        implementation=implementation,
    )
    spec = attention_spec(name, normalize, gate_lower_bound)
    arrays = (q, k, v, bounded(log_g, gate_lower_bound), *start, documents)
    *arrays, _ = match_varying_all(*arrays, index)
    out: Any = _sharded(spec, axis_name, *arrays)  # custom_vjp hides what it returns
    o, (S, z) = out
    S, z = (_from_shard(x, axis_name, index == size - 1) for x in (S, z))
    return o, (S, z)


def _rows_before(
    x: jax.Array, initial: jax.Array | None, rows: int, documents: _Documents | None, axis_name: str, name: str
) -> jax.Array:
    """The ``rows`` rows before this shard: the left neighbour's last ones, and ``initial`` (or zeros) on the first
    shard; zeros for those of another document than the one that goes on in this shard."""
    size, index = _check_axis(axis_name)
    if size > 1 and x.shape[1] < rows:
        raise ValueError(f"{name}: a shard must hold at least {rows} tokens for the convolution, got {x.shape[1]}")
    if size == 1:
        before = jnp.zeros_like(x[:, :1], shape=(x.shape[0], rows, *x.shape[2:]))
    else:
        kept = x[:, x.shape[1] - rows :]
        if documents is not None:
            (kept,) = without_padding(documents.of_last(documents.numbers[:, x.shape[1] - rows :]), kept)
        before = lax.ppermute(kept, axis_name, [(i, i + 1) for i in range(size - 1)])
        if documents is not None:
            (before,) = _where(~documents.fresh, before)
    return before if initial is None else jnp.where(index == 0, initial.astype(x.dtype), before)


def causal_conv1d(
    x: Float[Array, "B T *C"],
    w: Float[Array, "W ..."],
    *,
    axis_name: str,
    initial_state: Float[Array, "B W-1 *C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B W-1 *C"]]:
    """``kernels_pallas.causal_conv1d`` of a sequence sharded over ``axis_name``; the rows returned are
    the last ones of the whole sequence. ``segment_ids`` are those of this shard's tokens.

    Every shard needs at least W - 1 tokens. Raises ValueError naming the argument.
    """
    check_conv(x, w, initial_state)
    size, index = _check_axis(axis_name)
    documents = None
    if segment_ids is not None:
        check_segments(segment_ids, *x.shape[:2])
        documents = _documents(segment_ids, None, axis_name, size, index)
    before = _rows_before(x, initial_state, w.shape[0] - 1, documents, axis_name, "x")
    y, tail = conv_xla.causal_conv1d(x, w, before, None if documents is None else documents.numbers)
    return y, _from_shard(tail, axis_name, index == size - 1)


def lawcat_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T Hkv d"],
    v: Float[Array, "B T Hkv V"],
    gate_logits: Float[Array, "B T Hkv K"],
    conv_q: Float[Array, "H W d"],
    conv_k: Float[Array, "H W d"],
    phi: Float[Array, "H d f"],
    *,
    axis_name: str,
    initial_state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]] | None = None,
    conv_state: tuple[Float[Array, "B W-1 H d"], Float[Array, "B W-1 Hkv d"]] | None = None,
    normalize: bool = True,
    gate_normalizer: float = 16.0,
    gate_lower_bound: float | None = -1.25,
    lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    zero_padding: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Array, Array], tuple[Array, Array]]:
    """``kernels_pallas.lawcat_attention`` of a sequence sharded over ``axis_name``.

    ``lengths`` counts tokens of the whole sequence, ``segment_ids`` are those of this shard's tokens; states are the
    whole sequence's, equal on every shard. Every shard needs at least W - 1 tokens. Raises ValueError naming the
    argument.
    """
    size, index = _check_axis(axis_name)
    check_layer(q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths, size)
    check_bound(gate_lower_bound)
    check_flag("normalize", normalize)
    check_flag("zero_padding", zero_padding)
    check_normalizer(gate_normalizer)
    length = q.shape[1]
    valid = local_lengths = documents = None
    ends_here = index == size - 1
    if lengths is not None:
        lengths = jnp.clip(lengths.astype(jnp.int32), 0, size * length)
        valid = valid_tokens(lengths, length, index * length)
        local_lengths = jnp.clip(lengths - index * length, 0, length)
        ends_here = index == jnp.maximum(lengths - 1, 0) // length
    if segment_ids is not None:
        check_segments(segment_ids, *q.shape[:2])
        documents = _documents(segment_ids, valid, axis_name, size, index)
    numbers = None if documents is None else documents.numbers
    q, k, v, gate_logits = without_padding(valid, q, k, v, gate_logits)
    initial = conv_state or (None, None)
    before_q, before_k = (
        _rows_before(x, tail, conv_q.shape[1] - 1, documents, axis_name, name)
        for name, x, tail in zip("qk", (q, k), initial, strict=True)
    )
    before = (before_q, before_k)
    features_q, features_k, log_g = lawcat_xla.prepare(
        q, k, gate_logits, conv_q, conv_k, phi, before, valid, gate_normalizer, numbers
    )
    options = {"normalize": normalize, "gate_lower_bound": gate_lower_bound, "implementation": implementation}
    o, state = _attend(features_q, features_k, v, log_g, initial_state, documents, axis_name, **options)
    if valid is not None and zero_padding:
        (o,) = without_padding(valid, o)
    tail_q, tail_k = (
        _from_shard(x, axis_name, ends_here) for x in next_conv_state(q, k, conv_q, before, local_lengths, numbers)
    )
    return o, state, (tail_q, tail_k)
