"""Convolution, feature map and gate on tiles of the TPU kernels: rows are tokens (or sequences), lanes are channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import LOG2E
from kernels_pallas.gated_linear_attention.tpu_tiles import dot
from kernels_pallas.lawcat_attention.xla import FEATURE_FLOOR

LARGEST_SCORE = 100.0
"""log2 units: exponentials of scores within it, and sums of 64 of them, fit float32 with no maximum subtracted."""

f32 = jnp.float32


def log_gates(logits: jax.Array, normalizer: float, bound: float | None, dtype: Any) -> jax.Array:
    """logsigmoid(logits) / normalizer, bounded below, float32; ``dtype`` is what the gates will be rounded to."""
    u = jnp.exp2(jnp.abs(logits) * -LOG2E)
    if dtype == f32:
        g = (jnp.maximum(-logits, 0.0) + jnp.log1p(u)) * (-1.0 / normalizer)
    else:
        # log2(1 + u) loses u below 2^-24: an absolute 4e-9 a token, below the rounding of the gate where it matters.
        g = (jnp.maximum(logits * -LOG2E, 0.0) + jnp.log2(1.0 + u)) * (-1.0 / (LOG2E * normalizer))
    return g if bound is None else jnp.maximum(g, bound)


def convolve(rows: Sequence[jax.Array], taps: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """sum_j taps_j rows_j in float32, rounded once to ``dtype``: the rows shifted by W - 1 - j, oldest first.

    The taps carry log2(e), so that the scores come out in log2 units: in float32, where it costs no accuracy, rather
    than in the rounded feature map.
    """
    total = rows[0] * taps[0]
    for x, w in zip(rows[1:], taps[1:], strict=True):
        total = total + x * w
    return total.astype(dtype)


def softmax_masks(shape: tuple[int, ...], half: int) -> list[jax.Array]:
    """Masks of the lanes of each softmax: ``half`` lanes wide, side by side."""
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    return [(lane >= at) & (lane < at + half) for at in range(0, shape[1], half)]


def _by_softmax(x: jax.Array, half: int, fill: float, reduce: Any) -> jax.Array:
    """Every lane gets the reduction over the lanes of its softmax."""
    out = None
    for mask in softmax_masks(x.shape, half):
        one = reduce(jnp.where(mask, x, fill), axis=1, keepdims=True)
        out = one if out is None else jnp.where(mask, one, out)
    assert out is not None  # a row has at least one softmax
    return out


def below_peak(scores: jax.Array, half: int) -> jax.Array:
    """Scores minus the largest of their softmax."""
    return scores - _by_softmax(scores, half, -jnp.inf, jnp.max)


def softmax_ones(lanes: int, half: int, dtype: Any) -> jax.Array | None:
    """[lanes, lanes] matrix that sums over the lanes of each softmax, or None where lane reductions are cheaper.

    Two softmaxes in a tile cost two reductions of the transposition unit, which is idle otherwise; more than two make it
    the limit, and the matrix unit sums all of them in one product.
    """
    if lanes <= 2 * half:
        return None
    i = lax.broadcasted_iota(jnp.int32, (lanes, lanes), 0)
    j = lax.broadcasted_iota(jnp.int32, (lanes, lanes), 1)
    return jnp.where((i ^ j) < half, 1.0, 0.0).astype(dtype)


def softmaxes(scores: jax.Array, half: int, ones: jax.Array | None, dtype: Any) -> jax.Array:
    """max(softmax, 1e-12) over every ``half`` neighbouring lanes, float32; scores in log2 units, at most
    ``LARGEST_SCORE``."""
    p = jnp.exp2(scores)
    total = _by_softmax(p, half, 0.0, jnp.sum) if ones is None else dot(p.astype(dtype), ones, "nn")
    # The hardware estimate is good to 2^-12, and its error is common to all features of a softmax.
    inverse = 1.0 / total if dtype == f32 else pl.reciprocal(total, approx=True)
    return jnp.maximum(p * inverse, FEATURE_FLOOR)
