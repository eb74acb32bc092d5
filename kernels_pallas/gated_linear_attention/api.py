"""Normalised gated linear attention of a sequence, and of one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from kernels_pallas.checks import check_bound, check_flag, check_segments, check_sharding, check_state
from kernels_pallas.common import match_varying_all, segment_numbers, target_platform
from kernels_pallas.dispatch import implementation_for, takes_segments
from kernels_pallas.gated_linear_attention.checks import check_qkvg, check_values
from kernels_pallas.gated_linear_attention.vjp import attend, attention_spec, bounded, decode, restarted

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    log_g: Float[Array, "B T Hg K"],
    *,
    initial_state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]] | None = None,
    normalize: bool = True,
    gate_lower_bound: float | None = -1.25,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]]:
    """Normalised gated linear attention (arXiv 2509.18467, with the gates of GLA, arXiv 2312.06635)::

        S_t = diag(e^g_t) S_(t-1) + k_t v_t^T      z_t = e^g_t z_(t-1) + k_t      o_t = S_t^T q_t / (z_t.q_t + 1e-10)

    Args:
      q, k: non-negative features, float32 or bfloat16, one dtype for q, k and v.
      v: values; Hv divides H, query head h reads v head h // (H / Hv).
      log_g: natural logarithm of the gates, <= 0 (-inf forgets everything), float32 or bfloat16; Hg divides H, same rule.
      initial_state: (S, z) float32, or None for zeros.
      normalize: divide by the denominator; when False o = S^T q (z is carried all the same).
      gate_lower_bound: nats a token, below 0, or None. Lower gates are raised to it, with zero gradient there. A bound
        >= -1.25 allows chunks of 64 tokens with one reference point; None costs more. Gates below -128 are raised to
        -128, which in float32 changes nothing.
      segment_ids: documents of a row; S and z start anew (from zeros) wherever the id changes, and an id may come again.
        The first segment goes on from ``initial_state``; the state returned is the last one's. None: one document.
        The kernels of GPUs mask inside their chunks; to the others a start is a gate of 0, so they must take gates
        without a bound, at the price of those.
      implementation: one of ``kernels_pallas.IMPLEMENTATIONS``, such as "scan" or "pallas_triton", or None for the best
        one on the platform (``kernels_pallas.implementation_for``).

    Returns:
      o in v.dtype and the state (S, z) after the last token, float32. Differentiable in every array argument, state
      included. Padding is the caller's business: k = 0 and log_g = 0 leave the state alone, and then q and v must be
      finite as well. NaN or infinity at one token may reach the outputs of other tokens of its chunk, earlier ones too.

    Raises:
      ValueError: naming the argument, for a wrong shape or dtype, heads that do not divide, a sequence axis known to be
        sharded, or an implementation that cannot serve. With KERNELS_PALLAS_CHECK=1 also for concrete values of the
        wrong sign.
    """
    check_qkvg(q, k, v, log_g, 4)
    check_bound(gate_lower_bound)
    check_flag("normalize", normalize)
    if initial_state is not None:
        check_state(initial_state, q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        initial_state = (initial_state[0], initial_state[1])
    for name, x in (("q", q), ("k", k), ("v", v), ("log_g", log_g)):
        check_sharding(name, x)
    check_values(q, k, log_g)
    numbers = None
    if segment_ids is not None:
        check_segments(segment_ids, *q.shape[:2])
        numbers = segment_numbers(segment_ids)
    name = implementation_for(
        q,
        k,
        v,
        log_g,
        normalize=normalize,
        gate_lower_bound=gate_lower_bound,
        segments=numbers is not None,
        implementation=implementation,
    )
    if numbers is not None and not takes_segments(name):
        log_g, gate_lower_bound, numbers = restarted(bounded(log_g, gate_lower_bound), numbers), None, None
    spec = attention_spec(name, normalize, gate_lower_bound)
    if not spec.applies_bound or spec.lower_bound is None:
        log_g = bounded(log_g, gate_lower_bound)
    return attend(spec, *match_varying_all(q, k, v, log_g, initial_state, numbers))


def decode_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B Hv V"],
    log_g: Float[Array, "B Hg K"],
    state: tuple[Float[Array, "B H K V"], Float[Array, "B H K"]],
    *,
    normalize: bool = True,
    gate_lower_bound: float | None = -1.25,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H V"], tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]]:
    """One token of gated_linear_attention: the same arguments without T, and the state before the token.

    Returns (o [B, H, V] in v.dtype, state). Raises ValueError as gated_linear_attention. A Pallas decode kernel is used
    where the backend has one and the platform fits; otherwise plain XLA, also for a strict Pallas name.
    """
    check_qkvg(q, k, v, log_g, 3)
    check_bound(gate_lower_bound)
    check_flag("normalize", normalize)
    check_state(state, q.shape[0], q.shape[1], q.shape[2], v.shape[2], name="state")
    check_values(q, k, log_g)
    shaped = (jax.ShapeDtypeStruct((x.shape[0], 1, *x.shape[1:]), x.dtype) for x in (q, k, v, log_g))
    platform = target_platform(q, k, v, log_g)
    name = implementation_for(
        *shaped,
        normalize=normalize,
        gate_lower_bound=gate_lower_bound,
        implementation=implementation,
        platform=platform,
    )
    return decode(name, bool(normalize), *match_varying_all(q, k, v, bounded(log_g, gate_lower_bound), tuple(state)))
