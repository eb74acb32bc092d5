"""Train the embedded teacher: ``python -m lawcat_jax.train --config=configs/tiny_teacher.py``.

A Llama of about 1 M parameters, on passkey samples of at most 256 tokens. The result, in Hugging Face format, is
``<workdir>/teacher``; a copy of it is ``lawcat_jax/assets/tiny_llama``.
"""

from lawcat_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    StageConfig,
    TeacherConfig,
)

LENGTH = 256


def get_config() -> Config:
    """The experiment."""
    return Config(
        teacher=TeacherConfig(
            tokenizer="asset:tiny_llama",
            architecture=ModelConfig(
                family="llama",
                vocab_size=1024,
                hidden_size=128,
                num_layers=4,
                num_heads=4,
                num_kv_heads=4,
                head_dim=32,
                mlp_size=384,
                max_position_embeddings=LENGTH,
                tie_embeddings=True,
            ),
        ),
        pretrain=StageConfig(
            steps=3000,
            batch_size=32,
            seq_length=LENGTH,
            learning_rate=2e-3,
            warmup_fraction=0.05,
            clip_norm=1.0,
            eval_every=500,
            data=DataConfig(
                kind="passkey",
                passkey_words=0,
                min_length_fraction=0.3,
                prompt_weight=0.3,
                num_samples=100_000,
                validation_samples=64,
            ),
        ),
        stage1=StageConfig(enabled=False),
        stage2=StageConfig(enabled=False),
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=50),
        eval=EvalConfig(lengths=(LENGTH // 2, LENGTH, 2 * LENGTH), samples=50, passkey_form="train"),
    )
