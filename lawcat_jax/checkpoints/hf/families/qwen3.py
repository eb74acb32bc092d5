"""Qwen3 (dense): Qwen2 with a norm over every head of q and k, and a head size of its own."""

from lawcat_jax.checkpoints.hf.families.family import Family, biases_from_hf
from lawcat_jax.checkpoints.hf.families.qwen2 import DEFAULTS, read_window, write_window

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    defaults={**DEFAULTS, "head_dim": 128},
    options=frozenset({"attention_bias", "layer_types"}),
    read=lambda fields: {"qk_norm": "head", "projection_biases": biases_from_hf(fields), **read_window(fields)},
    write=lambda config: {"attention_bias": "q_proj" in config.projection_biases, **write_window(config)},
)
