"""The learned decay of the state: the last matrix of the gate, and initial biases from half-lives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models.layers import Initializer, Stack, param
from lawcat_jax.models.mixers.feature_maps import feature_sizes

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def half_lives(config: ModelConfig, attention: AttentionConfig) -> np.ndarray:
    """Initial half-lives in tokens of the Hkv x K gate channels ([Hkv, 1] for a gate per head).

    Without ``gate_half_life_max`` all are ``gate_half_life``; with it they grow geometrically, head after head and
    within a head feature after feature, so that a single kv head also covers the range. The two halves of a two-sided
    map get the same values.
    """
    scores, channels = feature_sizes(config, attention)
    if attention.gate_kind == "per_head":
        scores = channels = 1
    first, last = attention.gate_half_life, attention.gate_half_life_max or attention.gate_half_life
    spread = np.geomspace(first, last, config.num_kv_heads * scores).reshape(config.num_kv_heads, scores)
    return np.tile(spread, (1, channels // scores))


def gate_bias(lives: np.ndarray, normalizer: float) -> np.ndarray:
    """The logit a with -logsigmoid(a) / normalizer = ln 2 / life: gates that halve the state in ``lives`` tokens."""
    return -np.log(np.expm1(normalizer * math.log(2) / lives)).astype(np.float32)


class Gate(nnx.Module):
    """The last matrix of the gate: kernel [inputs, Hkv K'] and bias [Hkv K'], K' = K features or 1 for a gate per head.

    ``bias`` holds the initial values [Hkv, K'] of one layer.
    """

    def __init__(self, inputs: int, bias: np.ndarray, *, rngs: nnx.Rngs, stack: Stack, init: Initializer):
        self.kernel = param(rngs, init, stack, (inputs, bias.size))
        self.bias = nnx.Param(jnp.broadcast_to(jnp.asarray(bias.reshape(-1)), (*stack, bias.size)))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Logits; a product of full float32 precision, since half-lives of 8K tokens hang on the logits' third digit."""
        return jnp.matmul(x, self.kernel[...], precision=jax.lax.Precision.HIGHEST) + self.bias[...]
