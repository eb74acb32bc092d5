"""Pretraining of a small teacher: cross entropy of a plain softmax decoder, all parameters trained."""

from __future__ import annotations

from typing import Any

from lawcat_jax.config import StageConfig
from lawcat_jax.errors import UserError
from lawcat_jax.training import finetune
from lawcat_jax.training.step import LossFn


def make_loss(graphdef: Any, stage: StageConfig) -> LossFn:
    """Token-weighted cross entropy on ``batch["loss_weights"]``; the metrics of :func:`finetune.make_loss`.

    Raises:
      UserError: ``kl_weight`` is set (there is no teacher of the teacher).
    """
    if finetune.needs_teacher(stage):
        raise UserError("config.pretrain.kl_weight: pretraining has no teacher, set it to 0")
    return finetune.make_loss(graphdef, stage)
