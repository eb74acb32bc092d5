"""Tiny random students, made in the test process without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lawcat_jax.checkpoints.hf.mapping import base_shapes, flatten, unflatten
from lawcat_jax.checkpoints.hf.write import write_hf
from lawcat_jax.checkpoints.model_dir import expected_shapes, save_model
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=48,
    max_position_embeddings=64,
    eos_token_ids=(2,),
)
LORA = LoraConfig(rank=3, alpha=8.0, targets=("q_proj", "v_proj"))
KINDS = {
    "lawcat": AttentionConfig(gate_rank=4),
    "lolcats": AttentionConfig(kind="lolcats", window_size=8, tie_qk=False),
    "hybrid": AttentionConfig(gate_rank=4, softmax_layers=(1,)),
}


def base_params(model: ModelConfig = MODEL, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random pretrained parameters by path, with logits far enough apart for errors to show."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path.endswith("scale"):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0, 0.5 if "embed" in path else 0.2, shape)

    return {path: draw(path, shape).astype(dtype) for path, shape in base_shapes(model).items()}


def student_params(
    attention: AttentionConfig, lora: LoraConfig | None = LORA, model: ModelConfig = MODEL, seed: int = 1
) -> dict[str, np.ndarray]:
    """What a student adds to its teacher, random, by path."""
    rng = np.random.default_rng(seed)
    added = {}
    for path, shape in expected_shapes(model, attention, lora).items():
        if path.startswith(("mixers/", "lora/")):
            scale = 1.0 if "feature_map" in path else 0.5 if "conv" in path else 0.3
            added[path] = rng.normal(0, scale, shape).astype(np.float32)
    return added


def tame(params: dict[str, np.ndarray], model: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters of a student of any width, scaled so that activations and scores are about 1, as those of a trained one.

    The draws above are made for :data:`MODEL`. In wider models they give features that are all but one-hot and denominators near
    0, which turn the rounding of bfloat16, in whatever program, into logits that have nothing to do with each other.
    """
    fan_in = {"conv": 4, "feature_map": model.head_dim, "embed": 4}

    def factor(path: str, array: np.ndarray) -> float:
        if path.endswith(("scale", "bias", "window_factor")):
            return 1.0
        found = next((size for name, size in fan_in.items() if name in path), array.shape[-2])
        return float(found**-0.5 / max(array.std(), 1e-6))

    return {path: (array * factor(path, array)).astype(array.dtype) for path, array in params.items()}


def write_teacher(directory: Path, model: ModelConfig = MODEL, **options) -> Path:
    """A Hugging Face directory."""
    write_hf(directory, model=model, params=unflatten(base_params(model, **options)))
    return directory


def write_student(
    directory: Path,
    kind: str = "lawcat",
    *,
    teacher: Path | None = None,
    lora: LoraConfig | None = LORA,
    dtype=np.float32,
    model: ModelConfig = MODEL,
    tamed: bool = False,
    **extra,
) -> Path:
    """A student's model directory; ``tamed``: see :func:`tame`."""
    base = {path: array.astype(dtype) for path, array in base_params(model).items()}
    added = student_params(KINDS[kind], lora, model)
    if tamed:
        base, added = tame(base, model), tame(added, model)
    extra = {"source": None if teacher is None else str(teacher), "training_length": 128, **extra}
    return save(directory, KINDS[kind], lora, model, params=base | added, extra=extra)


def save(
    directory: Path, attention: AttentionConfig, lora: LoraConfig | None = LORA, model: ModelConfig = MODEL, **options
) -> Path:
    """The model directory of any student, random as above unless ``params`` by path are given."""
    params = options.pop("params", None) or base_params(model) | student_params(attention, lora, model)
    save_model(directory, model=model, attention=attention, lora=lora, params=unflatten(params), **options)
    return directory


def same_bits(a: dict, b: dict) -> bool:
    """Whether two trees of parameters are equal, dtypes included."""
    a, b = dict(flatten(a)), dict(flatten(b))
    return a.keys() == b.keys() and all(
        a[path].dtype == b[path].dtype and np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes() for path in a
    )
