"""The operations on sequences sharded over a mesh axis, to be called inside ``jax.shard_map``.

Every device holds T / P consecutive tokens, in the order of the axis. A shard's effect on the state is its summary
(L = sum of log_g, S, z), and summaries compose as (e^(L_a + L_b), e^L_b S_a + S_b, e^L_b z_a + z_b), so one exchange of
summaries gives each shard the state of all tokens before it, exactly. Fewer than 8 shards gather all summaries at once
(LASP-2, arXiv 2502.07563); more use a shift and log2 P permutations (Hillis and Steele). The backward pass does the
same from the right. The convolution fetches the W - 1 rows before the shard from its left neighbour.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import dispatch
from kernels_pallas.causal_conv1d import xla as conv_xla
from kernels_pallas.causal_conv1d.checks import check_conv
from kernels_pallas.checks import check_bound, check_flag, check_normalizer, check_state
from kernels_pallas.common import match_varying, valid_tokens, varying_axes, without_padding
from kernels_pallas.gated_linear_attention import scan
from kernels_pallas.gated_linear_attention.checks import check_qkvg
from kernels_pallas.gated_linear_attention.vjp import OP, AttentionSpec, attention_spec, bounded
from kernels_pallas.lawcat_attention import xla as lawcat_xla
from kernels_pallas.lawcat_attention.checks import check_layer

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

GATHER_BELOW = 8
"""With fewer shards than this one all-gather moves less than log2 P permutations."""


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


def _run(spec: AttentionSpec, axis_name: str, q, k, v, log_g, S0, z0, save_residuals: bool):
    backend = dispatch.forward_module(OP, spec.implementation)
    summary = getattr(backend, "segment_state", scan.segment_state)
    L, S, z = summary(k, v, log_g, lower_bound=spec.lower_bound)
    decay = _spread(L, q.shape[2])
    S, z = _exclusive(decay, S + decay[..., None] * S0, z + decay * z0, axis_name)
    options = {"normalize": spec.normalize, "lower_bound": spec.lower_bound, "save_residuals": save_residuals}
    o, state, residuals = backend.forward(q, k, v, log_g, (S + S0, z + z0), **options)
    return (o, state), (residuals, decay)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sharded(spec: AttentionSpec, axis_name: str, q, k, v, log_g, S0, z0):
    """(o, the state at the end of this shard). S0 and z0 are added to the state at its start."""
    return _run(spec, axis_name, q, k, v, log_g, S0, z0, False)[0]


def _sharded_forward(spec: AttentionSpec, axis_name: str, q, k, v, log_g, S0, z0):
    return _run(spec, axis_name, q, k, v, log_g, S0, z0, True)


def _sharded_backward(spec: AttentionSpec, axis_name: str, residuals, cotangents):
    residuals, decay = residuals
    do, (dS, dz) = cotangents
    backend = dispatch.backward_module(OP, spec.implementation)
    options = {"normalize": spec.normalize, "lower_bound": spec.lower_bound}
    if hasattr(backend, "segment_dstate"):
        S, z = backend.segment_dstate(residuals, do, **options)
    else:
        # Only the cotangent of the initial state is used: in plain XLA the rest of this pass is dead code.
        *_, (S, z) = backend.backward(residuals, do, (jnp.zeros_like(dS), jnp.zeros_like(dz)), **options)
    S, z = _exclusive(decay, S + decay[..., None] * dS, z + decay * dz, axis_name, reverse=True)
    *grads, (dS0, dz0) = backend.backward(residuals, do, (dS + S, dz + z), **options)
    return *grads, dS0, dz0


_sharded.defvjp(_sharded_forward, _sharded_backward)


def _check_axis(axis_name: Any) -> tuple[int, jax.Array]:
    try:
        return lax.axis_size(axis_name), lax.axis_index(axis_name)
    except (NameError, TypeError, ValueError):
        raise ValueError(
            f"axis_name: {axis_name!r} is not an axis of an enclosing jax.shard_map; call this inside one"
        ) from None


def _from_last(x: jax.Array, axis_name: str, index, size: int) -> jax.Array:
    """The last shard's value on every shard."""
    return lax.psum(jnp.where(index == size - 1, x, jnp.zeros_like(x)), axis_name)


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
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]]:
    """``kernels_pallas.gated_linear_attention`` of a sequence whose T is sharded over mesh axis ``axis_name``.

    The arrays are this shard's tokens; initial_state (of the whole sequence) and the returned state (after its last
    token) are the same on every shard of the axis. Raises ValueError naming the argument, also when called outside
    ``jax.shard_map``.
    """
    check_qkvg(q, k, v, log_g, 4)
    check_bound(gate_lower_bound)
    check_flag("normalize", normalize)
    size, index = _check_axis(axis_name)
    batch, _, heads, features = q.shape
    shapes = ((batch, heads, features, v.shape[3]), (batch, heads, features))
    if initial_state is None:
        start = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    else:
        check_state(initial_state, batch, heads, features, v.shape[3])
        start = tuple(jnp.where(index == 0, x, 0.0) for x in initial_state)
    name = dispatch.implementation_for(
        q, k, v, log_g, normalize=normalize, gate_lower_bound=gate_lower_bound, implementation=implementation
    )
    spec = attention_spec(name, normalize, gate_lower_bound)
    arrays = (q, k, v, bounded(log_g, gate_lower_bound), *start)
    arrays = tuple(match_varying(x, *arrays, *((index,) if varying_axes(index) else ())) for x in arrays)
    out: Any = _sharded(spec, axis_name, *arrays)  # custom_vjp hides what it returns
    o, (S, z) = out
    return o, (_from_last(S, axis_name, index, size), _from_last(z, axis_name, index, size))


