"""Argument checks of the causal convolution."""

from __future__ import annotations

import numpy as np

from kernels_pallas.checks import check_array, check_shape, describe


def check_conv(x, w, initial_state) -> None:
    """Shapes and dtypes of x [B, T, *C], w [W, ...] and initial_state [B, W - 1, *C]; raises ValueError."""
    check_array("x", x, max(2, len(getattr(x, "shape", ()))))
    check_array("w", w, max(1, len(x.shape) - 1))
    if 0 in x.shape or 0 in w.shape:
        raise ValueError(f"x: every dimension must be at least 1, got x {describe(x)} and w {describe(w)}")
    try:
        np.broadcast_shapes(x.shape[2:], w.shape[1:])
    except ValueError:
        raise ValueError(
            f"w: channels {list(w.shape[1:])} do not broadcast with those of x {list(x.shape[2:])}"
        ) from None
    if initial_state is not None:
        check_array("initial_state", initial_state, len(x.shape))
        check_shape("initial_state", initial_state, (x.shape[0], w.shape[0] - 1, *x.shape[2:]), "[B, W - 1, *C]")
