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
    # Not an indexed read: its gradient would be a scatter into an array of zeros as large as the logits.
    at_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    picked = jnp.sum(jnp.where(at_target, shifted, 0.0), axis=-1)
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
    logits = jnp.where(_counted(weights, teacher)[..., None], logits, 0.0)
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
        held = _with_arrays(teacher, arrays)
        # Else NaN times a gradient of 0 reaches a head that trains.
        hidden = jnp.where(_counted(weights, held)[..., None], hidden, 0)
        return token_sums(head(hidden), targets, weights, _seen_by(head, held))

    length = hidden.shape[1]
    pieces = (hidden, targets, weights, {} if teacher is None else arrays_of(teacher))
    if chunk == 0 or chunk >= length:
        return one(pieces)
    pieces = in_chunks(pieces, length, chunk)
    first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    body = jax.checkpoint(lambda total, piece: (jax.tree.map(jnp.add, total, one(piece)), None))
    return jax.lax.scan(body, zeros, pieces)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def frozen_head_sums(
    axes: str,
    chunk: int,
    form: AnyTeacher | None,
    kernel: Float[Array, ...],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    teacher: dict[str, Array],
    kl_weight: Float[Array, ""],
) -> TokenSums:
    """:func:`chunked_token_sums` for a head that does not train, and "objective": cross entropy plus ``kl_weight`` times
    the divergence. A gradient passes through "objective" only, and reaches ``hidden`` only.

    ``kernel`` has dimensions ``axes``, "vd" or "dv"; ``teacher`` are the arrays of a teacher and ``form`` is the teacher
    without them, or None for no divergence. The gradient is formed beside the sums, while a chunk's logits exist, so that they are not
    computed again. Chunks without a token of weight above 0 are not computed at all.
    """
    return _frozen_head(axes, chunk, form, kernel, hidden, targets, weights, teacher, kl_weight, gradient=False)[0]


def _frozen_head(
    axes: str, chunk: int, form: AnyTeacher | None, kernel, hidden, targets, weights, teacher, kl_weight, gradient
):
    """(sums, gradient of their objective with respect to ``hidden`` or None)."""
    length = hidden.shape[1]
    chunk = min(chunk or length, length)
    kernel = kernel.astype(hidden.dtype)

    def head(x):
        return jnp.einsum(f"btd,{axes}->btv", x, kernel, preferred_element_type=jnp.float32)

    def one(hidden, targets, weights, arrays):
        held = _seen_by(head, _with_arrays(form, arrays))

        def objective(logits):
            sums = token_sums(logits, targets, weights, held)
            return sums["cross_entropy"] + kl_weight * sums.get("kl", 0.0), sums

        value, pull, sums = jax.vjp(objective, head(hidden), has_aux=True)
        sums["objective"] = value
        if not gradient:
            return sums, None
        (d_logits,) = pull(jnp.ones_like(value))
        return sums, jnp.einsum(f"btv,{axes}->btd", d_logits.astype(hidden.dtype), kernel)

    def nothing(*piece):
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, *piece))

    def body(total, piece):
        counted = jnp.any(_counted(piece[2], _with_arrays(form, piece[3])))
        sums, d = jax.lax.cond(counted, one, nothing, *piece)
        return jax.tree.map(jnp.add, total, sums), d

    pieces = in_chunks((hidden, targets, weights, teacher), length, chunk)
    sums = jax.eval_shape(lambda piece: one(*piece)[0], jax.tree.map(lambda x: x[0], pieces))
    sums, d = jax.lax.scan(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums), pieces)
    if gradient:
        d = jnp.moveaxis(d, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, :length]
    return sums, d


def _frozen_head_forward(axes, chunk, form, *arrays):
    return _frozen_head(axes, chunk, form, *arrays, gradient=True)


def _frozen_head_backward(axes, chunk, form, d_hidden, cotangents):
    del axes, chunk, form
    return None, (cotangents["objective"] * d_hidden).astype(d_hidden.dtype), None, None, None, None


frozen_head_sums.defvjp(_frozen_head_forward, _frozen_head_backward)


def _counted(weights: jax.Array, teacher: AnyTeacher | None) -> jax.Array:
    return weights > 0 if teacher is None else (weights > 0) | (teacher.weights > 0)


def _with_arrays(teacher: AnyTeacher | None, arrays: dict[str, jax.Array]) -> AnyTeacher | None:
    return None if teacher is None else teacher._replace(**arrays)


def _seen_by(head: Callable[[jax.Array], jax.Array], teacher: AnyTeacher | None) -> AnyTeacher | None:
    """The teacher with logits: one that runs holds hidden states, which go through the head."""
    return teacher._replace(values=head(teacher.values)) if isinstance(teacher, Teacher) else teacher


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
        kernel, scale = decoder.head_kernel(), jnp.float32(kl_weight(stage, inputs.progress))
        if _head_is_frozen(decoder, stage):
            arrays = {} if teacher is None else arrays_of(teacher)
            form = teacher and teacher._replace(**dict.fromkeys(arrays))
            operands = (jax.lax.stop_gradient(kernel), hidden, batch["targets"], weights, arrays, scale)
            sums = frozen_head_sums(decoder.head_axes, stage.loss_chunk, form, *operands)
        else:
            head = functools.partial(decoder.head, kernel=kernel)
            sums = chunked_token_sums(head, hidden, batch["targets"], weights, teacher, stage.loss_chunk)
            sums["objective"] = sums["cross_entropy"] + scale * sums.get("kl", 0.0)
        weight = jnp.sum(weights)
        metrics = {
            "cross_entropy": (jax.lax.stop_gradient(sums["cross_entropy"]), weight),
            "accuracy": (sums["hits"], jnp.sum(weights > 0, dtype=jnp.float32)),
        }
        if teacher is not None:
            metrics["kl"] = (jax.lax.stop_gradient(sums["kl"]), jnp.sum(teacher.weights))
        return Sums(loss=sums["objective"], weight=weight, metrics=metrics), leaving

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
