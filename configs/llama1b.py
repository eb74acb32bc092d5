"""Llama-3.2-1B to a LAWCAT student on passkey data, with the recipe of the paper as far as it is known.

Command: ``python -m lawcat_jax.train --config=configs/llama1b.py`` (``:instruct`` for the Instruct model). Check first,
without weights: add ``--config.dry_run=True``. The teacher is gated on the Hugging Face hub: accept its licence and log
in (``hf auth login``), or give a local copy with ``--config.teacher.source=<directory>``.

Hardware: one accelerator with 24 GB or more. ``:gpu`` is ``base`` for GPUs with 40 GB or more: the same training, with
layers unrolled, no activations recomputed and the model whole on every GPU. Data: 10,000 passkey samples of 870 words,
about 1.16 K tokens each.
Expected from the paper: S-NIAH-1 100 % at 1K to 4K tokens and 80 % at 8K (with its own distillation data).
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
    """The experiment; ``variant`` is ``base``, ``instruct`` or ``gpu``."""
    sources = {"base": "meta-llama/Llama-3.2-1B", "instruct": "meta-llama/Llama-3.2-1B-Instruct"}
    sources["gpu"] = sources["base"]
    gpu = variant == "gpu"
    if variant not in sources:
        raise ValueError(f"unknown variant {variant!r}, known: {', '.join(sources)}")
    data = DataConfig(kind="passkey", passkey_words=870, num_samples=10_000, validation_samples=100)
    return Config(
        teacher=TeacherConfig(
            source=sources[variant],
            architecture=ModelConfig(
                family="llama",
                vocab_size=128256,
                hidden_size=2048,
                num_layers=16,
                num_heads=32,
                num_kv_heads=8,
                head_dim=64,
                mlp_size=8192,
                rms_norm_eps=1e-5,
                rope_theta=500000.0,
                rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
                max_position_embeddings=131072,
                tie_embeddings=True,
            ),
        ),
        attention=AttentionConfig(gate_rank=32),
        lora=LoraConfig(rank=8, alpha=16.0),
        stage1=StageConfig(
            epochs=4,
            batch_size=8,
            seq_length=LENGTH,
            learning_rate=1e-2,
            schedule="cosine",
            warmup_fraction=0.01,
            trainable=(r"^mixers/",),
            eval_every=500,
            unroll_layers=gpu,
            data=data,
        ),
        stage2=StageConfig(
            epochs=4,
            batch_size=8,
            seq_length=LENGTH,
            learning_rate=1e-4,
            schedule="cosine",
            warmup_fraction=0.01,
            trainable=(r"^lora/",),
            eval_every=500,
            remat="none" if gpu else "layer",
            unroll_layers=gpu,
            loss_chunk=256,  # 128 K logits a token: at once they would take 5 GB
            data=data,
        ),
        # One GPU holds the model: several share the batch, and exchange only the gradients of what is trained.
        mesh=MeshConfig(data=-1, fsdp=1) if gpu else MeshConfig(),
        eval=EvalConfig(lengths=(1024, 2048, 4096, 8192, 16384), samples=50, batch_size=10),
    )
