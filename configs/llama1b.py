"""Llama-3.2-1B to a LAWCAT student, with the recipe that retrieves farthest on SmolLM2-135M, or with the paper's.

Command: ``python -m lawcat_jax.train --config=configs/llama1b.py`` (``:instruct`` for the Instruct model). Check first,
without weights: add ``--config.dry_run=True``. The teacher is gated on the Hugging Face hub: accept its licence and log
in (``hf auth login``), or give a local copy with ``--config.teacher.source=<directory>``.

``base`` reads books and retrieval samples from the folder that LAWCAT_DATA names (``lawcat_jax/config/recipe.py``) and follows
its teacher in stage 2. That recipe is measured on SmolLM2-135M alone (docs/results.md): what it gives with this teacher, nobody
knows yet. ``paper`` is the paper's recipe as far as it is known: 10,000 passkey samples of 870 words, about 1.16 K tokens
each, which need no files. Expected of that one, from the paper: S-NIAH-1 100 % at 1K to 4K tokens and 80 % at 8K (with its own
distillation data).

Hardware: one accelerator with 24 GB or more. ``gpu`` is ``base``, and ``paper_gpu`` is ``paper``, for GPUs with 40 GB or more:
the same training, with layers unrolled, no activations recomputed and the model whole on every GPU.
"""

from lawcat_jax.config import (
    AttentionConfig,
    Config,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RopeScaling,
    TeacherConfig,
)
from lawcat_jax.config.recipe import paper_stages, retrieval_mixture, retrieval_stages

LENGTH = 1280  # samples have about 1.16 K tokens; a multiple of 128 suits the kernels
LOSS_CHUNK = 256  # 128 K logits a token: at once they would take 5 GB
VARIANTS = ("base", "instruct", "gpu", "paper", "paper_gpu")


def get_config(variant: str = "base") -> Config:
    """The experiment; ``variant`` is one of :data:`VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}, known: {', '.join(VARIANTS)}")
    gpu, paper = variant.endswith("gpu"), variant.startswith("paper")
    memory = {"remat": "layer", "loss_chunk": LOSS_CHUNK}
    stages = paper_stages(LENGTH, **memory) if paper else retrieval_stages(LENGTH, retrieval_mixture(), **memory)
    if gpu:
        stages["stage1"].unroll_layers = stages["stage2"].unroll_layers = True
        stages["stage2"].remat = "none"
    return Config(
        teacher=TeacherConfig(
            source="meta-llama/Llama-3.2-1B-Instruct" if variant == "instruct" else "meta-llama/Llama-3.2-1B",
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
        lora=LoraConfig(rank=8, alpha=16.0) if paper else LoraConfig(rank=16, alpha=32.0),
        **stages,
        # One GPU holds the model: several share the batch, and exchange only the gradients of what is trained.
        mesh=MeshConfig(data=-1, fsdp=1) if gpu else MeshConfig(),
        eval=EvalConfig(lengths=(1024, 2048, 4096, 8192, 16384), samples=50, batch_size=10),
    )
