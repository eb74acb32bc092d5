"""Initial values of the mixers' parameters (the authors' code)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lawcat_jax.models.layers import Initializer, normal

WINDOW_FACTOR = -2.197
"""Initial logit of the window's share: sigmoid = 0.1 (LoLCATs)."""

NARROW = 0.006
"""Standard deviation of the gate's initial weights."""


def xavier(key, shape, dtype):
    """Uniform Xavier with gain 2^-2.5 over the last two dimensions."""
    limit = 2**-2.5 * math.sqrt(6 / (shape[-1] + shape[-2]))
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def kaiming(key, shape, dtype):
    """Uniform in +-sqrt(6 / (d f)) over the last two dimensions d and f.

    What torch's ``kaiming_uniform_`` makes of an array [H, d, f]: it takes d f for the number of inputs.
    """
    limit = math.sqrt(6 / (shape[-1] * shape[-2]))
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def identity_map(key, shape, dtype):
    """eye(d, f): a head's features start from the first f of its d dimensions."""
    del key
    return jnp.broadcast_to(jnp.eye(*shape[-2:], dtype=dtype), shape)


def identity_taps(key, shape, dtype):
    """1 on the current token (the last tap), 0.001 on those before."""
    del key
    return jnp.full(shape, 0.001, dtype).at[..., -1, :].set(1.0)


class Init(NamedTuple):
    """Initializers of convolution taps [..., W, d], feature maps [..., d, f] and gate matrices [..., in, out]."""

    taps: Initializer
    feature_map: Initializer
    gate: Initializer


INITS = {  # AttentionConfig.init -> initializers
    "identity": Init(identity_taps, identity_map, normal(NARROW)),
    "kaiming_feature_map": Init(identity_taps, kaiming, normal(NARROW)),
    "xavier": Init(xavier, identity_map, xavier),
    "normal": Init(normal(NARROW), identity_map, normal(NARROW)),
}
