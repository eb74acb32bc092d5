"""Mistral-7B v0.1 to a LAWCAT student, with the recipe that retrieves farthest on SmolLM2-135M, or with the paper's.

Command: ``python -m lawcat_jax.train --config=configs/mistral7b.py``. Check first, without weights: add
``--config.dry_run=True``. A local copy of the teacher: ``--config.teacher.source=<directory>``.

``base`` reads books and retrieval samples from the folder that LAWCAT_DATA names (``lawcat_jax/config/recipe.py``) and follows
its teacher in stage 2. That recipe is measured on SmolLM2-135M alone (docs/results.md): what it gives with this teacher, nobody
knows yet. ``paper`` is the paper's recipe as far as it is known, on 10,000 passkey samples of 870 words, which need no files.
Expected of that one, from the paper: passkey above 90 % up to 22K tokens.

Hardware: one accelerator with 80 GB, or several (weights and batch are split over the ``fsdp`` axis).
"""

from lawcat_jax.config import (
    AttentionConfig,
    Config,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    TeacherConfig,
)
from lawcat_jax.config.recipe import paper_stages, retrieval_mixture, retrieval_stages

LENGTH = 1408  # the samples are longer here than with Llama's tokenizer; a multiple of 128 suits the kernels
LOSS_CHUNK = 512
VARIANTS = ("base", "paper")


def get_config(variant: str = "base") -> Config:
    """The experiment; ``variant`` is one of :data:`VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}, known: {', '.join(VARIANTS)}")
    paper = variant == "paper"
    memory = {"remat": "layer", "loss_chunk": LOSS_CHUNK}
    stages = paper_stages(LENGTH, **memory) if paper else retrieval_stages(LENGTH, retrieval_mixture(), **memory)
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
        lora=LoraConfig(rank=8, alpha=16.0) if paper else LoraConfig(rank=16, alpha=32.0),
        **stages,
        eval=EvalConfig(lengths=(1024, 2048, 4096, 8192, 16384, 22528), samples=50, batch_size=10),
    )
