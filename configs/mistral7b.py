"""Mistral-7B v0.1 to a LAWCAT student on passkey data, with the recipe of the paper as far as it is known.

Command: ``python -m lawcat_jax.train --config=configs/mistral7b.py``. Check first, without weights: add
``--config.dry_run=True``. A local copy of the teacher: ``--config.teacher.source=<directory>``.

Hardware: one accelerator with 80 GB, or several (weights and batch are split over the ``fsdp`` axis).
Data: 10,000 passkey samples of 870 words. Expected from the paper: passkey above 90 % up to 22K tokens.
"""

from lawcat_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    StageConfig,
    TeacherConfig,
)

LENGTH = 1408  # the samples are longer here than with Llama's tokenizer; a multiple of 128 suits the kernels


def get_config() -> Config:
    """The experiment."""
    data = DataConfig(kind="passkey", passkey_words=870, num_samples=10_000, validation_samples=100)
    return Config(
        teacher=TeacherConfig(
            source="mistralai/Mistral-7B-v0.1",
            architecture=ModelConfig(
                family="mistral",
                vocab_size=32000,
                hidden_size=4096,
                num_layers=32,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                mlp_size=14336,
                rms_norm_eps=1e-5,
                rope_theta=10000.0,
                max_position_embeddings=32768,
                sliding_window=4096,
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
            remat="layer",
            loss_chunk=512,
            data=data,
        ),
        eval=EvalConfig(lengths=(1024, 2048, 4096, 8192, 16384, 22528), samples=50, batch_size=10),
    )
