"""LAWCAT attention of one layer from its raw projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.checks import check_bound, check_flag, check_normalizer, check_segments, check_sharding
from kernels_pallas.chunking import VANISHED
from kernels_pallas.common import match_varying_all, segment_numbers, target_platform, valid_tokens
from kernels_pallas.lawcat_attention.checks import check_layer
from kernels_pallas.lawcat_attention.vjp import OP, LayerSpec, by_kernel, without_kernel

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def kernel_for(
    q: Any,
    k: Any,
    v: Any,
    gate_logits: Any,
    conv_q: Any,
    conv_k: Any,
    phi: Any,
    *,
    normalize: bool = True,
    gate_lower_bound: float | None = -1.25,
    lengths: bool = False,
    segments: bool = False,
    implementation: str | None = None,
) -> str | None:
    """The name of the implementation whose layer kernels ``lawcat_attention`` uses for these arrays.

    ``lengths``, ``segments``: whether the call has ``lengths``, ``segment_ids``.

    None: the op is composed of its parts, with the implementation that ``kernels_pallas.implementation_for`` chooses for
    gated_linear_attention. Arrays may be ShapeDtypeStructs. Raises ValueError for an unknown name.
    """
    implementation = dispatch.requested(implementation)
    call = (q, k, v, gate_logits, conv_q, conv_k, phi)
    options = {"normalize": normalize, "gate_lower_bound": gate_lower_bound, "lengths": lengths, "segments": segments}
    platform = target_platform(q, k, v, gate_logits)

    def reason(name: str) -> str | None:
        return dispatch.refusal(OP, name, platform, *call, **options)

    if implementation is None:
        return dispatch.first_that_serves(platform, reason)
    return implementation if reason(implementation) is None else None


def lawcat_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T Hkv d"],
    v: Float[Array, "B T Hkv V"],
    gate_logits: Float[Array, "B T Hkv K"],
    conv_q: Float[Array, "H W d"],
    conv_k: Float[Array, "H W d"],
    phi: Float[Array, "H d f"],
    *,
    initial_state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]] | None = None,
    conv_state: tuple[Float[Array, "B W-1 H d"], Float[Array, "B W-1 Hkv d"]] | None = None,
    normalize: bool = True,
    gate_normalizer: float = 16.0,
    gate_lower_bound: float | None = -1.25,
    lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    zero_padding: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Array, Array], tuple[Array, Array]]:
    """LAWCAT attention of one layer from its raw projections (arXiv 2509.18467; no rotary embedding).

    Per query head: causal convolutions of q and k with their own taps, features max([softmax(u phi) ; softmax(-u phi)],
    1e-12), gates logsigmoid(gate_logits) / gate_normalizer bounded below, then normalised gated linear attention with
    K = 2 f features.

    Args:
      q, k, v: projections, float32 or bfloat16 (one dtype); kv head h // (H / Hkv) serves query head h.
      gate_logits: float32 (or bfloat16), per kv head.
      conv_q, conv_k, phi: float32 or bfloat16 parameters, per query head; tap W - 1 is the current token's.
      initial_state: (S, z) float32 after the tokens before these, or None.
      conv_state: the W - 1 rows of raw q and of raw k before these, or None for zeros.
      normalize, gate_lower_bound: as in gated_linear_attention.
      gate_normalizer: a static number above 0.
      lengths: number of valid tokens of each sequence among these T, or None for all: the rest is padding on the right,
        which leaves state and conv_state as they were and whose output is 0. What the arrays hold there, NaN included,
        reaches nothing, and their gradient there is 0. Concrete values outside 0 .. T are refused; traced ones, which
        cannot be checked, are taken as the nearest of 0 and T.
      segment_ids: documents of a row; convolution rows, S and z start anew (from zeros) wherever the id changes between
        valid tokens. The first segment goes on from the states given, and those returned are the last one's. See
        gated_linear_attention.
      zero_padding: False leaves the output at padding finite but meaningless, for callers that mask later. That saves a
        pass over the output and one over its gradient.
      implementation: as in gated_linear_attention. A Pallas name and None take the backend's kernels for the whole layer
        where it has them for the case (:func:`kernel_for`); otherwise the parts run one after another, with
        gated_linear_attention's choice.

    Returns:
      o in v.dtype, the state after the last valid token, and conv_state: the last W - 1 valid rows of q and of k. Works
      for T = 1.

    Raises:
      ValueError: naming the argument.
    """
    check_layer(q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, lengths)
    check_bound(gate_lower_bound)
    check_flag("normalize", normalize)
    check_flag("zero_padding", zero_padding)
    check_normalizer(gate_normalizer)
    for name, x in (("q", q), ("k", k), ("v", v), ("gate_logits", gate_logits)):
        check_sharding(name, x)
    implementation = dispatch.requested(implementation)
    initial_state = None if initial_state is None else (initial_state[0], initial_state[1])
    conv_state = None if conv_state is None else (conv_state[0], conv_state[1])
    arrays = (q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state)
    bound = None if gate_lower_bound is None else float(gate_lower_bound)
    spec = LayerSpec(implementation, bool(normalize), float(gate_normalizer), bound, bool(zero_padding))

    valid = numbers = None
    if lengths is not None:
        lengths = jnp.clip(lengths.astype(jnp.int32), 0, q.shape[1])
        valid = valid_tokens(lengths, q.shape[1])
    if segment_ids is not None:
        check_segments(segment_ids, *q.shape[:2])
        numbers = segment_numbers(segment_ids, valid)
    kernel = kernel_for(
        *arrays[:7],
        normalize=normalize,
        gate_lower_bound=bound,
        lengths=lengths is not None,
        segments=numbers is not None,
        implementation=implementation,
    )
    if kernel is not None:
        # Gates of -inf would become NaN in the products that sum gates.
        floor = VANISHED if bound is None else max(bound, VANISHED)
        spec = spec._replace(implementation=kernel, lower_bound=floor)
        return by_kernel(spec, *match_varying_all(*arrays, lengths, numbers))
    return without_kernel(spec, *arrays, lengths, numbers)
