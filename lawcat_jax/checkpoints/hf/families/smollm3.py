"""SmolLM3: Llama with layers that have no rotary embedding, every fourth one unless ``no_rope_layers`` says otherwise."""

from __future__ import annotations

from typing import Any

from lawcat_jax.checkpoints.hf.families.family import Family, biases_from_hf, window_from_hf, window_to_hf
from lawcat_jax.checkpoints.hf.fields import Fields
from lawcat_jax.config import ModelConfig


def _read(fields: Fields) -> dict[str, Any]:
    rotated = fields.per_layer("no_rope_layers")  # 1 where a layer does have the embedding, despite the name
    if rotated is None:
        interval = fields.number("no_rope_layer_interval")
        if interval < 1:
            fields.fail(f"no_rope_layer_interval: {interval} must be at least 1")
        rotated = [(layer + 1) % interval for layer in range(fields.number("num_hidden_layers"))]
    nope = tuple(layer for layer, on in enumerate(rotated) if not on)
    return {
        "nope_layers": nope,
        "projection_biases": biases_from_hf(fields),
        **window_from_hf(fields, lambda layer: layer in nope),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": "q_proj" in config.projection_biases,
        "mlp_bias": "up_proj" in config.projection_biases,
        "no_rope_layers": [int(layer not in config.nope_layers) for layer in range(config.num_layers)],
        **window_to_hf(config),
    }


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    options=frozenset({"attention_bias", "mlp_bias", "layer_types"}),
    read=_read,
    write=_write,
)
