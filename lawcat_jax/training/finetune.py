"""Stage 2, LoRA finetuning: token-weighted cross entropy, optionally with KL to the teacher."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp

from lawcat_jax import models
from lawcat_jax.config import StageConfig
from lawcat_jax.data.batch import Batch
from lawcat_jax.data.teacher_store import ARRAYS
from lawcat_jax.training import state_passing
from lawcat_jax.training.divergence import AnyTeacher, StoredTeacher, Teacher, arrays_of, divergence
from lawcat_jax.training.step import LossFn, StepInputs, Sums

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

TokenSums = dict[str, jax.Array]


def _shifted(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logits less the largest, log of the sum of the exponentials of that, its entry at the target), float32."""
    logits = logits.astype(jnp.float32)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    picked = jnp.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    return shifted, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)), picked


def _sums(weights: jax.Array, log_sum: jax.Array, picked: jax.Array) -> TokenSums:
    counted = weights > 0
    return {
        "cross_entropy": jnp.sum(jnp.where(counted, weights * (log_sum - picked), 0.0)),
        "hits": jnp.sum(jnp.where(counted, picked >= 0, False), dtype=jnp.float32),
    }


def token_sums(
    logits: Float[Array, "*b V"], targets: Int[Array, "*b"], weights: Float[Array, "*b"], teacher: AnyTeacher | None
) -> TokenSums:
    """Sums over tokens of cross entropy, divergence from the teacher and hits (no token has a larger logit than the
    target's), each in f32, the first two weighted.

    logits: f32 [..., V]; targets: i32 [...]; weights: f32 [...]. Cross entropy and divergence
    (:mod:`lawcat_jax.training.divergence`) are in nats. Tokens of weight 0 add exactly 0, to the gradient as well, even
    where their logits are not finite.
    """
    counted = weights > 0 if teacher is None else (weights > 0) | (teacher.weights > 0)
    logits = jnp.where(counted[..., None], logits, 0.0)
    shifted, log_sum, picked = _shifted(logits, targets)
    sums = _sums(weights, log_sum, picked)
    if teacher is not None:
        values = divergence(shifted - log_sum[..., None], teacher)
        sums["kl"] = jnp.sum(jnp.where(teacher.weights > 0, teacher.weights * values, 0.0))
    return sums


