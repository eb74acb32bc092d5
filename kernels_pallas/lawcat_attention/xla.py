"""The front of LAWCAT attention in plain XLA: causal convolutions, Hedgehog feature map and log-gate (method: arXiv
2509.18467)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels_pallas.causal_conv1d.xla import causal_conv1d
from kernels_pallas.common import einsum, match_varying

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

FEATURE_FLOOR = 1e-12


def feature_map(u: Float[Array, "B T H d"], phi: Float[Array, "H d f"]) -> Float[Array, "B T H 2*f"]:
    """max([softmax(u phi) ; softmax(-u phi)], 1e-12): u [B, T, H, d], phi [H, d, f] -> [B, T, H, 2f] in u.dtype;
    softmax in float32. Features at the floor pass no gradient."""
    return _feature_map(match_varying(u, phi), match_varying(phi, u))


@jax.custom_vjp
def known_features(u: Float[Array, "B T H d"], phi: Float[Array, "H d f"], features: Float[Array, "B T H 2*f"]):
    """``features``, with the gradient to u and phi of :func:`feature_map`, whose result they are (or zeros, without a
    gradient): for a backward pass that has them already."""
    del u, phi
    return features


@jax.custom_vjp
def _feature_map(u, phi):
    scores = einsum("bthd,hdf->bthf", u, _both(u, phi))
    halves = scores.reshape(*scores.shape[:-1], 2, -1)
    return jnp.maximum(jax.nn.softmax(halves, axis=-1), FEATURE_FLOOR).astype(u.dtype).reshape(scores.shape)


def _both(u, phi):
    """[phi, -phi] in u.dtype: one product gives the scores of both halves."""
    phi = phi.astype(u.dtype)
    return jnp.concatenate([phi, -phi], axis=-1)


def _feature_map_forward(u, phi):
    features = _feature_map(u, phi)
    return features, (u, phi, features)


def _feature_map_backward(residuals, cotangent):
    # From the features in u.dtype, which exist anyway: float32 probabilities would be stored beside them, or computed
    # again.
    u, phi, features = residuals
    halves = (*features.shape[:-1], 2, phi.shape[-1])
    p, d = features.reshape(halves).astype(jnp.float32), cotangent.reshape(halves).astype(jnp.float32)
    d = jnp.where(p > jnp.asarray(FEATURE_FLOOR, features.dtype).astype(jnp.float32), d, 0.0)
    # Rounding to bfloat16 moved their sum away from 1, and a constant added to d would then have an effect.
    p = p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), FEATURE_FLOOR)
    d_scores = (p * (d - jnp.sum(p * d, axis=-1, keepdims=True))).astype(u.dtype).reshape(features.shape)
    du = einsum("bthf,hdf->bthd", d_scores, _both(u, phi)).astype(u.dtype)
    d_plus, d_minus = jnp.split(einsum("bthd,bthf->hdf", u, d_scores), 2, axis=-1)
    return du, (d_plus - d_minus).astype(phi.dtype)


_feature_map.defvjp(_feature_map_forward, _feature_map_backward)
known_features.defvjp(
    lambda u, phi, features: (features, (u, phi, features)),
    lambda residuals, cotangent: (*_feature_map_backward(residuals, cotangent), None),
)


def log_gate(gate_logits: Float[Array, "*b"], gate_normalizer: float) -> Float[Array, "*b"]:
    """logsigmoid(logits) / gate_normalizer in float32; the bound is applied by gated_linear_attention."""
    return jax.nn.log_sigmoid(gate_logits.astype(jnp.float32)) / gate_normalizer


def prepare(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T Hkv d"],
    gate_logits: Float[Array, "B T Hkv K"],
    conv_q: Float[Array, "H W d"],
    conv_k: Float[Array, "H W d"],
    phi: Float[Array, "H d f"],
    conv_state: tuple[Float[Array, "B W-1 H d"], Float[Array, "B W-1 Hkv d"]] | None,
    valid: Bool[Array, "B T"] | None,
    gate_normalizer: float,
    numbers: Int[Array, "B T"] | None = None,
    known: tuple[Float[Array, "B T H 2*f"], Float[Array, "B T H 2*f"]] | None = None,
) -> tuple[Float[Array, "B T H 2*f"], Float[Array, "B T H 2*f"], Float[Array, "B T Hkv K"]]:
    """(phi(q), phi(k), log_g) of the shapes that gated_linear_attention takes.

    q [B, T, H, d]; k [B, T, Hkv, d]; each query head has its own taps, so the k of a kv head is convolved H / Hkv
    times. ``valid`` [B, T] bool or None: elsewhere phi(k) = 0 and log_g = 0, so that padding leaves the state alone.
    ``numbers`` [B, T] or None: segments, which the convolutions do not cross. ``known``: phi(q) and phi(k) where only
    gradients are wanted.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    tail_q, tail_k = (None, None) if conv_state is None else conv_state
    conv_q, conv_k = conv_q.swapaxes(0, 1), conv_k.swapaxes(0, 1)
    conv_k = conv_k.reshape(conv_k.shape[0], kv_heads, heads // kv_heads, width)
    q, _ = causal_conv1d(q, conv_q, tail_q, numbers)
    k, _ = causal_conv1d(k[:, :, :, None], conv_k, None if tail_k is None else tail_k[:, :, :, None], numbers)
    k = k.reshape(batch, length, heads, width)
    if known is None:
        q, k = feature_map(q, phi), feature_map(k, phi)
    else:
        q, k = known_features(q, phi, known[0]), known_features(k, phi, known[1])
    log_g = log_gate(gate_logits, gate_normalizer)
    if valid is not None:
        mask = valid[:, :, None, None]
        k, log_g = jnp.where(mask, k, 0), jnp.where(mask, log_g, 0.0)
    return q, k, log_g


def last_rows(
    x: Float[Array, "B T *c"], initial: Float[Array, "B R *c"] | None, rows: int, lengths: Int[Array, " B"] | None
) -> Float[Array, "B R *c"]:
    """The last ``rows`` valid rows of [initial ; x] along axis 1, zeros standing before the start of a sequence."""
    if initial is None:
        initial = jnp.zeros_like(x[:, :1], shape=(x.shape[0], rows, *x.shape[2:]))
    if lengths is None or not rows:
        kept = x[:, max(0, x.shape[1] - rows) :]
        return jnp.concatenate([initial.astype(x.dtype)[:, kept.shape[1] :], kept], axis=1)
    first = jnp.clip(lengths, 0, x.shape[1])[:, None] - rows + jnp.arange(rows)[None]

    def taken(y: jax.Array, index: jax.Array) -> jax.Array:
        index = jnp.clip(index, 0, y.shape[1] - 1)
        return jnp.take_along_axis(y, index.reshape(*index.shape, *(1,) * (y.ndim - 2)), axis=1)

    # From each of the two: a gather from both, joined, would copy x.
    inside = (first >= 0).reshape(*first.shape, *(1,) * (x.ndim - 2))
    return jnp.where(inside, taken(x, first), taken(initial.astype(x.dtype), first + rows))
