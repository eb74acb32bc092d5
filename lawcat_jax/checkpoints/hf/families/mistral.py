"""Mistral 7B and its kin: Llama whose layers all see a sliding window, or none (version 0.2 and later)."""

from lawcat_jax.checkpoints.hf.families.family import Family

FAMILY = Family(
    architecture="MistralForCausalLM",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    read=lambda fields: {"sliding_window": fields.get("sliding_window")},
    write=lambda config: {"sliding_window": config.sliding_window},
)
