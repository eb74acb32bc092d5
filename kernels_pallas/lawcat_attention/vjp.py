"""LAWCAT attention composed of its parts, and the custom_vjp around the kernels that compute all of it."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import dispatch
from kernels_pallas.common import valid_tokens, without_padding
from kernels_pallas.gated_linear_attention.api import decode_step, gated_linear_attention
from kernels_pallas.gated_linear_attention.vjp import AttentionSpec, attention_spec, bounded
from kernels_pallas.lawcat_attention import xla

OP = "lawcat_attention"


class LayerSpec(NamedTuple):
    """The static part of a call, hashable for ``custom_vjp``."""

    implementation: str | None
    normalize: bool
    gate_normalizer: float
    lower_bound: float | None
    zero_padding: bool


def composed(
    spec: LayerSpec, q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, valid=None, numbers=None
):
    """(o, (S, z)): convolutions, feature map and gates in XLA, then ``gated_linear_attention`` or ``decode_step``.

    ``numbers``: segments of the tokens, see ``kernels_pallas.common.segment_numbers``.
    """
    normalizer = spec.gate_normalizer
    q, k, log_g = xla.prepare(q, k, gate_logits, conv_q, conv_k, phi, conv_state, valid, normalizer, numbers)
    options = {
        "normalize": spec.normalize,
        "gate_lower_bound": spec.lower_bound,
        "implementation": spec.implementation,
    }
    if q.shape[1] == 1 and initial_state is not None:
        o, state = decode_step(q[:, 0], k[:, 0], v[:, 0], log_g[:, 0], initial_state, **options)
        o = o[:, None]
    else:
        o, state = gated_linear_attention(q, k, v, log_g, initial_state=initial_state, segment_ids=numbers, **options)
    return o, state


def next_conv_state(q, k, conv_q, conv_state, lengths=None, numbers=None) -> tuple[jax.Array, jax.Array]:
    """The conv_state of the next call: the last W - 1 valid rows of q and of k, zeros for those of earlier segments."""
    rows, (tail_q, tail_k) = conv_q.shape[1] - 1, conv_state or (None, None)
    found_q, found_k = xla.last_rows(q, tail_q, rows, lengths), xla.last_rows(k, tail_k, rows, lengths)
    if numbers is None:
        return found_q, found_k
    # The rows before these tokens belong to segment 0, as the zeros that stand for their numbers say.
    same = xla.last_rows(numbers, None, rows, lengths) == xla.last_rows(numbers, None, 1, lengths)
    kept_q, kept_k = without_padding(same, found_q, found_k)
    return kept_q, kept_k


def without_kernel(spec: LayerSpec, *arrays):
    """(o, (S, z), conv_state) from parts that have gradients; ``arrays`` as in :func:`by_kernel`."""
    q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths, numbers = arrays
    valid = None if lengths is None else valid_tokens(lengths, q.shape[1])
    q, k, v, gate_logits = without_padding(valid, q, k, v, gate_logits)
    parameters = (conv_q, conv_k, phi)
    o, state = composed(spec, q, k, v, gate_logits, *parameters, initial_state, conv_state, valid, numbers)
    if valid is not None and spec.zero_padding:
        (o,) = without_padding(valid, o)
    return o, state, next_conv_state(q, k, conv_q, conv_state, lengths, numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_kernel(spec: LayerSpec, *arrays):
    """(o, (S, z), conv_state) by the layer kernels of the backend that ``spec`` names.

    ``arrays``: q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths (within 0 .. T), numbers.
    """
    *inputs, lengths, numbers = arrays
    o, state, *tails = _layer(spec).forward(
        *inputs, normalize=spec.normalize, **_front_options(spec), lengths=lengths, numbers=numbers
    )
    return o, state, tails[0] if tails else _tails(arrays)


def _layer(spec: LayerSpec) -> ModuleType:
    assert spec.implementation is not None  # the caller has asked kernel_for
    return dispatch.forward_module(OP, spec.implementation)


def _front_options(spec: LayerSpec) -> dict[str, float | None]:
    return {"gate_normalizer": spec.gate_normalizer, "gate_lower_bound": spec.lower_bound}


def _tails(arrays):
    return next_conv_state(arrays[0], arrays[1], arrays[4], arrays[8], *arrays[9:])


class _Again(NamedTuple):
    """Stands in residuals for one of the features, which the backward pass forms again."""

    position: int


jax.tree_util.register_static(_Again)


def _features(spec: LayerSpec, arrays):
    q, k, _, gate_logits, conv_q, conv_k, phi, _, conv_state, lengths, numbers = arrays
    known = {"lengths": lengths, "numbers": numbers}
    return _layer(spec).features(q, k, gate_logits, conv_q, conv_k, phi, conv_state, **_front_options(spec), **known)


def _attention(spec: LayerSpec) -> AttentionSpec:
    return attention_spec(spec.implementation or "", spec.normalize, spec.lower_bound)


def _has_gradient(spec: LayerSpec, arrays) -> bool:
    """Whether the backend has the gradient of gated linear attention for these arrays."""
    q, v, phi = arrays[0], arrays[2], arrays[6]
    shaped = jax.ShapeDtypeStruct((*q.shape[:-1], 2 * phi.shape[-1]), q.dtype)
    options = {"normalize": spec.normalize, "lower_bound": spec.lower_bound, "differentiated": True}
    attention = dispatch.forward_module("gated_linear_attention", spec.implementation or "")
    return attention.supports(shaped, shaped, v, shaped, **options) is None


def _by_kernel_forward(spec: LayerSpec, *arrays):
    if arrays[0].shape[1] == 1 or not hasattr(_layer(spec), "features") or not _has_gradient(spec, arrays):
        return by_kernel(spec, *arrays), (arrays, None)
    v, initial_state, lengths, numbers = arrays[2], arrays[7], arrays[9], arrays[10]
    formed = _features(spec, arrays)
    known = {"lengths": lengths, "numbers": numbers}
    q, k, log_g = formed
    o, state, residuals = _attention(spec).run(q, k, v, log_g, initial_state, save_residuals=True, **known)

    # Features are the largest arrays here by far and cheap to form.
    def without_features(x: jax.Array):
        return next((_Again(i) for i, feature in enumerate(formed) if x is feature), x)

    return (o, state, _tails(arrays)), (arrays, jax.tree.map(without_features, residuals))


def _by_kernel_backward(spec: LayerSpec, residuals, cotangents):
    arrays, residuals = residuals
    do, dstate, dtails = cotangents
    if residuals is None:
        # The inputs are the only residuals: features and gates are recomputed, which costs less than storing them.
        if not _has_gradient(spec, arrays):
            spec = spec._replace(implementation=None)
        pullback = _pullback(functools.partial(without_kernel, spec), arrays)
        return *pullback((do, tuple(dstate), tuple(dtails))), None, None
    # Without the barrier XLA would find that the forward pass has formed the same features, and keep them.
    (arrays, residuals), do = lax.optimization_barrier(((arrays, residuals), do))
    formed = _features(spec, arrays)

    def with_features(x):
        return formed[x.position] if isinstance(x, _Again) else x

    residuals = jax.tree.map(with_features, residuals, is_leaf=lambda x: isinstance(x, _Again))
    dq, dk, dv, dlog_g, dinitial = _attention(spec).pull_back(residuals, do, dstate)

    def front(q, k, gate_logits, conv_q, conv_k, phi, conv_state):
        lengths, numbers = arrays[9], arrays[10]
        valid = None if lengths is None else valid_tokens(lengths, q.shape[1])
        q, k, gate_logits = without_padding(valid, q, k, gate_logits)
        parameters = (conv_q, conv_k, phi, conv_state)
        *features, log_g = xla.prepare(
            q, k, gate_logits, *parameters, valid, spec.gate_normalizer, numbers, known=formed[:2]
        )
        (features[0],) = without_padding(valid, features[0])
        tails = next_conv_state(q, k, conv_q, conv_state, lengths, numbers)
        return *features, bounded(log_g, spec.lower_bound), tails

    q, k, _, *others, initial_state, conv_state, _, _ = arrays
    _, pullback = jax.vjp(front, q, k, *others, conv_state)
    dq, dk, *dothers, dconv_state = pullback((dq, dk, dlog_g.astype(jnp.float32), tuple(dtails)))
    return dq, dk, dv, *dothers, None if initial_state is None else tuple(dinitial), dconv_state, None, None


def _pullback(function, arrays):
    """The pullback of ``function`` to all of ``arrays`` but the last two, which hold whole numbers."""
    *inputs, lengths, numbers = arrays
    return jax.vjp(lambda *x: function(*x, lengths, numbers), *inputs)[1]


by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)
