"""Qwen3-8B to a LAWCAT student on passkey data, with the recipe of configs/mistral7b.py:paper (the paper has no Qwen).

Command: ``python -m lawcat_jax.train --config=configs/qwen3_8b.py`` (``:base`` for the model without instruction tuning).
Check first: ``python -m lawcat_jax.aot --config=configs/qwen3_8b.py --topology=v5e:8x8`` says whether it fits a TPU slice,
``--topology=h100:8`` whether it fits GPUs. The teacher is not gated.

Hardware: v5e-64, or one GPU with 80 GB. The batch of 8 sequences is split over 8 chips; further chips of a slice go to the
``tensor`` axis. Data: 10,000 passkey samples of 870 words. Nobody has trained this recipe: there is no number to compare with.
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

SOURCES = {"instruct": "Qwen/Qwen3-8B", "base": "Qwen/Qwen3-8B-Base"}
POSITIONS = {"instruct": 40960, "base": 32768}
# With Llama 3's tokenizer samples have about 1.16 K tokens; both vocabularies start from the 100 K of GPT-4's.
LENGTH = 1280  # a multiple of 128 suits the kernels


def get_config(variant: str = "instruct") -> Config:
    """The experiment; ``variant`` is ``instruct`` or ``base``."""
    if variant not in SOURCES:
        raise ValueError(f"unknown variant {variant!r}, known: {', '.join(SOURCES)}")
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
            source=SOURCES[variant],
            dtype="bfloat16",
            architecture=ModelConfig(
                family="qwen3",
                vocab_size=151936,
                hidden_size=4096,
                num_layers=36,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                mlp_size=12288,
                rms_norm_eps=1e-6,
                rope_theta=1_000_000.0,
                qk_norm="head",
                max_position_embeddings=POSITIONS[variant],
            ),
        ),
        attention=AttentionConfig(gate_rank=32),
        lora=LoraConfig(rank=8, alpha=16.0),
        stage1=StageConfig(learning_rate=1e-2, trainable=(r"^mixers/",), **common),
        stage2=StageConfig(learning_rate=1e-4, trainable=(r"^lora/",), remat="layer", loss_chunk=256, **common),
        eval=EvalConfig(lengths=(1024, 2048, 4096, 8192, 16384, 22528), samples=50, batch_size=10),
    )
