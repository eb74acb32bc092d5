"""A model so small that compiling its steps takes seconds, in the form of a config file."""

from lawcat_jax.config import (
    AttentionConfig,
    Config,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RopeScaling,
    StageConfig,
    TeacherConfig,
)

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=32,
    rope_theta=500.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
    max_position_embeddings=64,
    tie_embeddings=True,
)


def get_config() -> Config:
    """The configuration; both stages as in the paper's recipe."""
    sizes = {"batch_size": 2, "seq_length": 24, "steps": 100, "learning_rate": 1e-3}
    return Config(
        teacher=TeacherConfig(source="none", architecture=MODEL, dtype="float32"),
        attention=AttentionConfig(gate_rank=4),
        lora=LoraConfig(rank=2, alpha=4.0),
        stage1=StageConfig(trainable=(r"^mixers/",), **sizes),
        stage2=StageConfig(trainable=(r"^lora/",), **sizes),
        mesh=MeshConfig(data=-1, fsdp=1),
    )
