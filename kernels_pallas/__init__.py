"""Kernels for normalised gated linear attention in JAX: plain XLA everywhere, Pallas on NVIDIA GPUs and TPUs.

Ops: :func:`gated_linear_attention` of a sequence, :func:`decode_step` of one token, :func:`causal_conv1d`,
:func:`lawcat_attention` (a layer from its raw projections), and ``kernels_pallas.context_parallel`` for sequences sharded
over a mesh axis. Arrays in, arrays out; needs jax and numpy only.

Context managers: :func:`default_implementation` sets what ``implementation=None`` means, :func:`lowering_for` names the
platform when lowering ahead of time for devices this process does not have, :func:`interpret` runs Pallas kernels in
the interpreter. All three act while JAX traces: a function that is already compiled keeps its kernels.

Each op is a folder named like its function, and here the name means the function. The folder's files are reached by
``from kernels_pallas.gated_linear_attention import scan``; ``import kernels_pallas.gated_linear_attention.scan as x`` looks
for an attribute of the function and fails.
"""

from kernels_pallas import context_parallel
from kernels_pallas.common import interpret, lowering_for, target_platform
from kernels_pallas.dispatch import IMPLEMENTATIONS, default_implementation, implementation_for

# The ops come last: importing a sub-package binds its name here to the module, once, and these bind it to the function.
from kernels_pallas.causal_conv1d.api import causal_conv1d  # isort: skip
from kernels_pallas.gated_linear_attention.api import decode_step, gated_linear_attention  # isort: skip
from kernels_pallas.lawcat_attention.api import lawcat_attention  # isort: skip

__all__ = [
    "IMPLEMENTATIONS",
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
