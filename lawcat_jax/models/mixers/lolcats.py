"""The LoLCATs baseline (arXiv 2410.10254): softmax over a sliding window, learned features for everything before it.

For query t with window W_t and its largest score m_t, one joint denominator::

    o_t = [ s sum_{W_t} e^(q_t.k_s / sqrt(d) - m_t) v_s + sum_{before} phi_q(q_t).phi_k(k_s) v_s ]
          / [ the same with v_s = 1 ]

with s = sigmoid(window_factor) per head (``affine_window``: the linear sums times 1 - s), RoPE on q and k, untied maps,
no gate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models.layers import Context, Stack, constant, param, static_config
from lawcat_jax.models.mixers.diagnostics import entropy
from lawcat_jax.models.mixers.feature_maps import FEATURE_MAPS, feature_sizes, features
from lawcat_jax.models.mixers.lawcat import INITS, WINDOW_FACTOR, Recurrence, linear_terms
from lawcat_jax.models.mixers.window import empty_window, joint, window_attention
from lawcat_jax.models.rope import rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    State = dict[str, Any]


class LolcatsMixer(nnx.Module):
    """feature_map_q, feature_map_k [H, d, f] (with relu also *_bias [H, f]) and window_factor [H], float32, under
    ``stack`` axes.
    """

    def __init__(self, config: ModelConfig, attention: AttentionConfig, *, rngs: nnx.Rngs, stack: Stack = ()):
        self.config, self.attention = static_config(config), static_config(attention)
        scores, _ = feature_sizes(config, attention)
        heads = config.num_heads
        _, init, _ = INITS[attention.init]
        for name in ("feature_map_q", "feature_map_k"):
            setattr(self, name, param(rngs, init, stack, (heads, config.head_dim, scores)))
            if FEATURE_MAPS[attention.feature_map].bias:
                setattr(self, f"{name}_bias", nnx.Param(jnp.zeros((*stack, heads, scores))))
        self.window_factor = param(rngs, constant(WINDOW_FACTOR), stack, (heads,))

    @staticmethod
    def empty_state(config: ModelConfig, attention: AttentionConfig, batch: int, dtype) -> State:
        """(S, z) of the tokens that left the window, float32, and the window's rotated keys and values."""
        _, channels = feature_sizes(config, attention)
        heads = config.num_heads
        return {
            "S": jnp.zeros((batch, heads, channels, config.head_dim)),
            "z": jnp.zeros((batch, heads, channels)),
            "window": empty_window(config, attention, batch, dtype),
        }

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T H d"], State]:
        """(output of the heads before Wo, next state). Linear in T: what token t adds to (S, z) is the token t - w
        leaving the window.
        """
        del x
        q, k = (rotate(array, context.cos, context.sin) for array in (q, k))
        old = None if state is None else state["window"]
        window, rows, new_window = window_attention(q, k, v, self.attention, context, old)
        length = q.shape[1]
        parts = self.recurrence(q, rows.k[:, :length], context)
        numerator, denominator, (S, z) = linear_terms(parts, rows.v[:, :length], state, {"normalize": False})
        factor = self.window_factor[...]
        o = joint(window, numerator, denominator, factor, affine=self.attention.affine_window)
        return o.astype(v.dtype), {"S": S, "z": z, "window": new_window}

    def statistics(self, x, q, k, v, context: Context) -> dict[str, Array]:
        """entropy_q, entropy_k [H]: of the features of q and k, nats; window_share [H]: sigmoid of the factor."""
        del x, v
        q, k = (rotate(array, context.cos, context.sin) for array in (q, k))
        k = jnp.repeat(k, self.config.num_heads // self.config.num_kv_heads, axis=2)
        return {
            "entropy_q": entropy(self._features("feature_map_q", q), context),
            "entropy_k": entropy(self._features("feature_map_k", k), context),
            "window_share": jax.nn.sigmoid(self.window_factor[...]),
        }

    def recurrence(self, q, evicted, context: Context) -> Recurrence:
        """Features of the rotated q, and of the keys leaving the window (0 where none leaves, or it is a sink); no
        decay.
        """
        length = q.shape[1]
        positions = context.start[:, None] + jnp.arange(length) - self.attention.window_size
        leaving = context.valid() & (positions >= self.attention.sinks)
        evicted = jnp.repeat(evicted, self.config.num_heads // self.config.num_kv_heads, axis=2)
        phi_k = jnp.where(leaving[:, :, None, None], self._features("feature_map_k", evicted), 0)
        phi_q = self._features("feature_map_q", q)
        return Recurrence(phi_q, phi_k, jnp.zeros((*phi_q.shape[:2], 1, phi_q.shape[-1]), jnp.float32))

    def _features(self, name: str, u):
        bias = getattr(self, f"{name}_bias", None)
        return features(self.attention.feature_map, u, getattr(self, name)[...], None if bias is None else bias[...])
