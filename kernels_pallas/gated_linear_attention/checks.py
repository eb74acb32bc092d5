"""Argument checks of gated linear attention. All raise ValueError with one line that begins with the argument's name."""

from __future__ import annotations

import os

import jax
import jax.core
import jax.numpy as jnp

from kernels_pallas.checks import check_array, check_shape, describe


def check_qkvg(q, k, v, log_g, dims: int) -> None:
    """Shapes and dtypes of [B, T, heads, width] (``dims`` 4) or [B, heads, width] (``dims`` 3)."""
    for name, x in (("q", q), ("k", k), ("v", v), ("log_g", log_g)):
        check_array(name, x, dims)
    lead, heads, features = q.shape[:-2], q.shape[-2], q.shape[-1]
    if 0 in q.shape or v.shape[-1] == 0:
        raise ValueError(f"q: every dimension must be at least 1, got q {describe(q)} and v {describe(v)}")
    check_shape("k", k, q.shape, "the shape of q")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {describe(x)}")
    for name, x in (("v", v), ("log_g", log_g)):
        if x.shape[:-2] != lead:
            raise ValueError(f"{name}: expected leading dimensions {list(lead)} like q, got {describe(x)}")
        if x.shape[-2] == 0 or heads % x.shape[-2]:
            raise ValueError(f"{name}: its {x.shape[-2]} heads must divide the {heads} heads of q, got {describe(x)}")
    if log_g.shape[-1] != features:
        raise ValueError(f"log_g: expected {features} features like q, got {describe(log_g)}")


def check_values(q, k, log_g) -> None:
    """Refuses values that the kernels take for impossible (they would overflow, or divide by almost 0).

    Only with KERNELS_PALLAS_CHECK=1, and only for concrete arrays: it waits for the device.
    """
    if os.environ.get("KERNELS_PALLAS_CHECK", "") != "1":
        return
    for name, x, sign in (("q", q, 1), ("k", k, 1), ("log_g", log_g, -1)):
        if isinstance(x, jax.core.Tracer):
            continue
        if not bool(jnp.all(jnp.isfinite(x))):
            raise ValueError(f"{name}: holds values that are not finite")
        if bool(jnp.any(sign * x < 0)):
            extreme = float(jnp.min(x) if sign > 0 else jnp.max(x))
            raise ValueError(f"{name}: must be {'non-negative' if sign > 0 else 'at most 0'}, found {extreme}")
