"""LAWCAT attention: causal convolutions on q and k, Hedgehog features, a low-rank gate, normalised gated linear
attention.

Source: arXiv 2509.18467, section 3; the switches of AttentionConfig are its ablations. The default design is one call
of ``kernels_pallas.lawcat_attention``; variants compose the same parts around
``kernels_pallas.gated_linear_attention``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kernels_pallas as kernels
from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models import parallel
from lawcat_jax.models.cache import extend, last_rows
from lawcat_jax.models.layers import Context, Linear, Stack, constant, normal, param, static_config
from lawcat_jax.models.mixers.diagnostics import QUANTILES, entropy, quantiles, share
from lawcat_jax.models.mixers.feature_maps import FEATURE_MAPS, feature_sizes, features
from lawcat_jax.models.mixers.window import empty_window, joint, window_attention
from lawcat_jax.models.rope import rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    State = dict[str, Any]

WINDOW_FACTOR = -2.197
"""Initial logit of the window's share: sigmoid = 0.1 (LoLCATs)."""

NARROW = 0.006
"""Standard deviation of the gate's initial weights (authors' code)."""


class Recurrence(NamedTuple):
    """What gated linear attention takes, in float32: features [B, T, H, K], log-gates [B, T, Hg, K] not yet bounded."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    log_g: Float[Array, "B T Hg K"]


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


def _xavier(key, shape, dtype):
    limit = 2**-2.5 * math.sqrt(6 / (shape[-1] + shape[-2]))
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def _kaiming(key, shape, dtype):
    limit = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def _identity_map(key, shape, dtype):
    del key
    return jnp.broadcast_to(jnp.eye(*shape[-2:], dtype=dtype), shape)


def _identity_taps(key, shape, dtype):
    del key
    return jnp.full(shape, 0.001, dtype).at[..., -1, :].set(1.0)


INITS = {  # taps, feature map, gate matrices
    "identity": (_identity_taps, _identity_map, normal(NARROW)),
    "kaiming_feature_map": (_identity_taps, _kaiming, normal(NARROW)),
    "xavier": (_xavier, _xavier, _xavier),
    "normal": (normal(NARROW), normal(NARROW), normal(NARROW)),
}


class Gate(nnx.Module):
    """Bias [Hkv * K'] of the last matrix of the gate, beside its kernel (K' = K, or 1 for a gate per head)."""

    def __init__(self, inputs: int, bias: np.ndarray, *, rngs: nnx.Rngs, stack: Stack, init):
        self.kernel = param(rngs, init, stack, (inputs, bias.size))
        self.bias = nnx.Param(jnp.broadcast_to(jnp.asarray(bias.reshape(-1)), (*stack, bias.size)))

    def __call__(self, x):
        return jnp.matmul(x, self.kernel[...], precision=jax.lax.Precision.HIGHEST) + self.bias[...]


class LawcatMixer(nnx.Module):
    """The linear-attention parameters of one layer, all float32, with leading ``stack`` axes.

    conv_q, conv_k [H, W, d] (conv_k absent when shared; conv_q2, conv_k2 when stacked); feature_map [H, d, f] (untied:
    feature_map_q, feature_map_k; with relu also *_bias [H, f]); gate_down/kernel [D, r] and gate_up/{kernel [r, Hkv K],
    bias [Hkv K]}, or gate/{kernel, bias} at full rank; window_factor [H] with a window; output_gate/kernel [D, H d].
    """

    def __init__(self, config: ModelConfig, attention: AttentionConfig, *, rngs: nnx.Rngs, stack: Stack = ()):
        self.config, self.attention = static_config(config), static_config(attention)
        taps, feature_init, gate_init = INITS[attention.init]
        heads, width = config.num_heads, config.head_dim
        for name in _conv_names(attention):
            setattr(self, name, param(rngs, taps, stack, (heads, attention.conv_size, width)))
        scores, _ = feature_sizes(config, attention)
        for name in _map_names(attention.tie_qk):
            setattr(self, name, param(rngs, feature_init, stack, (heads, width, scores)))
            if FEATURE_MAPS[attention.feature_map].bias:
                setattr(self, f"{name}_bias", nnx.Param(jnp.zeros((*stack, heads, scores))))
        if attention.gate_kind != "none":
            self._build_gate(rngs, stack, gate_init)
        if attention.window_size:
            self.window_factor = param(rngs, constant(WINDOW_FACTOR), stack, (heads,))
        if attention.output_gate:
            self.output_gate = Linear(config.hidden_size, heads * width, rngs=rngs, stack=stack, init=normal(NARROW))

    def _build_gate(self, rngs, stack, init):
        hidden, rank = self.config.hidden_size, self.attention.gate_rank
        bias = gate_bias(half_lives(self.config, self.attention), self.attention.gate_normalizer)
        if rank == 0:
            self.gate = Gate(hidden, bias, rngs=rngs, stack=stack, init=init)
        else:
            self.gate_down = Linear(hidden, rank, rngs=rngs, stack=stack, init=init)
            self.gate_up = Gate(rank, bias, rngs=rngs, stack=stack, init=init)

    @staticmethod
    def empty_state(config: ModelConfig, attention: AttentionConfig, batch: int, dtype) -> State:
        """The state of no tokens: S [B, H, K, d] and z [B, H, K] float32, raw rows for the convolutions, the window's
        rows.
        """
        _, channels = feature_sizes(config, attention)
        heads, width = config.num_heads, config.head_dim
        state: State = {"S": jnp.zeros((batch, heads, channels, width)), "z": jnp.zeros((batch, heads, channels))}
        if attention.conv != "off":
            rows = _conv_rows(attention)
            state["conv_q"] = jnp.zeros((batch, rows, heads, width), dtype)
            state["conv_k"] = jnp.zeros((batch, rows, config.num_kv_heads, width), dtype)
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
        """(output of the heads before Wo, state after the last valid token); x is the layer input after its norm, q and
        k raw.
        """
        a = self.attention
        linear_q, linear_k = q, k
        if a.rope_linear:
            linear_q, linear_k = (rotate(array, context.cos, context.sin) for array in (q, k))
        if a.window_size:
            o, new_state = self._with_window(x, q, k, v, linear_q, linear_k, context, state)
        elif self._fused():
            o, new_state = self._fused_attention(x, linear_q, linear_k, v, context, state)
        else:
            parts, rows = self.recurrence(x, linear_q, linear_k, context, state)
            o, (S, z) = _recur(parts, v.astype(jnp.float32), state, self._options(a.normalize))
            new_state = {"S": S, "z": z, **rows}
        if not a.normalize:
            o = o * o.dtype.type(math.sqrt(1 / new_state["z"].shape[-1]))  # the authors' kernel scales q by K^-0.5
        if a.output_gate:
            # Twice a sigmoid, so that the layer starts as if it had no output gate.
            o = o * (2 * jax.nn.sigmoid(self.output_gate(x.astype(jnp.float32)))).reshape(o.shape)
        return o, new_state

    def statistics(self, x, q, k, v, context: Context) -> dict[str, Array]:
        """What to watch in training (per kv head for gates, per head for the rest), over the valid tokens of a batch.

        half_life [Hkv, 5]: quantiles 0, 0.1, 0.5, 0.9, 1 in tokens. saturated [Hkv]: share of gates above 0.999 a
        token. clamped [Hkv]: share at the lower bound. denominator [H, 2]: minimum and 1 % quantile of the linear
        branch. entropy_q, entropy_k [H]: of the features as a distribution, nats. window_share [H]: sigmoid of the
        factor, with a window.
        """
        a = self.attention
        if a.rope_linear:
            q, k = (rotate(array, context.cos, context.sin) for array in (q, k))
        parts, _ = self.recurrence(x, q, k, context, None)
        _, denominator, _ = linear_terms(parts, v[..., :1], None, self._options(False))
        heads = self.config.num_heads
        out = {
            "denominator": quantiles(denominator, context, heads, (0.0, 0.01)),
            "entropy_q": entropy(parts.q, context),
            "entropy_k": entropy(parts.k, context),
        }
        if a.gate_kind != "none":
            kv_heads = self.config.num_kv_heads
            bound = -math.inf if a.gate_lower_bound is None else a.gate_lower_bound
            rates = jnp.maximum(parts.log_g, bound)
            out["half_life"] = quantiles(-math.log(2) / jnp.minimum(rates, -1e-12), context, kv_heads, QUANTILES)
            out["saturated"] = share(rates > math.log(0.999), context)
            out["clamped"] = share(parts.log_g < bound, context)
        if a.window_size:
            out["window_share"] = jax.nn.sigmoid(self.window_factor[...])
        return out

    def gate_logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Hkv K"]:
        """Float32 logits per kv head ([B, T, Hkv, 1] for a gate per head)."""
        x = x.astype(jnp.float32)
        if self.attention.gate_rank == 0:
            logits = self.gate(x)
        else:
            down = jnp.matmul(x, self.gate_down.kernel[...], precision=jax.lax.Precision.HIGHEST)
            logits = self.gate_up(down)
        return logits.reshape(*x.shape[:2], self.config.num_kv_heads, -1)

    def recurrence(self, x, q, k, context: Context, state: State | None) -> tuple[Recurrence, State]:
        """Features and log-gates of the linear branch from (already rotated, if wanted) raw q and k, and the next
        convolution rows.

        Padding gets phi(k) = 0 and a log-gate of 0, so that it leaves the state alone.
        """
        a = self.attention
        rows: State = {}
        batch, length, heads, width = q.shape
        if a.conv == "off":
            k = jnp.repeat(k, heads // k.shape[2], axis=2)
        else:
            state = state or {}
            count = _conv_rows(a)
            extended_q, extended_k = extend(state.get("conv_q"), q, count), extend(state.get("conv_k"), k, count)
            rows = {
                "conv_q": last_rows(extended_q, count, context.lengths),
                "conv_k": last_rows(extended_k, count, context.lengths),
            }
            q = self._convolve(extended_q, "q")[:, count:]
            k = self._convolve(extended_k, "k")[:, count:].reshape(batch, length, heads, width)
        map_q, *rest = _map_names(a.tie_qk)
        map_k = rest[0] if rest else map_q
        phi_q, phi_k = self._features(map_q, q), self._features(map_k, k)
        valid = context.valid()[:, :, None, None]
        return Recurrence(phi_q, jnp.where(valid, phi_k, 0), jnp.where(valid, self._log_gates(x), 0)), rows

    def _features(self, name: str, u):
        bias = getattr(self, f"{name}_bias", None)
        return features(self.attention.feature_map, u, getattr(self, name)[...], None if bias is None else bias[...])

    def _log_gates(self, x) -> Float[Array, "B T Hg K"]:
        _, channels = feature_sizes(self.config, self.attention)
        if self.attention.gate_kind == "none":
            return jnp.zeros((*x.shape[:2], 1, channels), jnp.float32)
        log_g = jax.nn.log_sigmoid(self.gate_logits(x)) / self.attention.gate_normalizer
        return jnp.broadcast_to(log_g, (*log_g.shape[:3], channels))

    def _convolve(self, rows, which: str):
        """One or two causal convolutions; k comes out as [B, T, Hkv, G, d], since its taps differ by query head."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        for name in _conv_names(self.attention, which):
            taps = getattr(self, name)[...].swapaxes(0, 1)
            if which == "k" and rows.ndim == 4:
                rows = rows[:, :, :, None]
            if which == "k":
                taps = taps.reshape(taps.shape[0], kv_heads, heads // kv_heads, -1)
            rows, _ = kernels.causal_conv1d(rows, taps)
        return rows

    def _options(self, normalize: bool) -> dict[str, Any]:
        a = self.attention
        return {"normalize": normalize, "gate_lower_bound": a.gate_lower_bound, "implementation": a.implementation}

    def _fused(self) -> bool:
        a = self.attention
        return a.conv in ("on", "shared") and a.feature_map == "softmax_dim" and a.tie_qk and a.gate_kind != "none"

    def _fused_attention(self, x, q, k, v, context: Context, state: State | None):
        a = self.attention
        _, channels = feature_sizes(self.config, a)
        logits = self.gate_logits(x)
        logits = jnp.broadcast_to(logits, (*logits.shape[:3], channels))
        conv_q = self.conv_q[...]
        conv_k = conv_q if a.conv == "shared" else self.conv_k[...]
        o, (S, z), (rows_q, rows_k) = parallel.lawcat_attention(
            q,
            k,
            v,
            logits,
            conv_q,
            conv_k,
            self.feature_map[...],
            initial_state=None if state is None else (state["S"], state["z"]),
            conv_state=None if state is None else (state["conv_q"], state["conv_k"]),
            gate_normalizer=a.gate_normalizer,
            lengths=context.lengths,
            zero_padding=False,  # attention is causal: what stands at padding on the right reaches no valid token
            **self._options(a.normalize),
        )
        return o, {"S": S, "z": z, "conv_q": rows_q, "conv_k": rows_k}

    def _with_window(self, x, q, k, v, linear_q, linear_k, context: Context, state: State | None):
        """Softmax over the window and gated linear attention over everything, under one denominator."""
        window_q, window_k = (rotate(array, context.cos, context.sin) for array in (q, k))
        old = None if state is None else state["window"]
        window, _, new_window = window_attention(window_q, window_k, v, self.attention, context, old)
        parts, rows = self.recurrence(x, linear_q, linear_k, context, state)
        numerator, denominator, (S, z) = linear_terms(parts, v, state, self._options(False))
        factor = self.window_factor[...]
        o = joint(window, numerator, denominator, factor, affine=self.attention.affine_window)
        return o.astype(v.dtype), {"S": S, "z": z, **rows, "window": new_window}


def _conv_rows(attention: AttentionConfig) -> int:
    """Raw rows of the past that the convolutions reach."""
    return (attention.conv_size - 1) * (2 if attention.conv == "stacked" else 1)


def _conv_names(attention: AttentionConfig, which: str | None = None) -> tuple[str, ...]:
    """Names of the tap parameters, of q, of k, or (None) of all that exist."""
    names = {"on": (("conv_q",), ("conv_k",)), "shared": (("conv_q",), ("conv_q",)), "off": ((), ())}
    names["stacked"] = (("conv_q", "conv_q2"), ("conv_k", "conv_k2"))
    of_q, of_k = names[attention.conv]
    if which is None:
        return tuple(dict.fromkeys((*of_q, *of_k)))
    return of_q if which == "q" else of_k


def _map_names(tied: bool) -> tuple[str, ...]:
    return ("feature_map",) if tied else ("feature_map_q", "feature_map_k")


def _recur(parts: Recurrence, v, state: State | None, options: dict[str, Any]):
    """Gated linear attention on float32 features; one token with a state takes the decoding step."""
    initial = None if state is None else (state["S"], state["z"])
    if parts.q.shape[1] == 1 and initial is not None:
        arrays = (array[:, 0] for array in (parts.q, parts.k, v, parts.log_g))
        o, new = kernels.decode_step(*arrays, initial, **options)
        return o[:, None], new
    return parallel.gated_linear_attention(parts.q, parts.k, v, parts.log_g, initial_state=initial, **options)


def linear_terms(parts: Recurrence, v: Float[Array, "B T Hkv d"], state: State | None, options: dict[str, Any]):
    """Numerator [B, T, H, d] and denominator [B, T, H] of the linear branch apart, float32, and the next (S, z).

    The denominator is one more value column that is always 1, so both come out of one call.
    """
    v = v.astype(jnp.float32)
    widened = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if state is not None:
        S = jnp.concatenate([state["S"], state["z"][..., None]], axis=-1)
        state = {"S": S, "z": state["z"]}
    o, (S, z) = _recur(parts, widened, state, options)
    return o[..., :-1], o[..., -1], (S[..., :-1], z)
