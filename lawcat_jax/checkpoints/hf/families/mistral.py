"""Mistral 7B and its kin: Llama whose layers all see a sliding window, or none (version 0.2 and later)."""

from __future__ import annotations

from typing import Any

from lawcat_jax.checkpoints.hf.families.family import Family
from lawcat_jax.checkpoints.hf.fields import Fields


def _read(fields: Fields) -> dict[str, Any]:
    """The window, unless ``layer_types`` says of every layer that it has none: transformers' Auto classes take a Mistral
    that states them for a Ministral, which obeys them. Lists that differ between layers are refused before this.
    """
    kinds = set(map(str, fields.per_layer("layer_types") or ["sliding_attention"]))
    if not kinds <= {"sliding_attention", "full_attention"}:
        fields.fail(f"layer_types: {min(kinds)!r} is not supported; supported: full_attention, sliding_attention")
    return {"sliding_window": None if kinds == {"full_attention"} else fields.get("sliding_window")}


FAMILY = Family(
    architecture="MistralForCausalLM",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    read=_read,
    write=lambda config: {"sliding_window": config.sliding_window},
)
