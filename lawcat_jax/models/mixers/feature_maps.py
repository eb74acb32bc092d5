"""Feature maps of linear attention: non-negative functions of one learned projection per query head (paper section 3;
LoLCATs, T2R).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from lawcat_jax.config import AttentionConfig, ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float

FLOOR = 1e-12


def _both_softmax(s):
    return jnp.concatenate([jax.nn.softmax(s, axis=-1), jax.nn.softmax(-s, axis=-1)], axis=-1)


def _exp_dim(s):
    above = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    below = jnp.exp(jnp.min(s, axis=-1, keepdims=True) - s)
    return jnp.concatenate([above, below], axis=-1)


class FeatureMap(NamedTuple):
    """``function`` of the scores u^T Phi (f of them) gives ``copies`` * f features; ``bias``: the scores have a learned
    bias.
    """

    function: Callable[[jax.Array], jax.Array]
    copies: int
    bias: bool = False


FEATURE_MAPS = {
    "softmax_dim": FeatureMap(_both_softmax, 2),
    "half_softmax": FeatureMap(lambda s: jax.nn.softmax(s, axis=-1), 1),
    "exp_dim": FeatureMap(_exp_dim, 2),
    "relu": FeatureMap(jax.nn.relu, 1, bias=True),
    "pos_elu": FeatureMap(lambda s: jax.nn.elu(s) + 1, 1),
}


def feature_sizes(config: ModelConfig, attention: AttentionConfig) -> tuple[int, int]:
    """(f, K): scores and features of one head. By default f makes K = d."""
    copies = FEATURE_MAPS[attention.feature_map].copies
    scores = attention.feature_dim or max(1, config.head_dim // copies)
    return scores, copies * scores


def features(
    kind: str,
    u: Float[Array, "B T H d"],
    phi: Float[Array, "H d f"],
    bias: Float[Array, "H f"] | None = None,
) -> Float[Array, "B T H K"]:
    """phi_h(u) >= 1e-12 in float32."""
    scores = jnp.einsum("bthd,hdf->bthf", u.astype(jnp.float32), phi, precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        scores = scores + bias
    return jnp.maximum(FEATURE_MAPS[kind].function(scores), FLOOR)
