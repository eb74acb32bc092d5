"""Recipes for config files of any teacher: the one that made a student retrieve far beyond its training length, and the paper's.

The first: books and retrieval in many wordings in both stages; stage 2 trains adapters and mixers, follows the teacher on the books, and
keeps a moving average. Found and measured with SmolLM2-135M-Instruct, and with no other teacher: ``docs/results.md``.
"""

import os
from typing import Any

from lawcat_jax.config.choices import Wording
from lawcat_jax.config.data import DataConfig, MixtureSource
from lawcat_jax.config.stage import StageConfig


def retrieval_mixture(*, wording: Wording = "composed", end_weight: float = 10.0, **changes: Any) -> DataConfig:
    """40 % books, 20 % passkeys, 25 % needles that belong to a name, 15 % bAbI stories in book text; the teacher is followed
    on the books only.

    Everything lies in the folder that the environment variable LAWCAT_DATA names (default: ``data``):
    ``books/train/*.txt``, ``books/validation/*.txt`` and ``babi/en-10k``.

    Args:
      wording: of all that is generated.
      end_weight: weight in the loss of the token that ends an answer; 0 leaves it out.
      changes: other fields of the result.
    """
    folder = os.environ.get("LAWCAT_DATA", "data")
    books, facts = f"{folder}/books/train", f"{folder}/babi/en-10k"
    retrieval = {
        "wording": wording,
        "answer_weight": 10.0,
        "kl_weight": 0.0,
        "hay_source": books,
        "end_weight": end_weight,
    }
    values: dict[str, Any] = {
        "kind": "mixture",
        "mixture": (
            MixtureSource(kind="text", source=books, validation_source=f"{folder}/books/validation", weight=0.4),
            MixtureSource(kind="passkey", hay="mixed", weight=0.2, **retrieval),
            MixtureSource(kind="niah", hay="mixed", weight=0.25, **retrieval),
            MixtureSource(kind="babilong", babi_source=facts, weight=0.15, **retrieval),
        ),
        "num_samples": 48_000,
        "validation_samples": 64,
        "num_workers": 16,
        "num_processes": min(12, (os.cpu_count() or 1) // 2),  # a sample costs 10 ms, a step of stage 1 on a GPU 30
    }
    return DataConfig(**(values | changes))


def retrieval_stages(seq_length: int, data: DataConfig, **changes: Any) -> dict[str, StageConfig]:
    """``stage1`` and ``stage2`` of a ``Config``: 4,000 steps of 8 sequences each.

    Args:
      seq_length: of the sequences, in tokens.
      data: of both stages.
      changes: other fields of stage 2.
    """
    common: dict[str, Any] = {
        "steps": 4000,
        "batch_size": 8,
        "seq_length": seq_length,
        "warmup_fraction": 0.02,
        "clip_norm": 1.0,
        "data": data,
    }
    second: dict[str, Any] = {
        "learning_rate": 1e-3,
        "trainable": (r"^lora/", r"^mixers/"),
        "kl_weight": 1.0,
        "ema_decay": 0.999,
        "keep_best": False,
    }
    return {
        "stage1": StageConfig(learning_rate=1e-2, trainable=(r"^mixers/",), **common),
        "stage2": StageConfig(**(common | second | changes)),
    }


def paper_stages(seq_length: int, **changes: Any) -> dict[str, StageConfig]:
    """``stage1`` and ``stage2`` of a ``Config`` by the paper's recipe, as far as it is known: 4 passes over 10,000 passkey
    samples of 870 words, and adapters alone in stage 2.

    Args:
      seq_length: of the sequences, in tokens.
      changes: other fields of stage 2.
    """
    common: dict[str, Any] = {
        "epochs": 4,
        "batch_size": 8,
        "seq_length": seq_length,
        "schedule": "cosine",
        "warmup_fraction": 0.01,
        "eval_every": 500,
        "data": DataConfig(kind="passkey", passkey_words=870, num_samples=10_000, validation_samples=100),
    }
    return {
        "stage1": StageConfig(learning_rate=1e-2, trainable=(r"^mixers/",), **common),
        "stage2": StageConfig(learning_rate=1e-4, trainable=(r"^lora/",), **(common | changes)),
    }
