"""Stage 1, attention transfer: every linear attention layer learns to give its teacher's softmax attention output
(paper section 3.2).

:func:`make_loss` is the loss of the stage; :func:`teacher_forced` is the pass over the layers that it sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from lawcat_jax import models
from lawcat_jax.config import StageConfig
from lawcat_jax.data.batch import Batch
from lawcat_jax.errors import UserError
from lawcat_jax.models import Decoder
from lawcat_jax.training.step import LossFn, StepInputs, Sums

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

LayerLoss = Callable[["Int[Array, '']", "Float[Array, 'B T E']", "Float[Array, 'B T E']", "Bool[Array, 'B T']"], Any]
"""(layer number, teacher's and student's heads before Wo, E = H d, float32, mask) -> a pytree of scalars."""


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
        # By where: NaN times a weight of 0 would be NaN, in the gradient too.
        teacher, student = (jnp.where(mask[..., None], x, 0.0) for x in (teacher, student))
        error, power = jnp.sum(jnp.square(student - teacher)), jnp.sum(jnp.square(teacher))
        return {"error": error / teacher.shape[-1], "power": power / teacher.shape[-1]}

    def loss(params: dict, batch: Batch, inputs: StepInputs) -> tuple[Sums, None]:
        del inputs  # nothing random, nothing scheduled
        decoder = models.bind(graphdef, params)
        mask = batch["mask"]
        options = {"mask": mask, "lengths": batch["lengths"], "segment_ids": batch.get("segment_ids")}
        options["unroll_layers"] = stage.unroll_layers
        layers = teacher_forced(decoder, batch["tokens"], layer_loss=layer_loss, **options)
        count = mask.size if stage.loss_denominator == "all" else jnp.sum(mask)
        sums = Sums(
            loss=stage.mse_weight * jnp.mean(layers["error"]),
            weight=jnp.asarray(count, jnp.float32),
            metrics={"relative_mse": (jax.lax.stop_gradient(layers["error"]), layers["power"])},
        )
        return sums, None

    return loss


def teacher_forced(
    decoder: Decoder,
    tokens: Int[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    layer_loss: LayerLoss,
    unroll_layers: bool = False,
) -> Any:
    """Student and teacher compared layer by layer on the teacher's hidden states: what ``layer_loss`` returned, stacked
    over the M linearised layers.

    Each layer gets the teacher's hidden state, and passes the teacher's output on. Gradients reach the mixers only, and
    the backward pass of a layer runs right behind its forward pass, so that memory holds the activations of one layer.

    Args:
      decoder: a student; its adapters are left out.
      tokens: int32, padding on the right.
      mask: handed to ``layer_loss``; None for all valid tokens. Outputs at padding are finite and mean nothing.
      lengths: valid tokens of each sequence, or None for all.
      segment_ids: documents of packed rows, or None for one document a row; see ``Decoder.__call__``.
      layer_loss: see :data:`LayerLoss`.
      unroll_layers: no loop over layers in the compiled program (see ``StageConfig``).

    Raises:
      UserError: without mixers, or when an output that depends on the student is no scalar.
    """
    if decoder.mixers is None:
        raise UserError("teacher_forced: the model has no linearised layers; give it an attention config")
    context = decoder.context(tokens, lengths=lengths, segment_ids=segment_ids)
    mask = context.valid() if mask is None else mask
    x, collected = jax.lax.stop_gradient(decoder.embedded(tokens, context)), []

    def mix(mixer, index, state, *projections):
        del state
        h, q, k, v = jax.lax.stop_gradient(projections)
        teacher = decoder.teacher_attention(context, index, q, k, v)
        graphdef, params = nnx.split(mixer)
        compare = functools.partial(_compare, graphdef, layer_loss)
        return teacher, _eager(
            compare, params, (index, h, q, k, v, teacher, mask, decoder.layer_context(context, index))
        )

    for segment in decoder.segments():
        if segment.linear:
            x, sums = decoder.scan_linear(segment, x, mix, adapted=False, unroll=unroll_layers)
            collected.append(sums)
        else:
            x, _ = decoder.run_softmax(segment, x, context, unroll=unroll_layers)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *collected)


def _compare(graphdef, layer_loss: Callable, params, inputs):
    index, h, q, k, v, teacher, mask, context = inputs
    student, _ = nnx.merge(graphdef, params)(h, q, k, v, context)
    flat = (o.reshape(*o.shape[:2], -1).astype(jnp.float32) for o in (teacher, student))
    return layer_loss(index, *flat, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _eager(function: Callable, params: Any, inputs: Any) -> Any:
    """``function(params, inputs)``; under differentiation the gradients of its scalars are computed at once.

    The residuals are then as large as the parameters, instead of as large as the activations: no gradient crosses a
    layer, so nothing has to wait for the layers above.
    """
    return function(params, inputs)


def _eager_forward(function, params, inputs):
    sums, pullback = jax.vjp(lambda params: function(params, inputs), params)
    leaves, treedef = jax.tree.flatten(sums)
    gradients = []
    for number, depends in enumerate(_dependent(function, params, inputs)):
        if depends and leaves[number].shape:
            raise UserError(
                f"layer_loss: an output of shape {leaves[number].shape} depends on the student; return scalars, or "
                "wrap what needs no gradient in jax.lax.stop_gradient"
            )
        if depends:
            one = [jnp.full_like(leaf, float(place == number)) for place, leaf in enumerate(leaves)]
            gradients.append(pullback(jax.tree.unflatten(treedef, one))[0])
        else:
            gradients.append(None)
    return sums, gradients


def _eager_backward(function, gradients, cotangents):
    del function
    pairs = [(c, g) for c, g in zip(jax.tree.leaves(cotangents), gradients, strict=True) if g is not None]
    if not pairs:
        raise UserError("layer_loss: none of its outputs depends on the student")
    total = jax.tree.map(
        lambda *leaves: sum(c * leaf for (c, _), leaf in zip(pairs, leaves, strict=True)), *[g for _, g in pairs]
    )
    return total, None


_eager.defvjp(_eager_forward, _eager_backward)


def _dependent(function, params, inputs) -> list[bool]:
    """Which outputs depend on the parameters (the teacher's own sums then cost no backward pass); errs towards True."""
    jaxpr = jax.make_jaxpr(lambda params: function(params, inputs))(params).jaxpr
    reached = {id(variable) for variable in jaxpr.invars}
    for equation in jaxpr.eqns:
        touched = any(id(variable) in reached for variable in equation.invars)
        if touched and equation.primitive.name != "stop_gradient":
            reached.update(id(variable) for variable in equation.outvars)
    return [id(variable) in reached for variable in jaxpr.outvars]
