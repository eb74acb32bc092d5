"""Causal depthwise convolution over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_pallas.causal_conv1d import xla
from kernels_pallas.causal_conv1d.checks import check_conv
from kernels_pallas.checks import check_segments, check_sharding
from kernels_pallas.common import segment_numbers

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def causal_conv1d(
    x: Float[Array, "B T *C"],
    w: Float[Array, "W ..."],
    *,
    initial_state: Float[Array, "B W-1 *C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B W-1 *C"]]:
    """Causal depthwise convolution over time, without bias: y_t = sum_j w_j x_(t - (W - 1) + j).

    Args:
      x: float32 or bfloat16; its channel dimensions broadcast against those of w (the k of Hkv heads:
        x [B, T, Hkv, 1, d], w [W, Hkv, G, d] -> y [B, T, Hkv, G, d]).
      w: taps, float32 or bfloat16, W >= 1; tap W - 1 is the current token's.
      initial_state: the W - 1 rows before x, or None for zeros.
      segment_ids: documents of a row; the convolution starts anew (from zeros) wherever the id changes. The first
        one goes on from ``initial_state``. None: one document.

    Returns:
      y in x.dtype (accumulated in float32) and the last W - 1 rows of [initial_state ; x], not broadcast, with zeros for
      those that do not belong to the last token's segment.

    Raises:
      ValueError: naming the argument, for a wrong shape or dtype.
    """
    check_conv(x, w, initial_state)
    check_sharding("x", x)
    if segment_ids is None:
        return xla.causal_conv1d(x, w, initial_state)
    check_segments(segment_ids, *x.shape[:2])
    return xla.causal_conv1d(x, w, initial_state, segment_numbers(segment_ids))
