"""Floating-point operations that a model needs, to hold a measured speed against what devices can do."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lawcat_jax.config import Config, LoraConfig, ModelConfig
from lawcat_jax.models.mixers import mixer_class


def layer_weights(model: ModelConfig) -> int:
    """Weights of the matrices of one decoder layer."""
    return sum(_matrices(model).values())


def _matrices(model: ModelConfig) -> dict[str, int]:
    """Path of each matrix of a decoder layer -> its weights."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    widths = {
        **{f"attention/{name}_proj": width for name, width in zip("qkvo", (queries, keys, keys, queries), strict=True)},
        **{f"mlp/{name}_proj": model.mlp_size for name in ("gate", "up", "down")},
    }
    return {f"layers/{name}/kernel": model.hidden_size * width for name, width in widths.items()}


def trained_weights(model: ModelConfig, patterns: Sequence[str]) -> int:
    """Weights of the decoder's own matrices, of all layers and the output head, that train with a stage's ``trainable``."""

    def trains(path: str) -> bool:
        return any(re.search(pattern, path) for pattern in patterns)

    layers = sum(weights for path, weights in _matrices(model).items() if trains(path))
    head = trains("embed/embedding" if model.tie_embeddings else "lm_head/kernel")
    return model.num_layers * layers + (model.hidden_size * model.vocab_size if head else 0)


def softmax_attention(model: ModelConfig, length: int) -> float:
    """Operations per token and layer of causal softmax attention over ``length`` tokens, forward (mean over the
    positions), with the teacher's sliding window if it has one.
    """
    window = min(length, model.sliding_window or length)
    seen = (length * window - window * (window - 1) / 2) / length
    return 4 * model.num_heads * model.head_dim * seen


def adapters(model: ModelConfig, lora: LoraConfig) -> float:
    """Operations per token and layer of the adapters, forward."""
    queries, keys, hidden = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, model.hidden_size
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    return sum(2 * lora.rank * (hidden + sizes[name]) for name in lora.targets)


def model_flops(what: str, config: Config, model: ModelConfig, length: int) -> float:
    """Operations per token that ``what`` ("pretrain", "stage1", "stage2", "prefill" or "decode") needs on sequences of
    ``length`` tokens, two for each multiplication and addition.

    Recomputation is not counted, nor work on frozen weights' gradients: stage 1 is the teacher's forward pass (without
    the output head) and three passes of the mixers; stage 2 a forward and a backward pass for activations, with three
    passes of adapters and mixers, and of the matrices that ``trainable`` names; ``pretrain`` three passes of everything.
    """
    attention = config.attention
    softmax = model.num_layers if what == "pretrain" else len(attention.softmax_layers)
    linear = model.num_layers - softmax
    matrices = 2.0 * model.num_layers * layer_weights(model)
    head = 2.0 * model.hidden_size * model.vocab_size
    mixers = linear * mixer_class(attention).flops_per_token(model, attention)
    teacher = model.num_layers * softmax_attention(model, length)
    others = softmax * softmax_attention(model, length)
    if what == "pretrain":
        return 3 * (matrices + head + teacher)
    if what == "stage1":
        return matrices + teacher + 3 * mixers
    if what == "stage2":
        lora = linear * adapters(model, config.lora)
        runs = max(config.stage2.kl_weight, config.stage2.kl_weight_end or 0) > 0 and not config.stage2.teacher_logits
        distil = matrices + head + teacher if runs else 0.0
        gradients = 2.0 * trained_weights(model, config.stage2.trainable)
        return 2 * (matrices + head) + gradients + 3 * (mixers + lora + others) + distil
    lora = linear * adapters(model, config.lora) if config.stage2.enabled else 0.0
    return matrices + mixers + lora + others + (head if what == "decode" else 0.0)
