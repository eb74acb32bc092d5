"""Gated linear attention of other JAX libraries, compiled and timed as this project's own kernels are.

jax-linear-attention (PyPI, imported as ``jla``): Mosaic GPU kernels for Hopper of ``o = q S``, ``S' = exp(log_g) S + k^T v``, without
a denominator. They take bfloat16, 64 or 128 features and value columns, and H K a multiple of 128. It is installed with
``pip install --no-deps jax-linear-attention`` (Python 3.12, jax 0.11.2); its ops import nothing but jax and numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.common import EPS

IMPLEMENTATION = "mosaic_gpu"
"""Strict: "auto" would time its plain JAX code where the kernels do not take a call."""

DENOMINATOR_COLUMNS = 64
"""The fewest columns of values that the library's kernels take."""


def missing() -> str | None:
    """Why the library cannot be used here, or None. Imports its kernels, which must not happen in several threads at once."""
    try:
        from jla.ops import available  # pyright: ignore[reportMissingImports]  # needs Python 3.12

        found = available("gla")
    except Exception as problem:  # for another jax its imports fail with whatever is first missing there
        return f"{type(problem).__name__}: {problem}"
    return None if IMPLEMENTATION in found else f"jla has no {IMPLEMENTATION} kernels here, only {', '.join(found)}"


def gla(q: jax.Array, k: jax.Array, v: jax.Array, log_g: jax.Array) -> jax.Array:
    """o [B, T, H, V] without a denominator, from q, k, log_g [B, T, H, K] and v [B, T, H, V]. Raises ValueError with the
    library's reason."""
    from jla.ops import linear_attention  # pyright: ignore[reportMissingImports]

    return linear_attention("gla", q, k, v, g=log_g, scale=1.0, impl=IMPLEMENTATION)[0]


def normalised_gla(q: jax.Array, k: jax.Array, v: jax.Array, log_g: jax.Array) -> jax.Array:
    """o over its denominator, which is o for values of one: further columns of v where 128 hold both, else a second call."""
    values = v.shape[-1]
    ones = jnp.ones((*v.shape[:-1], DENOMINATOR_COLUMNS), v.dtype)
    if values <= DENOMINATOR_COLUMNS:
        o = gla(q, k, jnp.concatenate([v, ones], axis=-1), log_g)
        o, total = o[..., :values], o[..., values : values + 1]
    else:
        o, total = gla(q, k, v, log_g), gla(q, k, ones, log_g)[..., :1]
    return (o / (total.astype(jnp.float32) + EPS)).astype(v.dtype)


PEERS: dict[str, Callable[..., Any]] = {
    "jax-linear-attention": gla,
    "jax-linear-attention normalised": normalised_gla,
}
"""Name of the peer -> its attention of q, k, v, log_g."""
