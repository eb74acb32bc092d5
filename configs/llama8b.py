"""Llama-3.1-8B to a LAWCAT student on passkey data, with the recipe of configs/mistral7b.py:paper (the paper has no 8B model).

Command: ``python -m lawcat_jax.train --config=configs/llama8b.py`` (``:instruct`` for the Instruct model). Check first:
``python -m lawcat_jax.aot --config=configs/llama8b.py --topology=v5e:8x8`` says whether it fits a TPU slice. The teacher
is gated on the Hugging Face hub: accept its licence and log in, or give ``--config.teacher.source=<directory>``.

Hardware: v5e-64, v6e-16, a v5p slice, or one GPU with 80 GB. The batch of 8 sequences is split over 8
chips; further chips of a slice go to the ``tensor`` axis. Data: 10,000 passkey samples of 870 words. There is no published
8B number to compare with; the paper's 7B model has passkey above 90 % at many times the training length.
"""

from lawcat_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    RopeScaling,
    StageConfig,
    TeacherConfig,
)

LENGTH = 1280  # samples have about 1.16 K tokens; a multiple of 128 suits the kernels


def get_config(variant: str = "base") -> Config:
    """The experiment; ``variant`` is ``base`` or ``instruct``."""
    sources = {"base": "meta-llama/Llama-3.1-8B", "instruct": "meta-llama/Llama-3.1-8B-Instruct"}
    if variant not in sources:
        raise ValueError(f"unknown variant {variant!r}, known: {', '.join(sources)}")
    data = DataConfig(kind="passkey", passkey_words=870, num_samples=10_000, validation_samples=96)
    common = {
        "epochs": 4,
        "batch_size": 8,
        "seq_length": LENGTH,
        "schedule": "cosine",
        "warmup_fraction": 0.01,
        "eval_every": 500,
        "data": data,
    }
    return Config(
        teacher=TeacherConfig(
            source=sources[variant],
            dtype="bfloat16",
            architecture=ModelConfig(
                family="llama",
                vocab_size=128256,
                hidden_size=4096,
                num_layers=32,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                mlp_size=14336,
                rms_norm_eps=1e-5,
                rope_theta=500000.0,
                rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
                max_position_embeddings=131072,
            ),
        ),
        attention=AttentionConfig(gate_rank=32),
        lora=LoraConfig(rank=8, alpha=16.0),
        stage1=StageConfig(learning_rate=1e-2, trainable=(r"^mixers/",), **common),
        stage2=StageConfig(learning_rate=1e-4, trainable=(r"^lora/",), remat="layer", loss_chunk=256, **common),
        eval=EvalConfig(lengths=(1024, 2048, 4096, 8192, 16384, 22528), samples=50, batch_size=10),
    )
