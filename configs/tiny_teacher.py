"""Train the embedded teacher, a Llama of 0.9 M parameters that retrieves passkeys within 128 tokens and not beyond.

Command: ``python -m lawcat_jax.train --config=configs/tiny_teacher.py --config.pretrain.data.source='books/*.txt'``
(any English text; without the flag PG-19 is read from the Hugging Face hub). The result, in Hugging Face format, is
``<workdir>/teacher``.

``lawcat_jax/assets/tiny_llama`` is such a result, trained on fourteen public-domain books (4.5 M tokens) with the
tokenizer of ``lawcat_jax.train_tokenizer --vocab_size=1024``: 4,000 steps, 3 minutes on one H200 (measured
2026-11-23, two such runs side by side). Passkey accuracy there: 100 % at 128 tokens, 8 % at 256, 0 % at 512 and 1024
(50 samples each).
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

LENGTH = 128


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
                num_kv_heads=2,
                head_dim=32,
                mlp_size=384,
                max_position_embeddings=LENGTH,
                tie_embeddings=True,
                bos_token_id=0,
                eos_token_ids=(1,),
                pad_token_id=2,
            ),
        ),
        pretrain=StageConfig(
            steps=4000,
            batch_size=64,
            seq_length=LENGTH,
            learning_rate=2e-3,
            warmup_fraction=0.02,
            weight_decay=0.01,
            b2=0.98,
            clip_norm=1.0,
            eval_every=500,
            # Passkey samples of one length only: a teacher that has seen shorter ones too keeps half of its accuracy at
            # twice the length, and the point of this one is to fail there.
            data=DataConfig(
                kind="text",
                source="hf:fla-hub/pg19:train",
                passkey_fraction=0.5,
                prompt_weight=0.1,
                text_weight=0.1,
                num_samples=200_000,
                validation_samples=64,
                num_workers=4,
            ),
        ),
        stage1=StageConfig(enabled=False),
        stage2=StageConfig(enabled=False),
        checkpoint=CheckpointConfig(every_steps=1000),
        log=LogConfig(every_steps=100),
        eval=EvalConfig(
            lengths=tuple(LENGTH * factor for factor in (1, 2, 4, 8)), samples=50, batch_size=50, passkey_form="train"
        ),
    )
