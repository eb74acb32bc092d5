"""Floating-point operations: what a model needs (for utilisation), and what a traced program does."""

from __future__ import annotations

import math
from typing import Any

from lawcat_jax.config import AttentionConfig, Config, LoraConfig, ModelConfig


def layer_weights(model: ModelConfig) -> int:
    """Weights of the matrices of one decoder layer."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return model.hidden_size * (2 * queries + 2 * keys + 3 * model.mlp_size)


def softmax_attention(model: ModelConfig, length: int) -> float:
    """A token and layer of causal softmax attention over ``length`` tokens, forward (mean over the positions)."""
    window = min(length, model.sliding_window or length)
    seen = (length * window - window * (window - 1) / 2) / length
    return 4 * model.num_heads * model.head_dim * seen


def linear_attention(model: ModelConfig, attention: AttentionConfig) -> float:
    """A token and layer of the token mixer in its recurrent form, forward: convolutions, features, gate, state."""
    heads, width, hidden = model.num_heads, model.head_dim, model.hidden_size
    scores = attention.feature_dim or width // 2
    gates = model.num_kv_heads * 2 * scores
    rank = attention.gate_rank
    gate = 2 * (rank * (hidden + gates) if rank else hidden * gates) if attention.gate_kind != "none" else 0
    convolutions = 0 if attention.conv == "off" else 4 * heads * width * attention.conv_size
    window = 4 * heads * width * (attention.window_size + attention.sinks)
    return convolutions + 4 * heads * width * scores + gate + 4 * heads * 2 * scores * width + window


def adapters(model: ModelConfig, lora: LoraConfig) -> float:
    """A token and layer of the adapters, forward."""
    queries, keys, hidden = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.hidden_size
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    return sum(2 * lora.rank * (hidden + sizes[name]) for name in lora.targets)


def model_flops(what: str, config: Config, model: ModelConfig, length: int) -> float:
    """Operations a token that ``what`` ("pretrain", "stage1", "stage2", "prefill" or "decode") needs, two for each
    multiplication and addition.

    Recomputation is not counted, nor work on frozen weights' gradients: stage 1 is the teacher's forward pass (without
    the output head) and three passes of the mixers; stage 2 a forward and a backward pass for activations, with three
    passes of adapters and mixers; ``pretrain`` three passes of everything.
    """
    attention = config.attention
    softmax = model.num_layers if what == "pretrain" else len(attention.softmax_layers)
    linear = model.num_layers - softmax
    matrices = 2.0 * model.num_layers * layer_weights(model)
    head = 2.0 * model.hidden_size * model.vocab_size
    mixers = linear * linear_attention(model, attention)
    teacher = model.num_layers * softmax_attention(model, length)
    others = softmax * softmax_attention(model, length)
    if what == "pretrain":
        return 3 * (matrices + head + teacher)
    if what == "stage1":
        return matrices + teacher + 3 * mixers
    if what == "stage2":
        lora = linear * adapters(model, config.lora)
        distil = (
            matrices + head + teacher if max(config.stage2.kl_weight, config.stage2.kl_weight_end or 0) > 0 else 0.0
        )
        return 2 * (matrices + head) + 3 * (mixers + lora + others) + distil
    lora = linear * adapters(model, config.lora) if config.stage2.enabled else 0.0
    return matrices + mixers + lora + others + (head if what == "decode" else 0.0)


def traced_flops(jaxpr: Any) -> float:
    """Operations of the matrix products in a jaxpr, over all devices, recomputation and loops included.

    Kernels count their declared cost, else the products of their body times the grid; of branches the dearest counts.
    Loops without a known length count once.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "pallas_call":
        cost = params.get("cost_estimate")
        if cost is not None and cost.flops:
            return float(cost.flops)
        steps = math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
        return steps * traced_flops(params["jaxpr"])
    if name == "scan":
        return params["length"] * traced_flops(params["jaxpr"])
    if name == "cond":
        return max(map(traced_flops, params["branches"]))
    if name == "shard_map":
        return params["mesh"].size * traced_flops(params["jaxpr"])
    return sum(map(traced_flops, inner_jaxprs(params)))


def inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """Jaxprs among the parameters of an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                found.append(item)
    return found