def _rows_before(x: jax.Array, initial: jax.Array | None, rows: int, axis_name: str, name: str) -> jax.Array:
    """The ``rows`` rows before this shard: the left neighbour's last ones, and ``initial`` (or zeros) on the first
    shard."""
    size, index = _check_axis(axis_name)
    if size > 1 and x.shape[1] < rows:
        raise ValueError(f"{name}: a shard must hold at least {rows} tokens for the convolution, got {x.shape[1]}")
    kept = x[:, max(0, x.shape[1] - rows) :]
    if size == 1:
        before = jnp.zeros_like(x[:, :1], shape=(x.shape[0], rows, *x.shape[2:]))
    else:
        before = lax.ppermute(kept, axis_name, [(i, i + 1) for i in range(size - 1)])
    return before if initial is None else jnp.where(index == 0, initial.astype(x.dtype), before)


def _last_rows(x, before, rows: int, axis_name: str, lengths) -> jax.Array:
    """The last ``rows`` valid rows of the whole sequence, on every shard."""
    size, index = _check_axis(axis_name)
    length = x.shape[1]
    if lengths is None:
        return _from_last(jnp.concatenate([before, x], axis=1)[:, length:], axis_name, index, size)
    wanted = jnp.clip(lengths, 0, size * length)[:, None] - rows + jnp.arange(rows)[None]
    local = wanted - index * length
    own = ((local >= 0) & (local < length)) | ((wanted < 0) & (index == 0))
    own, local = (
        y.reshape(*y.shape, *(1,) * (x.ndim - 2)) for y in (own, jnp.clip(local + rows, 0, rows + length - 1))
    )
    found = jnp.take_along_axis(jnp.concatenate([before, x], axis=1), local, axis=1)
    return lax.psum(jnp.where(own, found, 0), axis_name)


def causal_conv1d(
    x: Float[Array, "B T *C"],
    w: Float[Array, "W ..."],
    *,
    axis_name: str,
    initial_state: Float[Array, "B W-1 *C"] | None = None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B W-1 *C"]]:
    """``kernels_pallas.causal_conv1d`` of a sequence sharded over ``axis_name``; the rows returned are
    the last ones of the whole sequence.

    Every shard needs at least W - 1 tokens. Raises ValueError naming the argument.
    """
    check_conv(x, w, initial_state)
    rows = w.shape[0] - 1
    before = _rows_before(x, initial_state, rows, axis_name, "x")
    y, _ = conv_xla.causal_conv1d(x, w, before)
    return y, _last_rows(x, before, rows, axis_name, None)


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
    zero_padding: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Array, Array], tuple[Array, Array]]:
    """``kernels_pallas.lawcat_attention`` of a sequence sharded over ``axis_name``.

    ``lengths`` counts tokens of the whole sequence; states are the whole sequence's, equal on every shard. Every shard
    needs at least W - 1 tokens. Raises ValueError naming the argument.
    """
    size, index = _check_axis(axis_name)
    check_layer(q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths, size)
    check_flag("zero_padding", zero_padding)
    check_normalizer(gate_normalizer)
    valid = None if lengths is None else valid_tokens(lengths, q.shape[1], index * q.shape[1])
    q, k, v, gate_logits = without_padding(valid, q, k, v, gate_logits)
    rows = conv_q.shape[1] - 1
    initial = conv_state or (None, None)
    before_q, before_k = (
        _rows_before(x, tail, rows, axis_name, name) for name, x, tail in zip("qk", (q, k), initial, strict=True)
    )
    before = (before_q, before_k)
    features_q, features_k, log_g = lawcat_xla.prepare(
        q, k, gate_logits, conv_q, conv_k, phi, before, valid, gate_normalizer
    )
    o, state = gated_linear_attention(
        features_q,
        features_k,
        v,
        log_g,
        axis_name=axis_name,
        initial_state=initial_state,
        normalize=normalize,
        gate_lower_bound=gate_lower_bound,
        implementation=implementation,
    )
    if valid is not None and zero_padding:
        o = jnp.where(valid[:, :, None, None], o, 0)
    tail_q, tail_k = (_last_rows(x, tail, rows, axis_name, lengths) for x, tail in zip((q, k), before, strict=True))
    return o, state, (tail_q, tail_k)
