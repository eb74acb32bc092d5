"""Feature maps of linear attention: non-negative functions of one learned projection per query head.

Sources: Hedgehog (arXiv 2402.04347) as in section 3 of the paper and in LoLCATs (2410.10254); T2R (2103.13076) for relu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models.layers import Initializer, Stack, param

if TYPE_CHECKING:
    from jaxtyping import Array, Float

FLOOR = 1e-12
"""Least value of a feature, so that no denominator is 0."""


def _both_softmax(s):
    return jnp.concatenate([jax.nn.softmax(s, axis=-1), jax.nn.softmax(-s, axis=-1)], axis=-1)


def _exp_dim(s):
    above = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    below = jnp.exp(jnp.min(s, axis=-1, keepdims=True) - s)
    return jnp.concatenate([above, below], axis=-1)


class FeatureMap(NamedTuple):
    """A feature map: ``function`` turns the f scores u^T Phi into ``copies`` * f features; with ``bias`` the scores have
    a learned bias as well, one number for all f.
    """

    function: Callable[[jax.Array], jax.Array]
    copies: int
    bias: bool = False


FEATURE_MAPS = {  # AttentionConfig.feature_map -> map
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
    bias: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H K"]:
    """phi_h(u) >= 1e-12 in float32, for the map ``kind`` of :data:`FEATURE_MAPS` with matrices ``phi`` (and ``bias``)."""
    scores = jnp.einsum("bthd,hdf->bthf", u.astype(jnp.float32), phi, precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        scores = scores + bias[:, None]
    return jnp.maximum(FEATURE_MAPS[kind].function(scores), FLOOR)


def add_map(
    module: nnx.Module,
    name: str,
    config: ModelConfig,
    attention: AttentionConfig,
    *,
    rngs: nnx.Rngs,
    stack: Stack,
    init: Initializer,
    copy_of: str | None = None,
) -> None:
    """Give ``module`` the parameters of one map: ``name`` [H, d, f] and, where the map has one, ``name``_bias [H].

    ``copy_of`` names a map that ``module`` has already, whose matrix this one starts with instead of a draw of ``init``.
    """
    scores, _ = feature_sizes(config, attention)
    matrix = param(rngs, init, stack, (config.num_heads, config.head_dim, scores))  # drawn also where it is replaced,
    if copy_of is not None:  # so that what is drawn next does not depend on it
        matrix = nnx.Param(jnp.copy(getattr(module, copy_of)[...]))
    setattr(module, name, matrix)
    if FEATURE_MAPS[attention.feature_map].bias:
        setattr(module, f"{name}_bias", nnx.Param(jnp.zeros((*stack, config.num_heads))))


def apply_map(
    module: nnx.Module, name: str, attention: AttentionConfig, u: Float[Array, "B T H d"]
) -> Float[Array, "B T H K"]:
    """:func:`features` with the parameters of :func:`add_map`."""
    bias = getattr(module, f"{name}_bias", None)
    return features(attention.feature_map, u, getattr(module, name)[...], None if bias is None else bias[...])
