"""Attention transfer: student and teacher compared layer by layer on the teacher's hidden states (section 3.2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from lawcat_jax.errors import UserError

if TYPE_CHECKING:
    from lawcat_jax.models.decoder import Decoder


def teacher_forced(decoder: Decoder, tokens, mask, lengths, layer_loss: Callable, unroll_layers: bool) -> Any:
    """See :meth:`lawcat_jax.models.decoder.Decoder.teacher_forced`."""
    if decoder.mixers is None:
        raise UserError("teacher_forced: the model has no linearised layers; give it an attention config")
    context = decoder.context(tokens, lengths=lengths)
    mask = context.valid() if mask is None else mask
    x, collected = jax.lax.stop_gradient(decoder.embedded(tokens)), []

    def mix(mixer, index, state, *projections):
        del state
        h, q, k, v = jax.lax.stop_gradient(projections)
        teacher = decoder.teacher_attention(context, q, k, v)
        graphdef, params = nnx.split(mixer)
        compare = functools.partial(_compare, graphdef, layer_loss)
        return teacher, _eager(compare, params, (index, h, q, k, v, teacher, mask, context))

    for segment in decoder.segments():
        if segment.linear:
            x, sums = decoder.scan_linear(segment, x, mix, adapted=False, unroll=unroll_layers)
            collected.append(sums)
        else:
            x, _ = decoder._run_softmax(segment, x, context, unroll=unroll_layers)
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
