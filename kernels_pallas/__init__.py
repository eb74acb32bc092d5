"""Kernels for normalised gated linear attention in JAX: plain XLA everywhere, Pallas on NVIDIA GPUs and TPUs.

Public operations: :func:`gated_linear_attention`, :func:`causal_conv1d`, :func:`decode_step`,
:func:`lawcat_attention`, and
``kernels_pallas.context_parallel`` for sequences sharded over a mesh axis. Needs jax and numpy only.

Context managers: :func:`default_implementation` sets what ``implementation=None`` means, :func:`lowering_for` names the
platform when lowering ahead of time for devices this process does not have, :func:`interpret` runs Pallas kernels in
the interpreter. All three act while JAX traces: a function that is already compiled keeps its kernels.
"""

from kernels_pallas import context_parallel
from kernels_pallas.common import interpret, lowering_for, target_platform
from kernels_pallas.gated_linear_attention.api import (
    causal_conv1d,
    decode_step,
    default_implementation,
    gated_linear_attention,
    implementation_for,
    lawcat_attention,
)

__all__ = [
    "causal_conv1d",
    "context_parallel",
    "decode_step",
    "default_implementation",
    "gated_linear_attention",
    "implementation_for",
    "interpret",
    "lawcat_attention",
    "lowering_for",
    "target_platform",
]
