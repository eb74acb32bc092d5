"""LAWCAT attention from raw projections with the Mosaic GPU kernel of gated linear attention: ``triton``'s features and
decoding, and a sequence's recurrence by ``kernels_pallas.gla.mosaic_gpu``."""

from __future__ import annotations

import functools

import jax

from kernels_pallas.gla import mosaic_gpu
from kernels_pallas.lawcat import triton


def supports(
    q, k, v, gate_logits, conv_q, conv_k, phi, *, normalize: bool, gate_lower_bound: float | None
) -> str | None:
    """Why these kernels cannot run these arguments (the end of a sentence), or None."""
    options = {"normalize": normalize, "gate_lower_bound": gate_lower_bound}
    reason = triton.supports(q, k, v, gate_logits, conv_q, conv_k, phi, **options)
    if reason is not None:
        return reason
    shaped = jax.ShapeDtypeStruct((*q.shape[:-1], 2 * phi.shape[-1]), q.dtype)
    return mosaic_gpu.supports(
        shaped, shaped, v, shaped, normalize=normalize, lower_bound=gate_lower_bound, differentiated=False
    )


forward = functools.partial(triton.forward, backend=mosaic_gpu)
