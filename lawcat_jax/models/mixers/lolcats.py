"""The LoLCATs baseline (arXiv 2410.10254): softmax over a window, learned features for everything before it.

For query t with window W_t and its largest score m_t, one joint denominator::

    o_t = [ s sum_{W_t} e^(q_t.k_s / sqrt(d) - m_t) v_s + sum_{before} phi_q(q_t).phi_k(k_s) v_s ]
          / [ the same with v_s = 1 ]

with s = sigmoid(window_factor) per head (``affine_window``: the linear sums times 1 - s), RoPE on q and k, untied maps
that start as copies of each other, no gate. ``window_kind`` "terraced" is the window of LoLCATs' fast kernels: the own
block and the one before. (Their training code counts blocks from the end of the sequence where w does not divide it;
here they are counted from its start, so that a prefix does not depend on what follows.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models.layers import Context, Stack, constant, param, static_config
from lawcat_jax.models.mixers.diagnostics import entropy
from lawcat_jax.models.mixers.feature_maps import add_map, apply_map
from lawcat_jax.models.mixers.inits import INITS, WINDOW_FACTOR
from lawcat_jax.models.mixers.linear_attention import STATE_RULES, Recurrence, empty_sums, linear_terms, sums_flops
from lawcat_jax.models.mixers.mixer import Rules, State
from lawcat_jax.models.mixers.softmax_window import (
    WINDOW_STATE_RULES,
    empty_window,
    joint,
    kept_rows,
    linear_before_window,
    window_attention,
    window_flops,
)
from lawcat_jax.models.rope import rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class LolcatsMixer(nnx.Module):
    """The LoLCATs baseline: a :class:`~lawcat_jax.models.mixers.mixer.TokenMixer`.

    Parameters, float32 under ``stack`` axes: feature_map_q, feature_map_k [H, d, f] (with relu also *_bias [H]) and
    window_factor [H].
    """

    parameter_rules: ClassVar[Rules] = {r"feature_map\w*": P("tensor"), "window_factor": P("tensor")}
    state_rules: ClassVar[Rules] = {**STATE_RULES, **WINDOW_STATE_RULES}

    def __init__(self, config: ModelConfig, attention: AttentionConfig, *, rngs: nnx.Rngs, stack: Stack = ()):
        self.config, self.attention = static_config(config), static_config(attention)
        options = {"rngs": rngs, "stack": stack, "init": INITS[attention.init].feature_map}
        add_map(self, "feature_map_q", config, attention, **options)
        add_map(self, "feature_map_k", config, attention, **options, copy_of="feature_map_q")
        self.window_factor = param(rngs, constant(WINDOW_FACTOR), stack, (config.num_heads,))

    @staticmethod
    def problems(config: ModelConfig, attention: AttentionConfig) -> list[str]:
        """A window is part of the method."""
        del config
        if attention.window_size == 0:
            return ["attention.window_size: lolcats needs a window of at least 1 token (64 in the paper)"]
        return []

    @staticmethod
    def flops_per_token(config: ModelConfig, attention: AttentionConfig) -> float:
        """Features and state, and the softmax over the window."""
        return sums_flops(config, attention) + window_flops(config, attention)

    @staticmethod
    def empty_state(config: ModelConfig, attention: AttentionConfig, batch: int, dtype: Any) -> State:
        """(S, z) of the tokens that left the window, float32, and the window's rotated keys and values."""
        sums = empty_sums(config, attention, batch)
        return {**sums, "window": empty_window(config, attention, batch, dtype)}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T H d"], State]:
        """(output of the heads before Wo, next state); see ``TokenMixer.__call__``. Linear in T: at token t the sums
        (S, z) take in token t - w, which then leaves the window (terraced: t - 2 w, and what lies between that and
        the window is summed apart).
        """
        del x
        return jax.checkpoint(self._attend)(
            q, k, v, context, state
        )  # keeps no scores and features for the backward pass

    def _attend(self, q, k, v, context: Context, state: State | None) -> tuple[Any, State]:
        q, k, v = context.without_padding(q, k, v)
        q, k = (rotate(array, context.cos, context.sin) for array in (q, k))
        old = None if state is None else state["window"]
        window, rows, new_window = window_attention(q, k, v, self.attention, context, old)
        length = q.shape[1]
        parts = self.recurrence(q, rows.k[:, :length], context)
        numerator, denominator, (S, z) = linear_terms(
            parts, rows.v[:, :length], state, {"normalize": False}, context.segments
        )
        if self.attention.window_kind == "terraced":
            more, weight = linear_before_window(parts.q, self._key_features(rows.k), rows.v, self.attention, context)
            numerator, denominator = numerator + more, denominator + weight
        factor = self.window_factor[...]
        o = joint(window, numerator, denominator, factor, affine=self.attention.affine_window)
        return o.astype(v.dtype), {"S": S, "z": z, "window": new_window}

    def statistics(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
    ) -> dict[str, Array]:
        """entropy_q, entropy_k [H]: of the features of q and k, nats; window_share [H]: sigmoid(window_factor)."""
        del x, v
        q, k = context.without_padding(q, k)
        q, k = (rotate(array, context.cos, context.sin) for array in (q, k))
        return {
            "entropy_q": entropy(apply_map(self, "feature_map_q", self.attention, q), context),
            "entropy_k": entropy(self._key_features(k), context),
            "window_share": jax.nn.sigmoid(self.window_factor[...]),
        }

    def recurrence(
        self, q: Float[Array, "B T H d"], evicted: Float[Array, "B T Hkv d"], context: Context
    ) -> Recurrence:
        """Operands of linear attention: features of the rotated q and of the keys that leave the window (0 where none
        leaves, or where it is a sink); no decay.
        """
        positions = context.positions() - kept_rows(self.attention)
        leaving = context.valid() & (positions >= self.attention.sinks)
        phi_k = jnp.where(leaving[:, :, None, None], self._key_features(evicted), 0)
        phi_q = apply_map(self, "feature_map_q", self.attention, q)
        return Recurrence(phi_q, phi_k, jnp.zeros((*phi_q.shape[:2], 1, phi_q.shape[-1]), jnp.float32))

    def _key_features(self, k: Float[Array, "B R Hkv d"]) -> Float[Array, "B R H K"]:
        """Features of rotated keys, per query head."""
        k = jnp.repeat(k, self.config.num_heads // self.config.num_kv_heads, axis=2)
        return apply_map(self, "feature_map_k", self.attention, k)


MIXER = LolcatsMixer
