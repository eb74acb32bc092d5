"""The paper's token mixer: causal convolutions on q and k, Hedgehog features, a low-rank gate, normalised gated linear
attention (arXiv 2509.18467, section 3; details that the text leaves open as in the authors' code).

One layer, for token t and query head h; its key-value head is h // G, G = H / Hkv:

1. ``q = x Wq``, ``k = x Wk``, ``v = x Wv``: the pretrained projections; the decoder makes them.
2. ``a = (x W1) W2 + b``: gate logits for the K features of each key-value head, from the same input.
3. No rotary embedding: order comes from convolution and decay alone.
4. k, v and a of a key-value head serve its G consecutive query heads.
5. ``q~[t] = sum_j wq[h, j] q[t - (W-1) + j]``, and k~ from k with wk: depthwise causal convolutions with taps of each
   query head; tap W - 1 is the current token, no bias, no activation.
6. ``phi(u) = max([softmax(u Phi) ; softmax(-u Phi)], 1e-12)``: K = 2 f features, one matrix Phi per query head for
   q and k.
7. ``g = logsigmoid(a) / 16``, not below ``gate_lower_bound``: log-gates; the bound lets kernels take chunks of tokens.
8. ``S_t = diag(e^g_t) S_(t-1) + phi(k~_t) v_t^T``, ``z_t = e^g_t z_(t-1) + phi(k~_t)``,
   ``o_t = S_t^T phi(q~_t) / (z_t . phi(q~_t) + 1e-10)``: a mean of the values seen, weighted and normalised.
9. The heads' outputs go through the pretrained Wo; the decoder does that.

``kernels_pallas.lawcat_attention`` computes 4 to 8. The ablations of the paper are in
:mod:`lawcat_jax.models.mixers.ablations`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

import kernels_pallas as kernels
from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.models import parallel
from lawcat_jax.models.cache import extend, last_rows
from lawcat_jax.models.layers import Context, Linear, Stack, param, static_config
from lawcat_jax.models.mixers.diagnostics import branch_statistics, gate_statistics
from lawcat_jax.models.mixers.feature_maps import feature_sizes, features
from lawcat_jax.models.mixers.gates import Gate, gate_bias, half_lives
from lawcat_jax.models.mixers.inits import INITS
from lawcat_jax.models.mixers.linear_attention import STATE_RULES, Recurrence, empty_sums, sums_flops
from lawcat_jax.models.mixers.mixer import Rules, State

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class LawcatMixer(nnx.Module):
    """The paper's design: a :class:`~lawcat_jax.models.mixers.mixer.TokenMixer`.

    Parameters, float32 under ``stack`` axes: conv_q, conv_k [H, W, d] (wq, wk); feature_map [H, d, f] (Phi);
    gate_down/kernel [D, r] (W1); gate_up/{kernel [r, Hkv K], bias [Hkv K]} (W2, b).
    """

    parameter_rules: ClassVar[Rules] = {
        r"conv_\w+": P("tensor"),
        r"feature_map": P("tensor"),
        r"gate_down/kernel": P("fsdp"),
        r"gate_up/kernel": P(None, "tensor"),
        r"gate_up/bias": P("tensor"),
    }
    state_rules: ClassVar[Rules] = {**STATE_RULES, r"conv_[qk]": P(parallel.BATCH, None, parallel.HEADS)}

    def __init__(self, config: ModelConfig, attention: AttentionConfig, *, rngs: nnx.Rngs, stack: Stack = ()):
        self.config, self.attention = static_config(config), static_config(attention)
        init = INITS["identity"]
        heads, width, hidden, rank = config.num_heads, config.head_dim, config.hidden_size, attention.gate_rank
        scores, _ = feature_sizes(config, attention)
        bias = gate_bias(half_lives(config, attention), attention.gate_normalizer)
        self.conv_q = param(rngs, init.taps, stack, (heads, attention.conv_size, width))
        self.conv_k = param(rngs, init.taps, stack, (heads, attention.conv_size, width))
        self.feature_map = param(rngs, init.feature_map, stack, (heads, width, scores))
        self.gate_down = Linear(hidden, rank, rngs=rngs, stack=stack, init=init.gate)
        self.gate_up = Gate(rank, bias, rngs=rngs, stack=stack, init=init.gate)

    @staticmethod
    def problems(config: ModelConfig, attention: AttentionConfig) -> list[str]:
        """Nothing beyond what the config itself checks."""
        del config, attention
        return []

    @staticmethod
    def flops_per_token(config: ModelConfig, attention: AttentionConfig) -> float:
        """Convolutions (5), gate (2), features and state (6, 8)."""
        _, channels = feature_sizes(config, attention)
        convolutions = 4 * config.num_heads * config.head_dim * attention.conv_size
        gate = 2 * attention.gate_rank * (config.hidden_size + config.num_kv_heads * channels)
        return convolutions + gate + sums_flops(config, attention)

    @staticmethod
    def empty_state(config: ModelConfig, attention: AttentionConfig, batch: int, dtype: Any) -> State:
        """S [B, H, K, d] and z [B, H, K] float32; the last W - 1 rows of q and k, not convolved, in ``dtype``."""
        rows = (batch, attention.conv_size - 1)
        return {
            **empty_sums(config, attention, batch),
            "conv_q": jnp.zeros((*rows, config.num_heads, config.head_dim), dtype),
            "conv_k": jnp.zeros((*rows, config.num_kv_heads, config.head_dim), dtype),
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
        """(output of the heads before Wo, state after the last valid token); see ``TokenMixer.__call__``."""
        conv_q, conv_k = self.taps()
        o, (S, z), (rows_q, rows_k) = parallel.lawcat_attention(
            *(q, k, v, self.gate_logits(x), conv_q, conv_k, self.feature_map[...]),
            initial_state=None if state is None else (state["S"], state["z"]),
            conv_state=None if state is None else (state["conv_q"], state["conv_k"]),
            gate_normalizer=self.attention.gate_normalizer,
            lengths=context.lengths,
            zero_padding=False,  # attention is causal: what stands at padding on the right reaches no valid token
            **self.options(self.attention.normalize),
        )
        return o, {"S": S, "z": z, "conv_q": rows_q, "conv_k": rows_k}

    def options(self, normalize: bool) -> dict[str, Any]:
        """Options of the kernels for step 8."""
        a = self.attention
        return {"normalize": normalize, "gate_lower_bound": a.gate_lower_bound, "implementation": a.implementation}

    # Steps 2 and 5 to 7 one by one: for the statistics, and for the ablations

    def taps(self) -> tuple[Float[Array, "H W d"], Float[Array, "H W d"]]:
        """wq and wk of step 5."""
        return self.conv_q[...], self.conv_k[...]

    def gate_logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Hkv K"]:
        """Step 2, in float32: half-lives of thousands of tokens need more digits than bfloat16 has."""
        x = x.astype(jnp.float32)
        down = jnp.matmul(x, self.gate_down.kernel[...], precision=jax.lax.Precision.HIGHEST)
        return self.gate_up(down).reshape(*x.shape[:2], self.config.num_kv_heads, -1)

    def convolve(self, q, k, context: Context, state: State | None) -> tuple[Array, Array, State]:
        """Step 5 with 4: (q~ and k~ [B, T, H, d], the state's next rows)."""
        state, count = state or {}, self.attention.conv_size - 1
        rows = {"conv_q": extend(state.get("conv_q"), q, count), "conv_k": extend(state.get("conv_k"), k, count)}
        q, k = (convolved(x, taps)[:, count:] for x, taps in zip(rows.values(), self.taps(), strict=True))
        return q, k, {name: last_rows(x, count, context.lengths) for name, x in rows.items()}

    def featurize(self, q: Float[Array, "B T H d"], k: Float[Array, "B T H d"]) -> tuple[Array, Array]:
        """Step 6: phi(q~) and phi(k~), float32 [B, T, H, K]."""
        phi = self.feature_map[...]
        return features("softmax_dim", q, phi), features("softmax_dim", k, phi)

    def log_gates(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Hkv K"]:
        """Step 7, not yet bounded."""
        return jax.nn.log_sigmoid(self.gate_logits(x)) / self.attention.gate_normalizer

    def recurrence(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        context: Context,
        state: State | None,
    ) -> tuple[Recurrence, State]:
        """(operands of step 8, the state's next convolution rows).

        Padding gets phi(k~) = 0 and a log-gate of 0, so that it leaves S and z alone.
        """
        q, k, rows = self.convolve(q, k, context, state)
        phi_q, phi_k = self.featurize(q, k)
        valid = context.valid()[:, :, None, None]
        return Recurrence(phi_q, jnp.where(valid, phi_k, 0), jnp.where(valid, self.log_gates(x), 0)), rows

    def statistics(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T Hkv d"],
        v: Float[Array, "B T Hkv d"],
        context: Context,
    ) -> dict[str, Array]:
        """:func:`branch_statistics` of each query head and :func:`gate_statistics` of each key-value head."""
        parts, _ = self.recurrence(x, q, k, context, None)
        bound = self.attention.gate_lower_bound
        return branch_statistics(parts, v, context, self.options(False)) | gate_statistics(parts.log_g, bound, context)


MIXER = LawcatMixer


def convolved(rows: Float[Array, "B R Hr d"], taps: Float[Array, "H W d"]) -> Float[Array, "B R H d"]:
    """Step 5 with 4: each query head's taps over the rows of its head (Hr = H for q, Hkv for k)."""
    groups = taps.shape[0] // rows.shape[2]
    taps = taps.swapaxes(0, 1)
    if groups == 1:
        return kernels.causal_conv1d(rows, taps)[0]
    taps = taps.reshape(taps.shape[0], rows.shape[2], groups, -1)
    y, _ = kernels.causal_conv1d(rows[:, :, :, None], taps)
    return y.reshape(*rows.shape[:2], -1, rows.shape[3])
