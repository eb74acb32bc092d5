"""Stage 2, LoRA finetuning: token-weighted cross entropy, optionally with KL to the teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lawcat_jax import models
from lawcat_jax.config import StageConfig
from lawcat_jax.training.step import Batch, LossFn, Sums

TokenSums = dict[str, jax.Array]


def token_sums(logits: jax.Array, targets: jax.Array, weights: jax.Array, teacher: jax.Array | None) -> TokenSums:
    """Sums over tokens of cross entropy, KL(teacher || student) and hits, each in f32 and weighted.

    logits, teacher: f32 [..., V]; targets: i32 [...]; weights: f32 [...]. Cross entropy and KL are in nats. Tokens of
    weight 0 add exactly 0, even where their logits are not finite.
    """
    counted = weights > 0
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    sums = {
        "cross_entropy": -jnp.sum(jnp.where(counted, weights * picked, 0.0)),
        "hits": jnp.sum(jnp.where(counted, jnp.argmax(logits, axis=-1) == targets, False), dtype=jnp.float32),
    }
    if teacher is not None:
        log_q = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32))
        divergence = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        sums["kl"] = jnp.sum(jnp.where(counted, weights * divergence, 0.0))
    return sums


def chunked_token_sums(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher_hidden: jax.Array | None,
    chunk: int,
) -> TokenSums:
    """:func:`token_sums` of ``head(hidden)`` ([B, T, D] -> [B, T, V]) in chunks of ``chunk`` tokens of T.

    Only one chunk's logits exist at a time, in the backward pass too (they are computed again). ``chunk`` 0, or at
    least T: at once. T is padded with weight 0 to whole chunks.
    """

    def one(piece: tuple) -> TokenSums:
        hidden, targets, weights, teacher = piece
        return token_sums(head(hidden), targets, weights, None if teacher is None else head(teacher))

    length = hidden.shape[1]
    pieces = (hidden, targets, weights, teacher_hidden)
    if chunk == 0 or chunk >= length:
        return one(pieces)
    count = -(-length // chunk)

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [count, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    pieces = jax.tree.map(cut, pieces)
    first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    body = jax.checkpoint(lambda total, piece: (jax.tree.map(jnp.add, total, one(piece)), None))
    return jax.lax.scan(body, zeros, pieces)[0]


def make_loss(graphdef: Any, stage: StageConfig) -> LossFn:
    """Cross entropy on ``batch["loss_weights"]``, plus ``kl_weight`` times KL to the teacher on the same tokens.

    The teacher is the same decoder with softmax attention and without LoRA (``as_teacher``), under stop_gradient.
    Metrics: ``cross_entropy`` (nats a token), ``accuracy`` (argmax equals target, a share of the weighted tokens) and,
    with a teacher, ``kl``.
    """

    def loss(params: dict, batch: Batch, key: jax.Array | None) -> Sums:
        decoder = models.bind(graphdef, params)
        tokens, lengths, weights = batch["tokens"], batch["lengths"], batch["loss_weights"]
        options = {"lengths": lengths, "remat": stage.remat, "return_hidden": True}
        hidden = decoder(tokens, dropout_rng=key, **options)
        teacher = None
        if stage.kl_weight > 0:
            teacher = jax.lax.stop_gradient(decoder(tokens, as_teacher=True, **options))
        head = functools.partial(decoder.head, kernel=decoder.head_kernel())
        sums = chunked_token_sums(head, hidden, batch["targets"], weights, teacher, stage.loss_chunk)
        weight = jnp.sum(weights)
        total = sums["cross_entropy"]
        metrics = {
            "cross_entropy": (jax.lax.stop_gradient(total), weight),
            "accuracy": (sums["hits"], jnp.sum(weights > 0, dtype=jnp.float32)),
        }
        if teacher is not None:
            total = total + stage.kl_weight * sums["kl"]
            metrics["kl"] = (jax.lax.stop_gradient(sums["kl"]), weight)
        return Sums(loss=total, weight=weight, metrics=metrics)

    return loss
