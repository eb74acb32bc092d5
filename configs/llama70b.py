"""Llama-3.1-70B to a LAWCAT student on passkey data: the recipe of configs/llama8b.py on a v5p-512 slice.

Command: ``python -m lawcat_jax.train --config=configs/llama70b.py`` on every host (see launch/README.md), with a workdir
in a bucket. Check first: ``python -m lawcat_jax.aot --config=configs/llama70b.py --topology=v5p:4x8x8``. The teacher is
gated on the Hugging Face hub; convert it once into the bucket and name that with ``--config.teacher.source``.

Hardware: v5p-512 (256 chips; 512 are the cores). Heads and MLP are split 8 ways, as many as there are kv heads; the rest
of the slice splits weights and the 32 sequences of a batch (the learning rates are those of 8 sequences: nothing has
been tuned at this size, and there is no published number to compare with).
"""

from lawcat_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RopeScaling,
    StageConfig,
    TeacherConfig,
)

LENGTH = 1280  # samples have about 1.16 K tokens; a multiple of 128 suits the kernels


def get_config(variant: str = "base") -> Config:
    """The experiment; ``variant`` is ``base`` or ``instruct``."""
    sources = {"base": "meta-llama/Llama-3.1-70B", "instruct": "meta-llama/Llama-3.1-70B-Instruct"}
    if variant not in sources:
        raise ValueError(f"unknown variant {variant!r}, known: {', '.join(sources)}")
    data = DataConfig(kind="passkey", passkey_words=870, num_samples=10_000, validation_samples=96)
    common = {
        "epochs": 4,
        "batch_size": 32,
        "seq_length": LENGTH,
        "schedule": "cosine",
        "warmup_fraction": 0.01,
        "eval_every": 250,
        "data": data,
    }
    return Config(
        teacher=TeacherConfig(
            source=sources[variant],
            dtype="bfloat16",
            architecture=ModelConfig(
                family="llama",
                vocab_size=128256,
                hidden_size=8192,
                num_layers=80,
                num_heads=64,
                num_kv_heads=8,
                head_dim=128,
                mlp_size=28672,
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
        mesh=MeshConfig(fsdp=-1, tensor=8),
        eval=EvalConfig(lengths=(1024, 2048, 4096, 8192, 16384), samples=48, batch_size=16),
    )
