"""Causal depthwise convolution over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_pallas.causal_conv1d import xla
from kernels_pallas.causal_conv1d.checks import check_conv
from kernels_pallas.checks import check_sharding

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def causal_conv1d(
    x: Float[Array, "B T *C"], w: Float[Array, "W ..."], *, initial_state: Float[Array, "B W-1 *C"] | None = None
) -> tuple[Float[Array, "B T ..."], Float[Array, "B W-1 *C"]]:
    """Causal depthwise convolution over time, without bias: y_t = sum_j w_j x_(t - (W - 1) + j).

    Args:
      x: float32 or bfloat16; its channel dimensions broadcast against those of w (the k of Hkv heads:
        x [B, T, Hkv, 1, d], w [W, Hkv, G, d] -> y [B, T, Hkv, G, d]).
      w: taps, float32 or bfloat16, W >= 1; tap W - 1 is the current token's.
      initial_state: the W - 1 rows before x, or None for zeros.

    Returns:
      y in x.dtype (accumulated in float32) and the last W - 1 rows of [initial_state ; x], not broadcast.

    Raises:
      ValueError: naming the argument, for a wrong shape or dtype.
    """
    check_conv(x, w, initial_state)
    check_sharding("x", x)
    return xla.causal_conv1d(x, w, initial_state)
