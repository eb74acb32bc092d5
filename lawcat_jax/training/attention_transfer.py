"""Stage 1, attention transfer: every linear attention layer learns to give its teacher's softmax attention output."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lawcat_jax import models
from lawcat_jax.config import StageConfig
from lawcat_jax.data.batch import Batch
from lawcat_jax.training.step import LossFn, Sums


def make_loss(graphdef: Any, stage: StageConfig) -> LossFn:
    """``mse_weight / M * sum over the M linear layers of mean_{b,t,h,c} m_t (student - teacher)^2`` (method of the
    paper's section 3.2 and the authors' code).

    The outputs are the concatenated heads before the output projection, in f32. Hidden states follow the teacher, so
    errors do not compound and no gradient crosses a layer. m_t is 0 at padding and eos (``batch["mask"]``). The mean
    divides by the counted positions, or by all positions with ``loss_denominator`` "all" (the authors' code).

    Metrics: ``relative_mse`` [M], ``|student - teacher|^2 / |teacher|^2`` over counted positions: it compares layers.
    """

    def layer_loss(index: jax.Array, teacher: jax.Array, student: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        del index  # every layer counts the same
        weight = mask.astype(jnp.float32)[..., None]
        error = jnp.sum(weight * jnp.square(student - teacher))
        return {"error": error / teacher.shape[-1], "power": jnp.sum(weight * jnp.square(teacher)) / teacher.shape[-1]}

    def loss(params: dict, batch: Batch, key: jax.Array | None) -> Sums:
        del key  # nothing random
        decoder = models.bind(graphdef, params)
        mask = batch["mask"]
        options = {"mask": mask, "lengths": batch["lengths"], "unroll_layers": stage.unroll_layers}
        layers = decoder.teacher_forced(batch["tokens"], layer_loss=layer_loss, **options)
        count = mask.size if stage.loss_denominator == "all" else jnp.sum(mask)
        return Sums(
            loss=stage.mse_weight * jnp.mean(layers["error"]),
            weight=jnp.asarray(count, jnp.float32),
            metrics={"relative_mse": (jax.lax.stop_gradient(layers["error"]), layers["power"])},
        )

    return loss
