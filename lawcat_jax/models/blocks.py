"""The repeated parts of the decoder: projections, one layer, and how stacks of layers are cut and scanned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import nnx

from lawcat_jax import projections
from lawcat_jax.config import ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.models import parallel
from lawcat_jax.models.layers import Linear, RMSNorm, Stack, SwiGLU, normal, static_config
from lawcat_jax.models.lora import Lora

if TYPE_CHECKING:
    from jaxtyping import Array, Float

REMAT = ("none", "layer", "dots")


class Segment(NamedTuple):
    """Consecutive layers start .. stop - 1 of one kind, the first being number ``first`` of its kind."""

    linear: bool
    start: int
    stop: int
    first: int

    @property
    def mixers(self) -> slice:
        """Where this segment's mixers, adapters and states lie in their stacks."""
        return slice(self.first, self.first + self.stop - self.start)


def split_segments(num_layers: int, softmax_layers: tuple[int, ...]) -> list[Segment]:
    """Maximal runs of softmax or linearised layers, in order."""
    segments: list[Segment] = []
    counts = {True: 0, False: 0}
    for layer in range(num_layers):
        linear = layer not in softmax_layers
        if segments and segments[-1].linear == linear:
            segments[-1] = segments[-1]._replace(stop=layer + 1)
        else:
            segments.append(Segment(linear, layer, layer + 1, counts[linear]))
        counts[linear] += 1
    return segments


class Attention(nnx.Module):
    """The pretrained projections of one layer, with an optional adapter added to each, and the norms of q and k."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stack: Stack, dtype):
        self.config = static_config(config)
        for row in projections.ATTENTION:
            bias = row.has_bias(config)
            setattr(self, row.name, Linear(*row.sizes(config), rngs=rngs, stack=stack, dtype=dtype, bias=bias))
        normed = config.qk_norm != "none"
        self.q_norm = build_norm(config, "attention/q_norm", stack, dtype) if normed else None
        self.k_norm = build_norm(config, "attention/k_norm", stack, dtype) if normed else None

    def _apply(self, name: str, x, adapter: Lora | None, dropout_key):
        y = getattr(self, name)(x)
        return y if adapter is None else y + adapter.delta(name, x, dropout_key)

    def _heads(self, y: Float[Array, "B T N"], norm: RMSNorm | None = None) -> Float[Array, "B T h d"]:
        heads = (*y.shape[:2], -1, self.config.head_dim)
        if norm is None:
            return y.reshape(heads)
        return norm(y.reshape(heads)) if self.config.qk_norm == "head" else norm(y).reshape(heads)

    def qkv(
        self, x: Float[Array, "B T D"], adapter: Lora | None = None, dropout_key: jax.Array | None = None
    ) -> tuple[Float[Array, "B T H d"], Float[Array, "B T Hkv d"], Float[Array, "B T Hkv d"]]:
        """q [B, T, H, d], k and v [B, T, Hkv, d], with bias and norms, before any rotation."""
        q, k, v = (self._apply(name, x, adapter, dropout_key) for name in ("q_proj", "k_proj", "v_proj"))
        return self._heads(q, self.q_norm), self._heads(k, self.k_norm), self._heads(v)

    def output(
        self, o: Float[Array, "B T H d"], adapter: Lora | None = None, dropout_key: jax.Array | None = None
    ) -> Float[Array, "B T D"]:
        """Concatenated heads through Wo."""
        return self._apply("o_proj", o.reshape(*o.shape[:2], -1), adapter, dropout_key)


def build_norm(config: ModelConfig, path: str, stack: Stack, dtype) -> RMSNorm:
    """The norm ``path`` of :func:`lawcat_jax.projections.norms`."""
    letter, _ = projections.norms(config)[path]
    return RMSNorm(projections.axis_sizes(config)[letter], config.rms_norm_eps, stack=stack, dtype=dtype)


class DecoderLayer(nnx.Module):
    """Attention and SwiGLU, each with a norm before it (Llama) or behind it (OLMo 2); the decoder hands in the mixer."""

    if TYPE_CHECKING:  # set by name, the two of its position
        input_norm: RMSNorm
        post_attention_norm: RMSNorm
        attention_output_norm: RMSNorm
        mlp_output_norm: RMSNorm

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stack: Stack, dtype):
        self.norm_after = config.norm_position == "after"
        for path in projections.norms(config):
            if "/" not in path:
                setattr(self, path, build_norm(config, path, stack, dtype))
        self.attention = Attention(config, rngs=rngs, stack=stack, dtype=dtype)
        self.mlp = SwiGLU(config, rngs=rngs, stack=stack, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mix: Callable,
        adapter: Lora | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(next hidden state, what ``mix(h, q, k, v) -> (o, extra)`` returned beside its output)."""
        h = x if self.norm_after else self.input_norm(x)
        o, extra = mix(h, *self.attention.qkv(h, adapter, dropout_key))
        o = self.attention.output(o.astype(x.dtype), adapter, dropout_key)
        x = parallel.constrain(x + (self.attention_output_norm(o) if self.norm_after else o))
        if self.norm_after:
            return parallel.constrain(x + self.mlp_output_norm(self.mlp(x))), extra
        return parallel.constrain(x + self.mlp(self.post_attention_norm(x))), extra


class Embed(nnx.Module):
    """Token embedding [V, D]; also the output head of a model with tied embeddings."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.embedding = nnx.Param(normal(0.02)(rngs.params(), (config.vocab_size, config.hidden_size), dtype))


def rematerialized(function: Callable, remat: str) -> Callable:
    """``function`` with its activations recomputed in the backward pass: "none", "layer" (all) or "dots" (all but
    matrix products).

    Raises:
      UserError: for another name.
    """
    if remat == "none":
        return function
    if remat == "layer":
        return jax.checkpoint(function)
    if remat == "dots":
        return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise UserError(f"remat: {remat!r} is not one of {', '.join(REMAT)}")


class Stacked:
    """The stacked parameters of a module, cut to some layers, and the way back from one layer's slice to the module.

    ``module``: an ``nnx.Module`` (a ``TokenMixer`` is one), or None.
    """

    def __init__(self, module: Any, start: int = 0, stop: int | None = None):
        if module is None:
            self.graphdef, self.params = None, None
            return
        self.graphdef, params = nnx.split(module)
        whole = stop is None or all(start == 0 and stop == leaf.shape[0] for leaf in jax.tree.leaves(params))
        # A slice of stacked weights is a copy; a model whose layers are all of one kind needs none.
        self.params = params if whole else jax.tree.map(lambda leaf: leaf[start:stop], params)

    def layer(self, params: Any) -> Any:
        """The module of one layer."""
        return None if self.graphdef is None else nnx.merge(self.graphdef, params)
