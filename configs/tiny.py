"""Linearize the embedded teacher on a laptop: ``python -m lawcat_jax.train --config=configs/tiny.py``.

The teacher (``lawcat_jax/assets/tiny_llama``, trained by ``configs/tiny_teacher.py``) solves passkey retrieval within
its context of 128 tokens and fails beyond it. The student is trained on samples of 128 tokens as well, starting from
the paper's initialisation, and evaluated up to 16x. Conv, feature map and gate go on learning beside the adapters in
stage 2: in a model of this size the adapters alone reach less far. Every sample that is trained on has at most 128
tokens; which of stage 2's checkpoints is kept is decided on 32 held-out samples of 1024, since the loss at 128 is about
the same for students that reach far and students that do not.

Hardware: a 2-core CPU; time and accuracy as measured are in the README.
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

LENGTH = 128


def get_config() -> Config:
    """The experiment."""
    data = DataConfig(kind="passkey", passkey_words=0, num_samples=20_000, validation_samples=32)
    stage = {"batch_size": 16, "seq_length": LENGTH, "clip_norm": 1.0, "warmup_fraction": 0.02, "data": data}
    return Config(
        teacher=TeacherConfig(source="asset:tiny_llama"),
        attention=AttentionConfig(gate_rank=16),
        stage1=StageConfig(steps=200, learning_rate=1e-2, trainable=(r"^mixers/",), eval_every=100, **stage),
        stage2=StageConfig(
            steps=500,
            learning_rate=1e-2,
            trainable=(r"^lora/", r"^mixers/"),
            eval_every=50,
            validation_length=8 * LENGTH,
            **stage,
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
