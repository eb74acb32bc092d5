"""Qwen2 and Qwen2.5: bias on q, k and v; with ``use_sliding_window`` the layers from ``max_window_layers`` on have one."""

from __future__ import annotations

from typing import Any

from lawcat_jax.checkpoints.hf.families.family import Family, window_from_hf, window_to_hf
from lawcat_jax.checkpoints.hf.fields import Fields
from lawcat_jax.config import ModelConfig

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_window(fields: Fields) -> dict[str, Any]:
    """The window of Qwen2 and Qwen3."""
    first = fields.number("max_window_layers")
    return window_from_hf(fields, lambda layer: layer >= first)


def write_window(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`read_window`."""
    values = window_to_hf(config)
    kinds = values["layer_types"]
    first = kinds.index("sliding_attention") if values["use_sliding_window"] else len(kinds)
    return {**values, "max_window_layers": first}


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    defaults=DEFAULTS,
    options=frozenset({"layer_types"}),
    read=lambda fields: {"projection_biases": ("q_proj", "k_proj", "v_proj"), **read_window(fields)},
    write=write_window,
)
