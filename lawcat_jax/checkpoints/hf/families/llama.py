"""Llama 1 to 3, and everything published in its form (SmolLM2, Vicuna, TinyLlama, ...)."""

from lawcat_jax.checkpoints.hf.families.family import Family, biases_from_hf

FAMILY = Family(
    architecture="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    options=frozenset({"attention_bias", "mlp_bias"}),
    read=lambda fields: {"projection_biases": biases_from_hf(fields)},
    write=lambda config: {
        "attention_bias": "q_proj" in config.projection_biases,
        "mlp_bias": "up_proj" in config.projection_biases,
    },
)
