"""Gated linear attention from features and log-gates: what the mixers share behind their feature maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import kernels_pallas as kernels
from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models import parallel
from lawcat_jax.models.mixers.feature_maps import feature_sizes
from lawcat_jax.models.mixers.mixer import Rules, State

if TYPE_CHECKING:
    from jaxtyping import Array, Float

STATE_RULES: Rules = {"[Sz]": P(parallel.BATCH, parallel.HEADS)}
"""How the arrays of :func:`empty_sums` are split over the mesh."""


class Recurrence(NamedTuple):
    """Operands of gated linear attention, float32: features of q and k, and log-gates not yet bounded (Hg divides H)."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    log_g: Float[Array, "B T Hg K"]


def empty_sums(config: ModelConfig, attention: AttentionConfig, batch: int) -> State:
    """S [B, H, K, d] and z [B, H, K] of no tokens, float32."""
    _, channels = feature_sizes(config, attention)
    heads, width = config.num_heads, config.head_dim
    return {"S": jnp.zeros((batch, heads, channels, width)), "z": jnp.zeros((batch, heads, channels))}


def sums_flops(config: ModelConfig, attention: AttentionConfig) -> float:
    """Operations per token of both feature maps, of the update of S and of its reading."""
    scores, channels = feature_sizes(config, attention)
    return 4.0 * config.num_heads * config.head_dim * (scores + channels)


def recur(
    parts: Recurrence, v: Float[Array, "B T Hv e"], state: State | None, options: dict[str, Any]
) -> tuple[Float[Array, "B T H e"], tuple[Float[Array, "B H K e"], Float[Array, "B H K"]]]:
    """(outputs, (S, z)) of ``kernels_pallas.gated_linear_attention`` with its ``options``; one token that follows a
    state takes the decoding step.
    """
    initial = None if state is None else (state["S"], state["z"])
    if parts.q.shape[1] == 1 and initial is not None:
        arrays = (array[:, 0] for array in (parts.q, parts.k, v, parts.log_g))
        o, new = kernels.decode_step(*arrays, state=initial, **options)
        return o[:, None], new
    return parallel.gated_linear_attention(parts.q, parts.k, v, parts.log_g, initial_state=initial, **options)


def linear_terms(
    parts: Recurrence, v: Float[Array, "B T Hkv e"], state: State | None, options: dict[str, Any]
) -> tuple[Float[Array, "B T H e"], Float[Array, "B T H"], tuple[Float[Array, "B H K e"], Float[Array, "B H K"]]]:
    """Numerator and denominator of linear attention apart, float32, and the next (S, z).

    The denominator is one more value column that is always 1, so both come out of one call; ``options`` says
    ``normalize=False``.
    """
    v = v.astype(jnp.float32)
    widened = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if state is not None:
        S = jnp.concatenate([state["S"], state["z"][..., None]], axis=-1)
        state = {"S": S, "z": state["z"]}
    o, (S, z) = recur(parts, widened, state, options)
    return o[..., :-1], o[..., -1], (S[..., :-1], z)
