"""Low-rank adapters on the projections of the linearised layers (paper section 3.3; LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.models.layers import Stack, param, static_config
from lawcat_jax.projections import LORA_TARGETS, PROJECTIONS

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def _kaiming_uniform(key, shape, dtype):
    bound = (1.0 / shape[-2]) ** 0.5  # PEFT: kaiming_uniform with a = sqrt(5), that is 1 / sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class LoraPair(nnx.Module):
    """Factors a [in, r] and b [r, out] of one projection; b starts at 0, so that the adapter starts as nothing."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, rngs: nnx.Rngs, stack: Stack = ()):
        self.a = param(rngs, _kaiming_uniform, stack, (inputs, rank))
        self.b = nnx.Param(jnp.zeros((*stack, rank, outputs), jnp.float32))


class Lora(nnx.Module):
    """Adapters of one layer (or of a stack of layers): y += (alpha / r) dropout(x) a b."""

    def __init__(self, config: ModelConfig, lora: LoraConfig, *, rngs: nnx.Rngs, stack: Stack = ()):
        self.config = static_config(lora)
        for row in PROJECTIONS:
            if row.name in lora.targets:
                setattr(self, row.name, LoraPair(*row.sizes(config), lora.rank, rngs=rngs, stack=stack))

    def delta(self, name: str, x: Float[Array, "*b i"], dropout_key: jax.Array | None) -> Float[Array, "*b o"] | float:
        """The adapter's addition to projection ``name``, in x's dtype; 0.0 where there is none."""
        pair = getattr(self, name, None)
        if pair is None:
            return 0.0
        rate = self.config.dropout
        if dropout_key is not None and rate > 0:
            key = jax.random.fold_in(dropout_key, LORA_TARGETS.index(name))
            x = jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
        scale = self.config.alpha / self.config.rank
        return (x @ pair.a[...].astype(x.dtype)) @ (scale * pair.b[...]).astype(x.dtype)


def merge_lora(params: dict, lora: LoraConfig, attention: AttentionConfig) -> dict:
    """Fold the adapters into the base projections.

    ``params`` is the nested dict of a student; the result is a new dict without ``lora`` whose student logits are the
    same up to rounding (the sum is formed in float32 and cast to the base dtype). The softmax layers of a hybrid are
    left alone.

    Raises:
      UserError: if ``params`` has no adapters.
    """
    if "lora" not in params:
        raise UserError("merge_lora: the parameters hold no 'lora' subtree; nothing to merge")
    projections = dict(params["layers"]["attention"])
    num_layers = projections["q_proj"]["kernel"].shape[0]
    linear = jnp.asarray([layer for layer in range(num_layers) if layer not in attention.softmax_layers])
    for name, pair in params["lora"].items():
        kernel = jnp.asarray(projections[name]["kernel"])
        delta = jnp.einsum(
            "lir,lro->lio",
            jnp.asarray(pair["a"], jnp.float32),
            jnp.asarray(pair["b"], jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        merged = kernel[linear].astype(jnp.float32) + lora.alpha / lora.rank * delta
        projections[name] = {**projections[name], "kernel": kernel.at[linear].set(merged.astype(kernel.dtype))}
    rest = {name: value for name, value in params.items() if name != "lora"}
    return {**rest, "layers": {**params["layers"], "attention": projections}}
