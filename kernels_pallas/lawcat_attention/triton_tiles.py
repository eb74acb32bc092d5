"""What the Triton kernels of LAWCAT attention share: the static description of a call, gates and softmaxes of a tile."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.common import LOG2E
from kernels_pallas.gated_linear_attention.triton_tiles import exp2, f32, log2
from kernels_pallas.lawcat_attention.xla import FEATURE_FLOOR

LN2 = 0.6931471805599453


@dataclasses.dataclass(frozen=True)
class FrontSpec:
    """Static arguments of the layer's front, what comes before gated linear attention.

    ``chunk`` rows of a tile and ``length`` tokens in all; the gate's normalizer and bound; ``carried``: whether a
    conv_state comes before the sequence.
    """

    chunk: int
    length: int
    gate_normalizer: float
    bound: float | None
    carried: bool

    @property
    def limit(self) -> int | None:
        """The number of tokens where the last tile is not full, for masks; else None."""
        return self.length if self.length % self.chunk else None


def log_gates(a: jax.Array, front: FrontSpec) -> jax.Array:
    """logsigmoid(a) / normalizer, bounded below, natural logarithm, float32.

    log(1 + u) is taken by its series where 1 + u would lose u."""
    a = a.astype(f32)
    u = exp2(-jnp.abs(a) * LOG2E)
    softplus = jnp.where(u < 2.0**-6, u * (1.0 - u * (0.5 - u * (1.0 / 3.0))), LN2 * log2(1.0 + u)) + jnp.maximum(
        -a, 0.0
    )
    g = softplus * (-1.0 / front.gate_normalizer)
    return g if front.bound is None else jnp.maximum(g, front.bound)


def softmax(s: jax.Array, axis: int) -> jax.Array:
    """Softmax of scores along ``axis``, raised to the feature floor."""
    s = s * LOG2E
    p = exp2(s - jnp.max(s, axis=axis, keepdims=True))
    return jnp.maximum(p * (1.0 / jnp.sum(p, axis=axis, keepdims=True)), FEATURE_FLOOR)
