"""Phi-3, Phi-3.5 and Phi-4 (text): Llama with q, k and v in one matrix, gate and up in another, and longrope."""

from __future__ import annotations

from typing import Any

from lawcat_jax.checkpoints.hf.families.family import Family
from lawcat_jax.checkpoints.hf.fields import Fields
from lawcat_jax.checkpoints.hf.rope_map import longrope_attention_factor, rope_entry
from lawcat_jax.config import ModelConfig


def _read(fields: Fields) -> dict[str, Any]:
    share = rope_entry(fields, "partial_rotary_factor")
    return {
        "sliding_window": fields.get("sliding_window"),
        "partial_rotary_factor": 1.0 if share is None else share,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "sliding_window": config.sliding_window,
        "partial_rotary_factor": config.partial_rotary_factor,
    }
    scaling = config.rope_scaling
    original = scaling.original_max_position_embeddings
    if scaling.kind == "longrope":
        values["original_max_position_embeddings"] = original
        factor = config.max_position_embeddings / original
        if (scaling.factor, scaling.attention_factor) == (factor, longrope_attention_factor(factor, original)):
            # Version 4 of transformers takes these three fields, and refuses the others that follow from them.
            values["rope_scaling"] = {
                "type": "longrope",
                "short_factor": list(scaling.short_factor),
                "long_factor": list(scaling.long_factor),
            }
    return values


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    options=frozenset({"partial_rotary_factor"}),
    read=_read,
    write=_write,
    renamed={
        "attention/q_proj": "self_attn.qkv_proj",
        "attention/k_proj": "self_attn.qkv_proj",
        "attention/v_proj": "self_attn.qkv_proj",
        "mlp/gate_proj": "mlp.gate_up_proj",
        "mlp/up_proj": "mlp.gate_up_proj",
    },
    rope_types={"su": "longrope", "yarn": "longrope"},
)
