"""Reductions over the valid tokens of a batch, for the statistics of the mixers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from lawcat_jax.models.layers import Context

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def quantiles(
    x: Float[Array, "B T H ..."], context: Context, heads: int, levels: tuple[float, ...]
) -> Float[Array, "H n"]:
    """Quantiles of each head over everything else; padding does not count."""
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
