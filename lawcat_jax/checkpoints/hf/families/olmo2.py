"""OLMo 2: norms behind attention and MLP instead of before them, and over all heads of q and of k together."""

from lawcat_jax.checkpoints.hf.families.family import Family, biases_from_hf

FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1},
    options=frozenset({"attention_bias"}),
    read=lambda fields: {
        "norm_position": "after",
        "qk_norm": "projection",
        "projection_biases": biases_from_hf(fields),
    },
    write=lambda config: {"attention_bias": "q_proj" in config.projection_biases},
)
