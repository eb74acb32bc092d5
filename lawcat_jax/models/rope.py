"""Rotary position embedding in Hugging Face's rotate-half convention, with every frequency scaling that it knows.

Of the kinds of scaling, ``linear``, ``llama3`` and ``yarn`` have fixed frequencies. Those of ``dynamic`` and
``longrope`` depend on how long a sequence has become. Tokens that are read together get the frequencies of the sequence
with all of them, also where they are read in pieces; a key keeps the rotation that it got when it was computed. A
sequence that is decoded past the original length with a cache therefore differs from one that is computed anew, as it
does in transformers; but sequences of Phi-3 are read anew at that length (:func:`reread_above`), as there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.config import ModelConfig, RopeScaling

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def inverse_frequencies(config: ModelConfig, length: int = 0) -> np.ndarray:
    """Angle per token of each rotated pair, float32 [rotary_dim / 2], after the configured scaling.

    ``length``: tokens of the sequence, which matter for ``dynamic`` and ``longrope`` alone.
    """
    scaling, theta, size = config.rope_scaling, config.rope_theta, config.rotary_dim
    if scaling.kind == "dynamic":  # the base grows with the sequence (NTK-aware interpolation)
        excess = max(length, config.max_position_embeddings) / config.max_position_embeddings
        theta *= (scaling.factor * excess - (scaling.factor - 1)) ** (size / (size - 2))
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, theta)
    if scaling.kind == "longrope":
        long = length > scaling.original_max_position_embeddings
        return frequencies / np.asarray(scaling.long_factor if long else scaling.short_factor, np.float32)
    return frequencies


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divide the slow frequencies by ``factor``, keep the fast ones, and blend in between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths  # turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    """As llama3, but the blend is linear in the index of the pair (YaRN, arXiv 2309.00071, section 3.2)."""
    pairs = frequencies.size

    def index(turns: float) -> float:
        """Where the pair would stand that makes so many turns within the original context."""
        return pairs * math.log(scaling.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    last += 0.001 if first == last else 0.0
    keep = 1 - np.clip((np.arange(pairs, dtype=np.float32) - first) / (last - first), 0.0, 1.0)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)


def rope_table(
    positions: Int[Array, "B T"],
    config: ModelConfig,
    lengths: Int[Array, " B"] | None = None,
    whole: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """(cos, sin) in float32 of the angles at ``positions``; only the first ``lengths`` of them are valid (None: all).

    ``whole``: tokens of each sequence, which ``dynamic`` and ``longrope`` follow; None: up to the last valid position.
    """
    scaling = config.rope_scaling
    if scaling.kind in ("dynamic", "longrope"):
        frequencies = _of_length(_sequence_length(positions, lengths) if whole is None else whole, config)
    else:
        frequencies = inverse_frequencies(config)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling.kind in ("yarn", "longrope") and scaling.attention_factor != 1.0:
        return cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


def _sequence_length(positions: Int[Array, "B T"], lengths: Int[Array, " B"] | None) -> Int[Array, " B"]:
    if lengths is not None:  # padding must not lengthen a sequence
        positions = jnp.where(jnp.arange(positions.shape[1]) < lengths[:, None], positions, -1)
    return positions.max(axis=1) + 1


def _of_length(length: Int[Array, " B"], config: ModelConfig) -> Float[Array, "B 1 half"]:
    """:func:`inverse_frequencies` of sequences whose lengths are not known before the program runs."""
    scaling, size = config.rope_scaling, config.rotary_dim
    if scaling.kind == "longrope":
        short, long = (inverse_frequencies(config, n) for n in (0, scaling.original_max_position_embeddings + 1))
        return jnp.where((length > scaling.original_max_position_embeddings)[:, None, None], long, short)
    # theta' = theta growth^(d / (d - 2)), hence every frequency is divided by growth^(2 i / (d - 2)).
    excess = jnp.maximum(length, config.max_position_embeddings) / config.max_position_embeddings
    growth = scaling.factor * excess - (scaling.factor - 1)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size - 2)
    frequencies: Any = inverse_frequencies(
        config
    )  # of numpy, which makes no numpy array of a quotient with a jax array
    return frequencies / growth[:, None, None] ** exponents


def reread_above(config: ModelConfig) -> int | None:
    """[tokens] A sequence that grows beyond this with a cache is read anew, since all its keys are rotated otherwise from
    there on; None: never. Phi-3's ``prepare_inputs_for_generation`` in transformers does so, no other family's.
    """
    scaling = config.rope_scaling
    return scaling.original_max_position_embeddings if (config.family, scaling.kind) == ("phi3", "longrope") else None


def rotate(
    x: Float[Array, "B T H d"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T H d"]:
    """Rotate the pairs (i, i + half) of every head, those dimensions beyond 2 half left as they are; computed in
    float32, returned in x's dtype.
    """
    half = cos.shape[-1]
    low, high = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half : 2 * half]))
    cos, sin = cos[:, :, None], sin[:, :, None]
    parts = [low * cos - high * sin, high * cos + low * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :].astype(jnp.float32))
    return jax.lax.concatenate(parts, x.ndim - 1).astype(x.dtype)
