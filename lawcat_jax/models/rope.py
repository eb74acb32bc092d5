"""Rotary position embedding in Hugging Face's rotate-half convention, with linear and llama3 frequency scaling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.config import ModelConfig, RopeScaling

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per token of each of the d/2 rotated pairs, float32, after the configured scaling."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divide the slow frequencies by ``factor``, keep the fast ones, and blend in between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths  # turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)


def rope_table(
    positions: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """(cos, sin) in float32 of the angles at ``positions``."""
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H d"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T H d"]:
    """Rotate the pairs (i, i + d/2) of every head; computed in float32, returned in x's dtype."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jax.lax.concatenate([low * cos - high * sin, high * cos + low * sin], x.ndim - 1).astype(x.dtype)
