"""The custom_vjp around the backends of gated linear attention and of its decode step."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.chunking import VANISHED
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

    def run(self, *arrays, save_residuals: bool, **known: jax.Array | None) -> Any:
        """(o, (S, z), residuals) of the backend's forward pass. ``known``: what some backends take beside the arrays, such
        as ``numbers``; None is left out."""
        options = {"normalize": self.normalize, "lower_bound": self.lower_bound, "save_residuals": save_residuals}
        options |= {name: x for name, x in known.items() if x is not None}
        return dispatch.forward_module(OP, self.implementation).forward(*arrays, **options)

    def pull_back(self, residuals: Any, do: jax.Array, dstate: Any) -> Any:
        """(dq, dk, dv, dlog_g, (dS0, dz0)) of the backend's backward pass."""
        run = dispatch.backward_module(OP, self.implementation).backward
        return run(residuals, do, tuple(dstate), normalize=self.normalize, lower_bound=self.lower_bound)


def attention_spec(implementation: str, normalize: bool, lower_bound: float | None) -> AttentionSpec:
    """The spec with plain Python values, whatever numbers the caller passed."""
    return AttentionSpec(implementation, bool(normalize), None if lower_bound is None else float(lower_bound))


def bounded(log_g: jax.Array, lower_bound: float | None) -> jax.Array:
    """log_g raised to the bound, with zero gradient below it; belongs outside of the ``custom_vjp``.

    Without a bound, or with one that is lower, it is raised to ``VANISHED``: kernels form sums of gates by products
    with matrices that hold zeros, where -inf would become NaN.
    """
    floor = VANISHED if lower_bound is None else max(lower_bound, VANISHED)
    # where, not maximum: at a tie maximum passes half of the gradient. XLA fuses this into the producer of log_g.
    return jnp.where(log_g < floor, jnp.asarray(floor, log_g.dtype), log_g)


def restarted(log_g: jax.Array, numbers: jax.Array) -> jax.Array:
    """log_g with a gate that forgets everything at the first token of every segment but the first, and zero gradient
    there."""
    starts = segment_starts(numbers)[:, :, None, None]
    return jnp.where(starts, jnp.asarray(VANISHED, log_g.dtype), log_g)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(spec: AttentionSpec, q, k, v, log_g, initial_state, numbers):
    """(o, (S, z)) by the backend that ``spec`` names, from arguments that have been checked and bounded.

    ``numbers``: the documents of packed rows for a backend that takes them, else None.
    """
    return spec.run(q, k, v, log_g, initial_state, save_residuals=False, numbers=numbers)[:2]


def _attend_forward(spec: AttentionSpec, q, k, v, log_g, initial_state, numbers):
    o, state, residuals = spec.run(q, k, v, log_g, initial_state, save_residuals=True, numbers=numbers)
    return (o, state), (residuals, initial_state is None)


def _attend_backward(spec: AttentionSpec, residuals, cotangents):
    residuals, no_state = residuals
    *grads, dstate = spec.pull_back(residuals, *cotangents)
    return *grads, None if no_state else tuple(dstate), None


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
