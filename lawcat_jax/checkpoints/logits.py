"""Logits of a model here, and their comparison with those of ``transformers``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import numpy as np

from lawcat_jax.checkpoints.hf.merge import CONFIG as ADAPTER
from lawcat_jax.checkpoints.model_dir import ModelBundle
from lawcat_jax.config import AttentionConfig, ModelConfig
from lawcat_jax.errors import UserError

VERIFY_TOKENS = (2, 64)  # sequences, tokens: enough to see a wrong rotary scaling, cheap for 7B on a CPU


def require_torch() -> None:
    """Refuse a comparison that cannot be made here.

    Raises:
      UserError: torch or transformers is not installed.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--verify needs {' and '.join(missing)}: pip install {' '.join(missing)}; or leave it out")


def random_tokens(model: ModelConfig, seed: int = 0) -> np.ndarray:
    """Tokens that a comparison of logits is made on, int32 [2, 64]."""
    return np.random.default_rng(seed).integers(0, model.vocab_size, VERIFY_TOKENS).astype(np.int32)


def compare_logits(
    here: np.ndarray, reference: Path, tokens: np.ndarray, *, trust_remote_code: bool = False
) -> dict[str, float]:
    """Logits [B, T, V] of this project against ``transformers`` on ``reference`` (HF directory or GGUF file), in
    float32.

    Returns:
      ``max_abs`` (largest absolute difference), ``scale`` (largest absolute logit), ``kl``
      (KL(reference || ours), nats, mean over tokens) and ``tokens``.

    Raises:
      UserError: torch is not installed, or transformers cannot read the reference.
    """
    require_torch()
    import torch
    import transformers

    where = (reference.parent, {"gguf_file": reference.name}) if reference.is_file() else (reference, {})
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            where[0],
            **where[1],
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
        ).eval()
    except Exception as problem:  # of many types: architectures and GGUF types that it does not know, missing packages
        reason = (str(problem).strip() or type(problem).__name__).split("\n")[0]
        raise UserError(
            f"{reference}: not compared, transformers cannot read it ({reason}); leave --verify out"
        ) from None
    with torch.no_grad():
        there = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    log_p, log_q = _log_softmax(there), _log_softmax(here)
    return {
        "max_abs": float(np.max(np.abs(here - there))),
        "scale": float(np.max(np.abs(there))),
        "kl": float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))),
        "tokens": tokens.size,
    }


def suspects(reference: str | os.PathLike, attention: AttentionConfig | None) -> str:
    """The end of a sentence about logits that differ from those of ``reference``: the cause where it is known, else what a
    report needs, the versions and the switches of a student that are turned.
    """
    adapter = Path(reference) / ADAPTER
    if adapter.is_file():
        return f": {adapter} is an adapter, which transformers applies to the weights beside it; move it elsewhere"
    turned = [
        f"attention.{field.name}={getattr(attention, field.name)!r}"
        for field in dataclasses.fields(AttentionConfig)
        if attention is not None and getattr(attention, field.name) != getattr(AttentionConfig(), field.name)
    ]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")]
    return f", and report this with {', '.join([*versions, *turned])}"


def teacher_logits(bundle: ModelBundle, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] logits of the softmax model for int32 [B, T] tokens."""
    return _logits(bundle, tokens, as_teacher=True)


def student_logits(bundle: ModelBundle, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] logits of the student for int32 [B, T] tokens."""
    return _logits(bundle, tokens, as_teacher=False)


def _logits(bundle: ModelBundle, tokens: np.ndarray, *, as_teacher: bool) -> np.ndarray:
    import jax

    from lawcat_jax import models

    graphdef, _ = models.abstract(bundle.model, models.for_this_machine(bundle.attention), bundle.lora)
    with jax.default_matmul_precision("float32"):
        forward = jax.jit(lambda params, x: models.bind(graphdef, params)(x, as_teacher=as_teacher))
        return np.asarray(forward(bundle.params, tokens), np.float32)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
