"""Backward of the Mosaic GPU backend: the Triton kernels', on the segments its forward cut."""

from __future__ import annotations

from typing import Any

from kernels_pallas.gla import mosaic_gpu, triton_vjp


def backward(residuals, do, dstate, *, normalize: bool, lower_bound: float | None) -> Any:
    """See ``kernels_pallas.gla`` for the signature."""
    _, split = mosaic_gpu.plan(residuals[0], residuals[2])
    return triton_vjp.backward(residuals, do, dstate, normalize=normalize, lower_bound=lower_bound, split=split)
