"""A run of both stages that takes seconds: the ``--config`` file of the tests in this folder."""

from lawcat_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    StageConfig,
    TeacherConfig,
)


def get_config() -> Config:
    """The experiment."""
    data = DataConfig(passkey_words=0, min_length_fraction=0.5, num_samples=64, validation_samples=8)
    stage = {"steps": 4, "batch_size": 8, "seq_length": 96, "learning_rate": 1e-2, "eval_every": 2, "data": data}
    return Config(
        teacher=TeacherConfig(source="asset:tiny_llama"),
        attention=AttentionConfig(gate_rank=4),
        lora=LoraConfig(rank=2),
        stage1=StageConfig(trainable=("^mixers/",), **stage),
        stage2=StageConfig(trainable=("^lora/", "^mixers/"), **stage),
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(every_steps=1, tensorboard=False, diagnostics=False, progress="lines"),
        eval=EvalConfig(enabled=False),
    )
