"""Softmax over a window and the first tokens, and nothing for what lies between: StreamingLLM (arXiv 2309.17453).

A baseline without parameters of its own. Query t sees the first ``sinks`` tokens and the window, with the state as a
cache of constant size::

    o_t = softmax over s in (sinks and W_t) of (q_t.k_s / sqrt(d)) v_s

Positions are those within the cache. Keys of the window are at their true distance from the query; a sink is as far away
as if the tokens between it and the window had never been there. That is a rotation of the query to
:func:`~lawcat_jax.models.mixers.softmax_window.sink_positions` where it meets sinks. A sequence of at most ``sinks`` +
``window_size`` tokens therefore gets the teacher's softmax attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models.layers import Context, Stack, static_config
from lawcat_jax.models.mixers.mixer import Rules, State
from lawcat_jax.models.mixers.softmax_window import (
    WINDOW_STATE_RULES,
    WindowTerms,
    empty_window,
    sink_positions,
    window_attention,
    window_flops,
)
from lawcat_jax.models.rope import rope_table, rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class WindowMixer(nnx.Module):
    """StreamingLLM's attention: a :class:`~lawcat_jax.models.mixers.mixer.TokenMixer` without parameters."""

    parameter_rules: ClassVar[Rules] = {}
    state_rules: ClassVar[Rules] = WINDOW_STATE_RULES

    def __init__(self, config: ModelConfig, attention: AttentionConfig, *, rngs: nnx.Rngs, stack: Stack = ()):
        del rngs, stack
        self.config, self.attention = static_config(config), static_config(attention)

    @staticmethod
    def problems(config: ModelConfig, attention: AttentionConfig) -> list[str]:
        """There must be a window; sinks need rotary embeddings that are the same in every layer and at every length."""
        found = []
        if attention.window_size == 0:
            found.append("attention.window_size: the kind window needs one of at least 1 token")
        if attention.sinks and config.nope_layers:
            found.append(
                "attention.sinks: the kind window has none in a model with layers without rotary embedding; set 0"
            )
        if attention.sinks and config.rope_scaling.kind in ("dynamic", "longrope"):
            found.append(
                f"attention.sinks: the kind window has none with rope scaling {config.rope_scaling.kind!r}, whose angles "
                "depend on the length; set 0"
            )
        return found

    @staticmethod
    def flops_per_token(config: ModelConfig, attention: AttentionConfig) -> float:
        """The softmax over window and sinks."""
        return window_flops(config, attention)

    @staticmethod
    def empty_state(config: ModelConfig, attention: AttentionConfig, batch: int, dtype: Any) -> State:
        """Rotated keys and values of the window and of the sinks."""
        return {"window": empty_window(config, attention, batch, dtype)}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T H d"], State]:
        """(output of the heads before Wo, next state); see ``TokenMixer.__call__``."""
        del x
        return jax.checkpoint(self._attend)(q, k, v, context, state)  # keeps no scores for the backward pass

    def _attend(self, q, k, v, context: Context, state: State | None) -> tuple[Any, State]:
        terms, state = self._terms(q, k, v, context, state)
        return (terms.numerator / terms.denominator[..., None]).astype(v.dtype), state

    def statistics(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
    ) -> dict[str, Array]:
        """sink_share [H]: mean weight that the sinks get together."""
        del x, v
        is_sink = (context.positions() < self.attention.sinks).astype(jnp.float32)
        values = jnp.broadcast_to(is_sink[:, :, None, None], (*k.shape[:3], 1))
        terms, _ = self._terms(q, k, values, context, None)
        share, valid = terms.numerator[..., 0] / terms.denominator, context.valid()[:, :, None]
        return {"sink_share": jnp.sum(jnp.where(valid, share, 0), axis=(0, 1)) / jnp.sum(valid)}

    def _terms(self, q, k, v, context: Context, state: State | None) -> tuple[WindowTerms, State]:
        q, k, v = context.without_padding(q, k, v)
        sink_q = None
        if self.attention.sinks:
            sink_q = rotate(q, *rope_table(sink_positions(self.attention, context), self.config))
        q, k = (rotate(array, context.cos, context.sin) for array in (q, k))
        old = None if state is None else state["window"]
        terms, _, window = window_attention(q, k, v, self.attention, context, old, sink_q=sink_q)
        return terms, {"window": window}


MIXER = WindowMixer
