"""What the trained weights of the mixers say without running them: the rank that the gates use, how far taps have moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.config import AttentionConfig
from lawcat_jax.models.mixers.inits import INITS

if TYPE_CHECKING:
    from jaxtyping import Float


def gate_singular_values(mixers: Mapping[str, Any]) -> Float[np.ndarray, "M r"] | None:
    """Singular values of each layer's gate projection, largest first: of the product W1 W2, r = its inner dimension, or
    of the one matrix of a gate of full rank. None without a gate.
    """
    if "gate_down" in mixers:
        down, up = (np.asarray(mixers[name]["kernel"], np.float64) for name in ("gate_down", "gate_up"))
        # W1 W2 has the singular values of the small product of the triangles of W1 and W2^T.
        left, right = (np.asarray(np.linalg.qr(x, mode="r")) for x in (down, up.swapaxes(-1, -2)))
        inner = left @ right.swapaxes(-1, -2)
        return np.linalg.svd(inner, compute_uv=False)
    if "gate" in mixers:
        return np.linalg.svd(np.asarray(mixers["gate"]["kernel"], np.float64), compute_uv=False)
    return None


def effective_rank(values: Float[np.ndarray, "*b r"]) -> Float[np.ndarray, "*b"]:
    """Exponential of the entropy of singular values taken as a distribution: r when all are equal, 1 when one is not 0.

    0 for a matrix of zeros. Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality",
    EUSIPCO 2007.
    """
    total = values.sum(-1, keepdims=True)
    share = values / np.where(total > 0, total, 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def tap_drift(mixers: Mapping[str, Any], attention: AttentionConfig) -> dict[str, Float[np.ndarray, "M H"]]:
    """|w - w0| of each head's taps by parameter, conv_q and so on: the Frobenius norm over taps and channels.

    Empty without convolutions, and for an initialisation that draws the taps at random: w0 is then unknown.
    """
    drift = {}
    for name in sorted(mixers):
        if name.startswith("conv_"):
            taps = np.asarray(mixers[name], np.float64)
            first, second = (
                np.asarray(INITS[attention.init].taps(jax.random.key(seed), taps.shape, jnp.float32)) for seed in (0, 1)
            )
            if np.array_equal(first, second):
                drift[name] = np.linalg.norm((taps - first).reshape(*taps.shape[:2], -1), axis=-1)
    return drift
