"""What a student shows when it reads text: statistics of its mixers, errors by layer, and its states in a long text.

Arrays are numpy on the host; M linearised layers in their order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.config import StageConfig
from lawcat_jax.data.batch import Batch
from lawcat_jax.inference.generation import bucket, empty_cache, needs_room
from lawcat_jax.models import Decoder, bind
from lawcat_jax.models.cache import Cache
from lawcat_jax.models.finite import not_finite_error
from lawcat_jax.training.attention_transfer import make_loss
from lawcat_jax.training.divergence import Teacher
from lawcat_jax.training.finetune import chunked_token_sums
from lawcat_jax.training.step import StepInputs

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_HEAD_CHUNK = 256  # tokens whose logits exist at once


@functools.partial(jax.jit, static_argnames="graphdef")
def statistics(params: dict[str, Any], batch: Batch, *, graphdef: Any) -> dict[str, Array]:
    """``Decoder.diagnostics`` of the student on a batch: what ``config.log.diagnostics`` writes in training."""
    return bind(graphdef, params).diagnostics(batch["tokens"], lengths=batch["lengths"])


@functools.partial(jax.jit, static_argnames="graphdef")
def relative_errors(params: dict[str, Any], batch: Batch, *, graphdef: Any) -> Float[Array, " M"]:
    """|student - teacher|^2 / |teacher|^2 of each layer's heads, teacher-forced: the ``relative_mse`` of stage 1, on the
    same positions and without adapters.
    """
    sums, _ = make_loss(graphdef, StageConfig())(params, batch, StepInputs())
    error, power = sums.metrics["relative_mse"]
    return error / jnp.maximum(power, 1e-20)


def replacement_costs(graphdef: Any, params: dict[str, Any], batch: Batch) -> Float[np.ndarray, " M"]:
    """KL(teacher || teacher with one layer replaced), nats a token, for each linearised layer alone.

    The replaced layer is the student's, adapters included; all others are the teacher's.
    """
    wanted = _teacher_hidden(params, batch, graphdef=graphdef)
    numbers = np.arange(len(linear_layers(bind(graphdef, params))), dtype=np.int32)
    costs = [_replaced(params, batch, wanted, number, graphdef=graphdef) for number in numbers]
    return np.asarray(jax.device_get(costs), np.float64)


def linear_layers(decoder: Decoder) -> list[int]:
    """Numbers, from 0, of the layers that a student has linearised; empty for a plain teacher."""
    return [layer for part in decoder.segments() if part.linear for layer in range(part.start, part.stop)]


@functools.partial(jax.jit, static_argnames="graphdef")
def _teacher_hidden(params, batch: Batch, *, graphdef: Any) -> Float[Array, "B T D"]:
    return bind(graphdef, params)(batch["tokens"], lengths=batch["lengths"], as_teacher=True, return_hidden=True)


@functools.partial(jax.jit, static_argnames="graphdef")
def _replaced(params, batch: Batch, wanted, number: Int[Array, ""], *, graphdef: Any) -> Float[Array, ""]:
    """The divergence with linearised layer ``number`` of M; one program serves all layers."""
    decoder = bind(graphdef, params)
    alone = jnp.arange(len(linear_layers(decoder))) == number
    if "lora" in params:  # the adapters of the others give nothing
        lora = jax.tree.map(lambda x: jnp.where(alone.reshape(-1, *[1] * (x.ndim - 1)), x, 0), params["lora"])
        decoder = bind(graphdef, {**params, "lora": lora})
    hidden = _with_one_layer(decoder, batch, jnp.asarray(linear_layers(decoder))[number])
    weights = jnp.asarray(batch["loss_weights"])
    head = functools.partial(decoder.head, kernel=decoder.head_kernel())
    sums = chunked_token_sums(head, hidden, batch["targets"], weights, Teacher(wanted, weights), _HEAD_CHUNK)
    return sums["kl"] / jnp.sum(weights)


def _with_one_layer(decoder: Decoder, batch: Batch, layer: Int[Array, ""]) -> Float[Array, "B T D"]:
    """Final-normed hidden states of the teacher with the student's ``layer`` in its place."""
    context = decoder.context(batch["tokens"], lengths=batch["lengths"])
    x = decoder.embedded(batch["tokens"], context)

    def mix(mixer, index, state, h, q, k, v):
        del state

        def student():
            return mixer(h, q, k, v, decoder.layer_context(context, index))[0]

        def teacher():
            return decoder.teacher_attention(context, index, q, k, v)

        return jax.lax.cond(index == layer, student, teacher), None

    for segment in decoder.segments():
        if segment.linear:
            x, _ = decoder.scan_linear(segment, x, mix)
        else:
            x, _ = decoder.run_softmax(segment, x, context)
    return decoder.final_norm(x)


def state_norms(
    graphdef: Any,
    params: dict[str, Any],
    tokens: Int[np.ndarray, "B T"],
    chunk: int,
    progress: Callable[[int], None] = lambda position: None,
) -> tuple[list[int], Float[np.ndarray, "n M H"]]:
    """(positions, Frobenius norms of S of each head there, mean over rows) in one pass over ``tokens``.

    The pass hands its state from chunk to chunk, so its memory does not grow with T (but for softmax layers of a
    hybrid, which keep their keys and values); positions are the ends of chunks. ``progress`` is told each.
    """
    positions, found = [], []
    for position, norms in _chunks(graphdef, params, tokens, chunk):
        positions.append(position)
        found.append(np.asarray(norms, np.float64))
        progress(position)
    return positions, np.stack(found)


def _chunks(graphdef: Any, params: dict[str, Any], tokens: Int[np.ndarray, "B T"], chunk: int) -> Iterator:
    rows, length = tokens.shape
    room = bucket(length) if needs_room(graphdef, params, False) else 1
    cache, _ = empty_cache(params, graphdef=graphdef, batch=rows, length=room)
    for start in range(0, length, chunk):
        piece, unread = tokens[:, start : start + chunk], np.full(rows, length - start, np.int32)
        cache, norms = _advance(params, cache, piece, unread, graphdef=graphdef)
        yield start + piece.shape[1], norms


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _advance(
    params, cache: Cache, tokens: Int[Array, "B T"], unread: Int[Array, " B"], *, graphdef: Any
) -> tuple[Cache, Float[Array, "M H"]]:
    _, cache = bind(graphdef, params).prefill(tokens, cache, unread=unread, return_hidden=True)
    return cache, jnp.mean(jnp.linalg.norm(cache["linear"]["S"], axis=(-2, -1)), axis=1)


def check_finite(graphdef: Any, params: dict[str, Any], batch: Batch, *arrays: Any) -> None:
    """Refuse results that are no numbers.

    Raises:
      UserError: naming the first layer whose output is not finite.
    """
    if not all(np.isfinite(np.asarray(array)).all() for array in jax.tree.leaves(arrays)):
        raise not_finite_error(graphdef, params, batch["tokens"][0][: batch["lengths"][0]])
