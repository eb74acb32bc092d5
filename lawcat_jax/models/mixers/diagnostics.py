"""Statistics that the mixers report in training, over the valid tokens of a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from lawcat_jax.models.layers import Context
from lawcat_jax.models.mixers.linear_attention import Recurrence, linear_terms

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Levels at which half-lives are reported."""


def quantiles(
    x: Float[Array, "B T H ..."], context: Context, heads: int, levels: tuple[float, ...]
) -> Float[Array, "H n"]:
    """Quantiles at ``levels`` of each head's values over all other axes; padding does not count."""
    valid = context.valid().reshape(*x.shape[:2], *(1,) * (x.ndim - 2))
    rows = jnp.moveaxis(jnp.where(valid, x, jnp.nan), 2, 0).reshape(heads, -1)
    return jnp.nanquantile(rows, jnp.asarray(levels), axis=1).T


def share(flags: Bool[Array, "B T H K"], context: Context) -> Float[Array, " H"]:
    """Fraction of valid entries that are set, per head."""
    valid = context.valid()
    total = jnp.maximum(jnp.sum(valid), 1) * flags.shape[-1]
    return jnp.sum(flags & valid[:, :, None, None], axis=(0, 1, 3)) / total


def entropy(phi: Float[Array, "B T H K"], context: Context) -> Float[Array, " H"]:
    """Mean entropy in nats of the features of a token, taken as a distribution over K."""
    p = phi / jnp.maximum(jnp.sum(phi, axis=-1, keepdims=True), 1e-30)
    each = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    valid = context.valid()[:, :, None]
    return jnp.sum(jnp.where(valid, each, 0.0), axis=(0, 1)) / jnp.maximum(jnp.sum(valid), 1)


def branch_statistics(
    parts: Recurrence, v: Float[Array, "B T Hkv d"], context: Context, options: dict[str, Any]
) -> dict[str, Array]:
    """Health of the linear branch per query head.

    denominator [H, 2]: minimum and 1 % quantile of z . phi(q), which near 1e-10 makes outputs collapse towards 0.
    entropy_q, entropy_k [H]: of the features as a distribution, nats. ``options``: see ``linear_terms``.
    """
    _, denominator, _ = linear_terms(parts, v[..., :1], None, options, context.segments)
    return {
        "denominator": quantiles(denominator, context, denominator.shape[2], (0.0, 0.01)),
        "entropy_q": entropy(parts.q, context),
        "entropy_k": entropy(parts.k, context),
    }


def gate_statistics(log_g: Float[Array, "B T Hkv K"], bound: float | None, context: Context) -> dict[str, Array]:
    """How fast the gates forget, per key-value head; ``log_g`` before the lower bound.

    half_life [Hkv, 5]: quantiles 0, 0.1, 0.5, 0.9, 1 in tokens. saturated [Hkv]: share of gates e^g above 0.999.
    clamped [Hkv]: share at the lower bound.
    """
    bound = -math.inf if bound is None else bound
    rates = jnp.maximum(log_g, bound)
    return {
        "half_life": quantiles(-math.log(2) / jnp.minimum(rates, -1e-12), context, log_g.shape[2], QUANTILES),
        "saturated": share(rates > math.log(0.999), context),
        "clamped": share(log_g < bound, context),
    }
