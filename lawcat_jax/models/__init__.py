"""Decoder of teacher and student, and how to make one from plain parameters.

Parameters travel as plain nested dicts of arrays; kernels are [in, out]; L layers, of which M are linearised, stacked
on axis 0::

    embed/embedding [V, D]                 final_norm/scale [D]          lm_head/kernel [D, V] (absent when tied)
    layers/{input_norm,post_attention_norm}/scale [L, D]
    layers/attention/{q,k,v,o}_proj/kernel [L, in, out]
    layers/mlp/{gate,up,down}_proj/kernel [L, in, out]
    where the family has them: layers/{attention,mlp}/*_proj/bias [L, out]; layers/attention/{q,k}_norm/scale [L, d]
        or [L, H d] and [L, Hkv d]; layers/{attention_output_norm,mlp_output_norm}/scale [L, D] in place of the two above
    mixers/... [M, ...]: see the classes of lawcat_jax.models.mixers
    lora/{q,k,v,o}_proj/{a [M, in, r], b [M, r, out]}

The base part is the same in teacher and student.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.common import target_platform
from kernels_pallas.dispatch import platform_of
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.models.cache import Cache
from lawcat_jax.models.decoder import Decoder, build_lora, build_mixers, num_linear
from lawcat_jax.models.lora import merge_lora

__all__ = ["Cache", "Decoder", "abstract", "bind", "for_this_machine", "init_params", "merge_lora", "num_linear"]


def abstract(
    config: ModelConfig, attention: AttentionConfig | None = None, lora: LoraConfig | None = None, *, dtype=jnp.float32
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """(graphdef, nested dict of ``jax.ShapeDtypeStruct``), nothing allocated; base parameters have ``dtype``."""
    model = nnx.eval_shape(lambda: Decoder(config, attention, lora, rngs=nnx.Rngs(0), dtype=dtype))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def for_this_machine(attention: AttentionConfig | None) -> AttentionConfig | None:
    """``attention`` with the best implementation that there is where its own runs on another kind of device than this
    machine's: a student trained on a GPU is read on a CPU as well. Says so.
    """
    platform = target_platform()
    if attention is None or not (needed := platform_of(attention.implementation, platform)):
        return attention
    print(
        f"implementation {attention.implementation} runs on {needed}, this machine has {platform}: taking the best one here",
        file=sys.stderr,
    )
    return dataclasses.replace(attention, implementation=None)


def init_params(
    config: ModelConfig,
    attention: AttentionConfig | None = None,
    lora: LoraConfig | None = None,
    *,
    seed: int,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fresh parameters as a nested dict, float32.

    With ``base`` (the parameters of a teacher) only mixers and adapters are drawn; they do not depend on whether it is
    given.
    """
    abstract(config, attention, lora)  # reports a bad config before anything is drawn
    keys = jax.random.split(jax.random.key(seed), 3)
    if base is None:
        params = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=keys[0]))))
    else:
        params = {name: value for name, value in base.items() if name not in ("mixers", "lora")}
    if attention is not None and num_linear(config, attention):
        mixers = build_mixers(config, attention, rngs=nnx.Rngs(params=keys[1]))
        params["mixers"] = nnx.to_pure_dict(nnx.state(mixers))
        if lora is not None:
            params["lora"] = nnx.to_pure_dict(
                nnx.state(build_lora(config, attention, lora, rngs=nnx.Rngs(params=keys[2])))
            )
    return params


def bind(graphdef: nnx.GraphDef, params: dict[str, Any]) -> Decoder:
    """The decoder of :func:`abstract` with these parameters; cheap, meant for use inside ``jax.jit``."""
    return nnx.merge(graphdef, params)