def in_chunks(pieces: Any, length: int, chunk: int) -> Any:
    """Arrays [B, length, ...] padded with 0 and cut to [count, B, chunk, ...], those of a pytree alike."""
    count = -(-length // chunk)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, pieces)


def chunked_token_sums(
    head: Callable[[jax.Array], jax.Array],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    teacher: AnyTeacher | None,
    chunk: int,
) -> TokenSums:
    """:func:`token_sums` of ``head(hidden)`` ([B, T, D] -> [B, T, V]) in chunks of ``chunk`` tokens of T.

    Only one chunk's logits exist at a time, in the backward pass too (they are computed again). ``chunk`` 0, or at
    least T: at once. T is padded with weight 0 to whole chunks. A :class:`Teacher` that runs holds hidden states, which
    go through the same head.
    """

    def one(piece: tuple[Any, ...]) -> TokenSums:
        hidden, targets, weights, arrays = piece
        counted = weights > 0
        if teacher is not None:
            counted |= arrays["weights"] > 0
        hidden = jnp.where(counted[..., None], hidden, 0)  # else NaN times a gradient of 0 reaches a head that trains
        held = None
        if isinstance(teacher, Teacher):
            held = teacher._replace(values=head(arrays["values"]), weights=arrays["weights"])
        elif teacher is not None:
            held = teacher._replace(**arrays)
        return token_sums(head(hidden), targets, weights, held)

    length = hidden.shape[1]
    pieces = (hidden, targets, weights, {} if teacher is None else arrays_of(teacher))
    if chunk == 0 or chunk >= length:
        return one(pieces)
    pieces = in_chunks(pieces, length, chunk)
    first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    body = jax.checkpoint(lambda total, piece: (jax.tree.map(jnp.add, total, one(piece)), None))
    return jax.lax.scan(body, zeros, pieces)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def frozen_head_sums(
    axes: str,
    chunk: int,
    kernel: Float[Array, ...],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> TokenSums:
    """:func:`chunked_token_sums` for a head that does not train, without a teacher: its gradient reaches ``hidden`` only.

    ``kernel`` has dimensions ``axes``, "vd" or "dv". The gradient is formed beside the sums, while a chunk's logits
    exist, so that they are not computed again. Chunks without a token of weight above 0 are not computed at all.
    """
    return _frozen_head(axes, chunk, kernel, hidden, targets, weights, False)[0]


def _frozen_head(axes: str, chunk: int, kernel, hidden, targets, weights, gradient: bool):
    """(sums, gradient of their cross entropy with respect to ``hidden`` or None)."""
    length = hidden.shape[1]
    chunk = min(chunk or length, length)
    kernel = kernel.astype(hidden.dtype)

    def one(hidden, targets, weights):
        logits = jnp.einsum(f"btd,{axes}->btv", hidden, kernel, preferred_element_type=jnp.float32)
        shifted, log_sum, picked = _shifted(logits, targets)
        sums = _sums(weights, log_sum, picked)
        if not gradient:
            return sums, None
        excess = jnp.exp(shifted - log_sum[..., None]) - (targets[..., None] == jnp.arange(logits.shape[-1]))
        d_logits = jnp.where(weights[..., None] > 0, weights[..., None] * excess, 0.0)
        return sums, jnp.einsum(f"btv,{axes}->btd", d_logits.astype(hidden.dtype), kernel)

    def nothing(hidden, targets, weights):
        shapes = jax.eval_shape(one, hidden, targets, weights)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, piece):
        sums, d = jax.lax.cond(jnp.any(piece[-1] > 0), one, nothing, *piece)
        return jax.tree.map(jnp.add, total, sums), d

    zeros = {"cross_entropy": jnp.zeros(()), "hits": jnp.zeros(())}
    sums, d = jax.lax.scan(body, zeros, in_chunks((hidden, targets, weights), length, chunk))
    if gradient:
        d = jnp.moveaxis(d, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, :length]
    return sums, d


def _frozen_head_forward(axes, chunk, kernel, hidden, targets, weights):
    return _frozen_head(axes, chunk, kernel, hidden, targets, weights, True)


def _frozen_head_backward(axes, chunk, d_hidden, cotangents):
    del axes, chunk
    return None, (cotangents["cross_entropy"] * d_hidden).astype(d_hidden.dtype), None, None


frozen_head_sums.defvjp(_frozen_head_forward, _frozen_head_backward)


def kl_weight(stage: StageConfig, progress: Float[Array, ""] | float) -> Float[Array, ""] | float:
    """Weight of the divergence at a share ``progress`` of the stage: linear from ``kl_weight`` to ``kl_weight_end``."""
    if stage.kl_weight_end is None:
        return stage.kl_weight
    return stage.kl_weight + (stage.kl_weight_end - stage.kl_weight) * progress


def make_loss(graphdef: Any, stage: StageConfig) -> LossFn:
    """Cross entropy on ``batch["loss_weights"]``, plus :func:`kl_weight` times the divergence from the teacher on
    ``batch["kl_weights"]`` (where a batch has none, on the same tokens).

    The teacher is the same decoder with softmax attention and without LoRA (``as_teacher``), under stop_gradient. It
    sees the tokens of the batch only, also where the student's rows go on from earlier ones. With
    ``stage.teacher_logits`` it does not run: its logits are in the batch.
    Metrics: ``cross_entropy`` (nats a token), ``accuracy`` (no logit above the target's, a share of the weighted
    tokens) and, with a teacher, ``kl``.
    """

    def loss(params: dict, batch: Batch, inputs: StepInputs) -> tuple[Sums, state_passing.Carry | None]:
        decoder = models.bind(graphdef, params)
        tokens, lengths, weights = batch["tokens"], batch["lengths"], batch["loss_weights"]
        options = {
            "lengths": lengths,
            "segment_ids": batch.get("segment_ids"),
            "remat": stage.remat,
            "unroll_layers": stage.unroll_layers,
            "return_hidden": True,
        }
        hidden, leaving = _hidden(decoder, tokens, inputs, options)
        teacher: AnyTeacher | None = None
        held, reverse = batch.get("kl_weights", weights), stage.kl_direction == "reverse"
        if runs_teacher(stage):
            values = jax.lax.stop_gradient(decoder(tokens, as_teacher=True, **options))
            teacher = Teacher(values, held, stage.kl_temperature, reverse)
        elif stage.teacher_logits:
            ids, logits, rest = (cast(dict[str, jax.Array], batch)[name] for name in ARRAYS)
            teacher = StoredTeacher(ids, logits, rest, held, reverse)
        sums: Any  # custom_vjp hides what frozen_head_sums returns
        kernel = decoder.head_kernel()
        if teacher is None and _head_is_frozen(decoder, stage):
            kernel = jax.lax.stop_gradient(kernel)
            sums = frozen_head_sums(decoder.head_axes, stage.loss_chunk, kernel, hidden, batch["targets"], weights)
        else:
            head = functools.partial(decoder.head, kernel=kernel)
            sums = chunked_token_sums(head, hidden, batch["targets"], weights, teacher, stage.loss_chunk)
        weight = jnp.sum(weights)
        total = sums["cross_entropy"]
        metrics = {
            "cross_entropy": (jax.lax.stop_gradient(total), weight),
            "accuracy": (sums["hits"], jnp.sum(weights > 0, dtype=jnp.float32)),
        }
        if teacher is not None:
            total = total + kl_weight(stage, inputs.progress) * sums["kl"]
            metrics["kl"] = (jax.lax.stop_gradient(sums["kl"]), jnp.sum(teacher.weights))
        return Sums(loss=total, weight=weight, metrics=metrics), leaving

    return loss


def needs_teacher(stage: StageConfig) -> bool:
    """Whether a finetuning stage compares with the teacher."""
    return stage.kl_weight > 0 or (stage.kl_weight_end or 0) > 0


def runs_teacher(stage: StageConfig) -> bool:
    """Whether the teacher runs in the steps of a finetuning stage."""
    return needs_teacher(stage) and not stage.teacher_logits


def _hidden(
    decoder: models.Decoder, tokens: jax.Array, inputs: StepInputs, options: dict[str, Any]
) -> tuple[jax.Array, state_passing.Carry | None]:
    """(the student's hidden states, what its rows leave to the next step)."""
    if inputs.entry is None:
        return decoder(tokens, dropout_rng=inputs.key, **options), None
    carry, keep = inputs.entry
    recurrent, previous = carry.recurrent, None
    if carry.previous is not None:
        # The batch before once more, from the state before it: this time its state carries a gradient.
        again = {**options, "lengths": carry.previous.lengths, "recurrent": recurrent}
        _, recurrent = decoder(carry.previous.tokens, dropout_rng=inputs.key, **again)
    start = state_passing.where_kept(recurrent, keep)
    hidden, after = decoder(tokens, dropout_rng=inputs.key, recurrent=start, **options)
    if carry.previous is not None:
        previous, after = state_passing.Previous(tokens, options["lengths"]), start
    return hidden, state_passing.Carry(jax.lax.stop_gradient(after), previous)


def _head_is_frozen(decoder: models.Decoder, stage: StageConfig) -> bool:
    name = "embed/embedding" if decoder.head_axes == "vd" else "lm_head/kernel"
    return not any(re.search(pattern, name) for pattern in stage.trainable)
