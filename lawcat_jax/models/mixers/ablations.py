"""The paper's mixer with the switches of ``AttentionConfig`` turned: its ablations, and what neighbouring work does.

- ``conv``: "off"; "stacked" (two convolutions, one after the other); "shared" (the taps of q serve k as well).
- ``feature_map``, ``tie_qk``: other maps; a matrix for q and one for k.
- ``gate_rank`` 0: one full matrix D -> Hkv K. ``gate_kind``: "per_head" (one decay for a head's features) or "none".
- ``normalize`` off: ``o = K^-0.5 S^T phi(q~)``; the authors' kernel scales q, which otherwise cancels.
- ``rope_linear``: q and k are rotated before step 5.
- ``window_size``, ``window_kind``, ``affine_window``, ``sinks``: softmax over the last tokens (and the first), which
  shares a denominator with linear attention over all tokens, both of whose sums have the factor K^-0.5.
- ``output_gate``: ``o * 2 sigmoid(x W)``.
- ``init``: other initial values.

Steps are numbered in :mod:`lawcat_jax.models.mixers.lawcat`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models.cache import extend, last_rows
from lawcat_jax.models.layers import Context, Linear, Stack, constant, normal, param, static_config
from lawcat_jax.models.mixers.diagnostics import branch_statistics, gate_statistics
from lawcat_jax.models.mixers.feature_maps import add_map, apply_map, feature_sizes
from lawcat_jax.models.mixers.gates import Gate, gate_bias, half_lives
from lawcat_jax.models.mixers.inits import INITS, NARROW, WINDOW_FACTOR
from lawcat_jax.models.mixers.lawcat import LawcatMixer, convolved
from lawcat_jax.models.mixers.linear_attention import empty_sums, linear_terms, recur, sums_flops
from lawcat_jax.models.mixers.mixer import Rules, State
from lawcat_jax.models.mixers.softmax_window import (
    WINDOW_STATE_RULES,
    empty_window,
    joint,
    window_attention,
    window_flops,
)
from lawcat_jax.models.rope import rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_PAPER = {
    "conv": "on",
    "feature_map": "softmax_dim",
    "tie_qk": True,
    "normalize": True,
    "rope_linear": False,
    "window_size": 0,
    "gate_kind": "per_dim",
    "output_gate": False,
    "init": "identity",
}


def is_paper_design(attention: AttentionConfig) -> bool:
    """Whether :class:`~lawcat_jax.models.mixers.lawcat.LawcatMixer` alone is what these switches ask for."""
    return attention.gate_rank > 0 and all(getattr(attention, name) == value for name, value in _PAPER.items())


class LawcatAblation(LawcatMixer):
    """The paper's mixer under any setting of the switches: a :class:`~lawcat_jax.models.mixers.mixer.TokenMixer`.

    Parameters beside or in place of those of ``LawcatMixer``: no conv_k when shared, conv_q2 and conv_k2 when stacked;
    feature_map_q and feature_map_k when untied, with relu also *_bias [H]; gate/{kernel [D, Hkv K], bias [Hkv K]} at
    full rank (Hkv instead of Hkv K for a gate per head); window_factor [H] with a window; output_gate/kernel [D, H d].
    """

    parameter_rules: ClassVar[Rules] = {
        **LawcatMixer.parameter_rules,
        r"feature_map\w*": P("tensor"),
        "gate/kernel": P("fsdp", "tensor"),
        "gate/bias": P("tensor"),
        "output_gate/kernel": P("fsdp", "tensor"),
        "window_factor": P("tensor"),
    }
    state_rules: ClassVar[Rules] = {**LawcatMixer.state_rules, **WINDOW_STATE_RULES}

    def __init__(self, config: ModelConfig, attention: AttentionConfig, *, rngs: nnx.Rngs, stack: Stack = ()):
        # The order of the parameters is that of the random draws: students of a seed depend on it.
        self.config, self.attention = static_config(config), static_config(attention)
        init, heads, width = INITS[attention.init], config.num_heads, config.head_dim
        for name in dict.fromkeys(sum(_conv_names(attention), ())):
            setattr(self, name, param(rngs, init.taps, stack, (heads, attention.conv_size, width)))
        first, second = _map_names(attention)
        options = {"rngs": rngs, "stack": stack, "init": init.feature_map}
        add_map(self, first, config, attention, **options)
        if second != first:
            add_map(self, second, config, attention, **options, copy_of=first)
        if attention.gate_kind != "none":
            bias = gate_bias(half_lives(config, attention), attention.gate_normalizer)
            options = {"rngs": rngs, "stack": stack, "init": init.gate}
            if attention.gate_rank == 0:
                self.gate = Gate(config.hidden_size, bias, **options)
            else:
                self.gate_down = Linear(config.hidden_size, attention.gate_rank, **options)
                self.gate_up = Gate(attention.gate_rank, bias, **options)
        if attention.window_size:
            self.window_factor = param(rngs, constant(WINDOW_FACTOR), stack, (heads,))
        if attention.output_gate:
            self.output_gate = Linear(config.hidden_size, heads * width, rngs=rngs, stack=stack, init=normal(NARROW))

    @staticmethod
    def problems(config: ModelConfig, attention: AttentionConfig) -> list[str]:
        """A window needs the normaliser, whose sum it shares."""
        del config
        if attention.window_size and not attention.normalize:
            return ["attention.normalize: a window shares the denominator; turn it on, or set window_size=0"]
        return []

    @staticmethod
    def flops_per_token(config: ModelConfig, attention: AttentionConfig) -> float:
        """As ``LawcatMixer``, for the parts that there are."""
        a, hidden, width = attention, config.hidden_size, config.num_heads * config.head_dim
        _, channels = feature_sizes(config, a)
        gates = config.num_kv_heads * (1 if a.gate_kind == "per_head" else channels)
        total = 2.0 * width * a.conv_size * sum(map(len, _conv_names(a))) + sums_flops(config, a)
        if a.gate_kind != "none":
            total += 2 * (a.gate_rank * (hidden + gates) if a.gate_rank else hidden * gates)
        if a.window_size:
            total += window_flops(config, a)
        return total + (2 * hidden * width if a.output_gate else 0)

    @staticmethod
    def empty_state(config: ModelConfig, attention: AttentionConfig, batch: int, dtype: Any) -> State:
        """As ``LawcatMixer``; twice the rows for stacked convolutions; a window's rotated keys and values."""
        state, width = empty_sums(config, attention, batch), config.head_dim
        if attention.conv != "off":
            rows = (batch, _conv_rows(attention))
            state["conv_q"] = jnp.zeros((*rows, config.num_heads, width), dtype)
            state["conv_k"] = jnp.zeros((*rows, config.num_kv_heads, width), dtype)
        if attention.window_size:
            state["window"] = empty_window(config, attention, batch, dtype)
        return state

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T H d"], State]:
        """(output of the heads before Wo, state after the last valid token); see ``TokenMixer.__call__``."""
        a = self.attention
        x, q, k, v = context.without_padding(x, q, k, v)
        linear_q, linear_k = self._for_linear(q, k, context)
        if a.window_size:
            attend = jax.checkpoint(self._with_window)  # keeps no scores and features for the backward pass
            o, new_state = attend(x, q, k, v, linear_q, linear_k, context, state)
        elif a.conv in ("on", "shared") and a.feature_map == "softmax_dim" and a.tie_qk and a.gate_kind != "none":
            o, new_state = super().__call__(x, linear_q, linear_k, v, context, state)
        else:
            parts, rows = self.recurrence(x, linear_q, linear_k, context, state)
            o, (S, z) = recur(parts, v.astype(jnp.float32), state, self.options(a.normalize), context.segments)
            new_state = {"S": S, "z": z, **rows}
        if not a.normalize:
            o = o * o.dtype.type(math.sqrt(1 / new_state["z"].shape[-1]))
        if a.output_gate:
            # Twice a sigmoid, so that the layer starts as if it had no output gate.
            o = o * (2 * jax.nn.sigmoid(self.output_gate(x.astype(jnp.float32)))).reshape(o.shape)
        return o, new_state

    def statistics(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
    ) -> dict[str, Array]:
        """As ``LawcatMixer``, without the gates' where there is none; window_share [H], sigmoid(window_factor)."""
        a = self.attention
        (v,) = context.without_padding(v)
        parts, _ = self.recurrence(x, *self._for_linear(q, k, context), context, None)
        out = branch_statistics(parts, v, context, self.options(False))
        if a.gate_kind != "none":
            out |= gate_statistics(parts.log_g, a.gate_lower_bound, context)
        if a.window_size:
            out["window_share"] = jax.nn.sigmoid(self.window_factor[...])
        return out

    def taps(self) -> tuple[Array, Array]:
        """Step 5 of the single convolution."""
        conv_q = self.conv_q[...]
        return conv_q, conv_q if self.attention.conv == "shared" else self.conv_k[...]

    def convolve(self, q, k, context: Context, state: State | None) -> tuple[Array, Array, State]:
        """Step 5 with no, one or two convolutions."""
        if self.attention.conv == "off":
            return q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2), {}
        state, count = state or {}, _conv_rows(self.attention)
        rows = {"conv_q": extend(state.get("conv_q"), q, count), "conv_k": extend(state.get("conv_k"), k, count)}
        outputs = []
        for y, names in zip(rows.values(), _conv_names(self.attention), strict=True):
            for name in names:
                y = convolved(y, getattr(self, name)[...], context.segments)
            outputs.append(y[:, count:])
        return outputs[0], outputs[1], {name: last_rows(x, count, context.lengths) for name, x in rows.items()}

    def featurize(self, q: Float[Array, "B T H d"], k: Float[Array, "B T H d"]) -> tuple[Array, Array]:
        """Step 6 with the map of q and that of k."""
        map_q, map_k = _map_names(self.attention)
        return apply_map(self, map_q, self.attention, q), apply_map(self, map_k, self.attention, k)

    def gate_logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Hkv K"]:
        """Step 2; a gate per head repeats its logit for every feature."""
        return self._over_features(self._gate_outputs(x))

    def log_gates(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Hg K"]:
        """Step 7, not yet bounded; zeros [B, T, 1, K] without a gate."""
        if self.attention.gate_kind == "none":
            return self._over_features(jnp.zeros((*x.shape[:2], 1, 1), jnp.float32))
        return self._over_features(jax.nn.log_sigmoid(self._gate_outputs(x)) / self.attention.gate_normalizer)

    def _gate_outputs(self, x):
        if self.attention.gate_rank:
            return super().gate_logits(x)
        return self.gate(x.astype(jnp.float32)).reshape(*x.shape[:2], self.config.num_kv_heads, -1)

    def _over_features(self, gates):
        _, channels = feature_sizes(self.config, self.attention)
        return jnp.broadcast_to(gates, (*gates.shape[:3], channels))

    def _for_linear(self, q, k, context: Context):
        """q and k of the linear branch, rotated with ``rope_linear``."""
        if not self.attention.rope_linear:
            return q, k
        return rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)

    def _with_window(self, x, q, k, v, linear_q, linear_k, context: Context, state: State | None):
        """Softmax over the window and gated linear attention over everything, under one denominator.

        The sums of linear attention keep the factor K^-0.5 of the authors' kernel, which cancels only without a window.
        """
        window_q, window_k = (rotate(array, context.cos, context.sin) for array in (q, k))
        old = None if state is None else state["window"]
        window, _, new_window = window_attention(window_q, window_k, v, self.attention, context, old)
        parts, rows = self.recurrence(x, linear_q, linear_k, context, state)
        numerator, denominator, (S, z) = linear_terms(parts, v, state, self.options(False), context.segments)
        factor, scale = self.window_factor[...], z.shape[-1] ** -0.5
        o = joint(window, scale * numerator, scale * denominator, factor, affine=self.attention.affine_window)
        return o.astype(v.dtype), {"S": S, "z": z, **rows, "window": new_window}


def _conv_rows(attention: AttentionConfig) -> int:
    """Rows of the past that the convolutions reach."""
    return (attention.conv_size - 1) * (2 if attention.conv == "stacked" else 1)


def _conv_names(attention: AttentionConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the taps that q and k go through, in order."""
    return {
        "on": (("conv_q",), ("conv_k",)),
        "off": ((), ()),
        "shared": (("conv_q",), ("conv_q",)),
        "stacked": (("conv_q", "conv_q2"), ("conv_k", "conv_k2")),
    }[attention.conv]


def _map_names(attention: AttentionConfig) -> tuple[str, str]:
    """Names of the feature maps of q and k."""
    return ("feature_map", "feature_map") if attention.tie_qk else ("feature_map_q", "feature_map_k")
