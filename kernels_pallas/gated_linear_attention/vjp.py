"""The custom_vjp around the backends of gated linear attention and of its decode step."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.common import segment_starts
from kernels_pallas.gated_linear_attention import decode as decode_xla

OP = "gated_linear_attention"


class AttentionSpec(NamedTuple):
    """The static part of a call, hashable for ``custom_vjp``."""

    implementation: str
    normalize: bool
    lower_bound: float | None

    @property
    def applies_bound(self) -> bool:
        """Whether the backend raises gates to the bound by itself."""
        return getattr(dispatch.forward_module(OP, self.implementation), "APPLIES_BOUND", False)


def attention_spec(implementation: str, normalize: bool, lower_bound: float | None) -> AttentionSpec:
    """The spec with plain Python values, whatever numbers the caller passed."""
    return AttentionSpec(implementation, bool(normalize), None if lower_bound is None else float(lower_bound))


VANISHED = -128.0
"""Nats a token. e^-128 is 0 in float32, so lower gates than this, -inf included, are the same gate."""


def bounded(log_g: jax.Array, lower_bound: float | None) -> jax.Array:
    """log_g raised to the bound, with zero gradient below it; belongs outside of the ``custom_vjp``.

    Without a bound, or with one that is lower, it is raised to :data:`VANISHED`: kernels form sums of gates by products
    with matrices that hold zeros, where -inf would become NaN.
    """
    floor = VANISHED if lower_bound is None else max(lower_bound, VANISHED)
    # where, not maximum: at a tie maximum passes half of the gradient. XLA fuses this into the producer of log_g.
    return jnp.where(log_g < floor, jnp.asarray(floor, log_g.dtype), log_g)


def restarted(log_g: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """log_g with a gate that forgets everything at the first token of every segment but the first, and zero gradient
    there."""
    starts = segment_starts(segment_ids)[:, :, None, None]
    return jnp.where(starts, jnp.asarray(VANISHED, log_g.dtype), log_g)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(spec: AttentionSpec, q, k, v, log_g, initial_state):
    """(o, (S, z)) by the backend that ``spec`` names, from arguments that have been checked and bounded."""
    run = dispatch.forward_module(OP, spec.implementation).forward
    o, state, _ = run(
        q, k, v, log_g, initial_state, normalize=spec.normalize, lower_bound=spec.lower_bound, save_residuals=False
    )
    return o, state


def _attend_forward(spec: AttentionSpec, q, k, v, log_g, initial_state):
    run = dispatch.forward_module(OP, spec.implementation).forward
    o, state, residuals = run(
        q, k, v, log_g, initial_state, normalize=spec.normalize, lower_bound=spec.lower_bound, save_residuals=True
    )
    return (o, state), (residuals, initial_state is None)


def _attend_backward(spec: AttentionSpec, residuals, cotangents):
    residuals, no_state = residuals
    do, dstate = cotangents
    run = dispatch.backward_module(OP, spec.implementation).backward
    *grads, dstate = run(residuals, do, tuple(dstate), normalize=spec.normalize, lower_bound=spec.lower_bound)
    return *grads, None if no_state else tuple(dstate)


attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def decode(implementation: str, normalize: bool, q, k, v, log_g, state):
    """(o, (S, z)) of one token, by the backend's kernel or else by plain XLA; the gradient is plain XLA's."""
    run = getattr(dispatch.forward_module(OP, implementation), "decode", None) or decode_xla.decode
    return run(q, k, v, log_g, state, normalize=normalize)


def _decode_forward(implementation: str, normalize: bool, q, k, v, log_g, state):
    return decode(implementation, normalize, q, k, v, log_g, state), (q, k, v, log_g, state)


def _decode_backward(implementation: str, normalize: bool, residuals, cotangents):
    _, pullback = jax.vjp(functools.partial(decode_xla.decode, normalize=normalize), *residuals)
    return pullback((cotangents[0], tuple(cotangents[1])))


decode.defvjp(_decode_forward, _decode_backward)
