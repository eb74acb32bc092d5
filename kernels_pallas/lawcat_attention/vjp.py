"""LAWCAT attention composed of its parts, and the custom_vjp around the kernels that compute all of it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax

from kernels_pallas import dispatch
from kernels_pallas.gated_linear_attention.api import decode_step, gated_linear_attention
from kernels_pallas.lawcat_attention import xla

OP = "lawcat_attention"


class LayerSpec(NamedTuple):
    """The static part of a call, hashable for ``custom_vjp``."""

    implementation: str | None
    normalize: bool
    gate_normalizer: float
    lower_bound: float | None


def composed(spec: LayerSpec, q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, valid=None):
    """(o, (S, z)): convolutions, feature map and gates in XLA, then ``gated_linear_attention`` or ``decode_step``."""
    q, k, log_g = xla.prepare(q, k, gate_logits, conv_q, conv_k, phi, conv_state, valid, spec.gate_normalizer)
    options = {
        "normalize": spec.normalize,
        "gate_lower_bound": spec.lower_bound,
        "implementation": spec.implementation,
    }
    if q.shape[1] == 1 and initial_state is not None:
        o, state = decode_step(q[:, 0], k[:, 0], v[:, 0], log_g[:, 0], initial_state, **options)
        o = o[:, None]
    else:
        o, state = gated_linear_attention(q, k, v, log_g, initial_state=initial_state, **options)
    return o, state


def next_conv_state(q, k, conv_q, conv_state, lengths=None) -> tuple[jax.Array, jax.Array]:
    """The conv_state of the next call: the last W - 1 valid rows of q and of k."""
    rows, (tail_q, tail_k) = conv_q.shape[1] - 1, conv_state or (None, None)
    return xla.last_rows(q, tail_q, rows, lengths), xla.last_rows(k, tail_k, rows, lengths)


def _composed_with_tails(spec: LayerSpec, *arrays):
    """What :func:`by_kernel` computes, from parts that have gradients."""
    q, k, conv_q, conv_state = arrays[0], arrays[1], arrays[4], arrays[8]
    return *composed(spec, *arrays), next_conv_state(q, k, conv_q, conv_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_kernel(spec: LayerSpec, *arrays):
    """(o, (S, z), conv_state) by the layer kernels of the backend that ``spec`` names.

    ``arrays``: q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state.
    """
    assert spec.implementation is not None  # the caller has asked kernel_for
    run = dispatch.forward_module(OP, spec.implementation).forward
    o, state, *tails = run(
        *arrays,
        normalize=spec.normalize,
        gate_normalizer=spec.gate_normalizer,
        gate_lower_bound=spec.lower_bound,
    )
    return o, state, tails[0] if tails else next_conv_state(arrays[0], arrays[1], arrays[4], arrays[8])


def _by_kernel_forward(spec: LayerSpec, *arrays):
    return by_kernel(spec, *arrays), arrays


def _by_kernel_backward(spec: LayerSpec, arrays, cotangents):
    # The inputs are the only residuals: features and gates are recomputed, which costs less than storing them.
    _, pullback = jax.vjp(functools.partial(_composed_with_tails, spec), *arrays)
    do, state, tails = cotangents
    return pullback((do, tuple(state), tuple(tails)))


by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)
