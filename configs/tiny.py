"""Linearize the embedded teacher on a laptop: ``python -m lawcat_jax.train --config=configs/tiny.py``.

Hardware: a 2-core CPU is enough. The teacher (``lawcat_jax/assets/tiny_llama``, trained by ``configs/tiny_teacher.py``)
solves passkey retrieval within its context of 256 tokens and fails beyond it; the student is evaluated up to 16x.
"""

from lawcat_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    StageConfig,
    TeacherConfig,
)

LENGTH = 256


def get_config() -> Config:
    """The experiment."""
    data = DataConfig(
        kind="passkey", passkey_words=0, min_length_fraction=0.5, num_samples=20_000, validation_samples=32
    )
    return Config(
        teacher=TeacherConfig(source="asset:tiny_llama"),
        attention=AttentionConfig(gate_rank=16),
        stage1=StageConfig(
            steps=300,
            batch_size=16,
            seq_length=LENGTH,
            learning_rate=1e-2,
            clip_norm=1.0,
            trainable=(r"^mixers/",),
            eval_every=100,
            data=data,
        ),
        stage2=StageConfig(
            steps=600,
            batch_size=16,
            seq_length=LENGTH,
            learning_rate=1e-3,
            clip_norm=1.0,
            trainable=(r"^lora/", r"^mixers/"),
            eval_every=100,
            data=data,
        ),
        checkpoint=CheckpointConfig(every_steps=100),
        log=LogConfig(every_steps=20),
        eval=EvalConfig(
            lengths=tuple(LENGTH * factor for factor in (1, 2, 4, 8, 16)),
            samples=50,
            batch_size=10,
            passkey_form="train",
        ),
    )
