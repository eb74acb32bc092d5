"""Which implementation serves a call: the table of backends, their loading, and the choice among them.

Everything here happens while JAX traces; a function that is already compiled keeps its kernels. Kernel files are
imported when a call first asks for them, so that a machine without the compiler of one platform can use the others.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax

from kernels_pallas.common import interpret_mode, target_platform


class Backend(NamedTuple):
    """A row of the table: the file that a backend has in the folder of each op it serves, and what it runs on."""

    file: str
    """Without ``.py``. A file of the same name with ``_vjp`` appended may hold the backward pass."""

    platform: str | None
    """As ``kernels_pallas.target_platform`` names it; None: every platform."""


BACKENDS: dict[str, Backend] = {
    "pallas_mosaic_gpu": Backend("mosaic_gpu", "cuda"),
    "pallas_triton": Backend("triton", "cuda"),
    "pallas_tpu": Backend("tpu", "tpu"),
    "scan": Backend("scan", None),
    "reference": Backend("reference", None),
}
"""Name of the implementation -> where it is. ``implementation=None`` takes the first row that fits platform and call."""

IMPLEMENTATIONS = tuple(BACKENDS)
"""What ``implementation=`` may say, apart from None."""

PALLAS_IMPLEMENTATIONS = tuple(name for name, backend in BACKENDS.items() if backend.platform is not None)
"""Those that are kernels of one platform."""

_local = threading.local()


def check_name(implementation: str | None) -> None:
    """Raises ValueError for what is no name in the table."""
    if implementation is not None and (not isinstance(implementation, str) or implementation not in BACKENDS):
        raise ValueError(f"implementation: unknown {implementation!r}, choose one of {', '.join(BACKENDS)} or None")


@contextlib.contextmanager
def default_implementation(implementation: str | None) -> Iterator[None]:
    """Inside, ``implementation=None`` means this one, and is as strict as passing the name.

    Acts while tracing, not on compiled code. Raises ValueError for an unknown name.
    """
    check_name(implementation)
    before = getattr(_local, "implementation", None)
    _local.implementation = implementation
    try:
        yield
    finally:
        _local.implementation = before


def requested(implementation: str | None) -> str | None:
    """The name that a call asked for, else that of :func:`default_implementation`, else None.

    Raises ValueError for an unknown name.
    """
    check_name(implementation)
    return implementation or getattr(_local, "implementation", None)


# Loading


@functools.cache
def _load(op: str, file: str) -> ModuleType | None:
    """A file of an op's folder as a module, or None where there is no such file."""
    name = f"kernels_pallas.{op}.{file}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name == name:
            return None
        raise


def forward_module(op: str, implementation: str) -> ModuleType:
    """The module with an implementation's forward pass of ``op``, a folder of this package.

    What it holds is written down in ``kernels_pallas.contract``. Raises LookupError when the implementation has no
    kernel for this op.
    """
    module = _load(op, BACKENDS[implementation].file)
    if module is None:
        raise LookupError(f"{implementation} has no kernel for {op}")
    return module


def backward_module(op: str, implementation: str) -> ModuleType:
    """The module with an implementation's backward pass of ``op``: the forward's, or the one ending in ``_vjp``."""
    module = forward_module(op, implementation)
    if hasattr(module, "backward"):
        return module
    vjp = _load(op, f"{BACKENDS[implementation].file}_vjp")
    if vjp is None:
        raise LookupError(f"{implementation} has no backward pass for {op}")
    return vjp


def has_decode(implementation: str) -> bool:
    """Whether an implementation has its own kernel for ``decode_step``; plain XLA stands in for one that has none."""
    return hasattr(forward_module("gated_linear_attention", implementation), "decode")


def takes_segments(implementation: str) -> bool:
    """Whether an implementation's gated linear attention takes the documents of packed rows as they are.

    To the others a document begins with a gate that forgets everything, so they must take gates without a bound.
    """
    return getattr(forward_module("gated_linear_attention", implementation), "TAKES_SEGMENTS", False)


# Choice


def platform_of(implementation: str | None, platform: str) -> str | None:
    """The platform that an implementation needs and that is not ``platform``, as ``target_platform`` names them; else None.

    Raises ValueError for an unknown name.
    """
    check_name(implementation)
    needed = None if implementation is None else BACKENDS[implementation].platform
    return None if needed == platform or interpret_mode() else needed


def refusal(op: str, implementation: str, platform: str, *args: Any, **options: Any) -> str | None:
    """Why an implementation cannot take a call of ``op`` on ``platform``, as the end of a sentence, or None if it can.

    ``args`` and ``options`` are those of the backend's ``supports`` (``kernels_pallas.contract``); arrays may be
    ShapeDtypeStructs.
    """
    if needed := platform_of(implementation, platform):
        return f"it runs on {needed} and this call is for {platform}"
    try:
        module = forward_module(op, implementation)
    except LookupError:
        return f"it has no kernel for {op}"
    except ImportError as problem:
        return f"it cannot be imported with jax {jax.__version__}: {problem}"
    return module.supports(*args, **options)


def first_that_serves(platform: str, reason: Callable[[str], str | None]) -> str | None:
    """The first implementation in the table that is made for ``platform`` and takes the call, or None.

    ``reason`` says of a name why it cannot, as :func:`refusal` does.
    """
    fitting = (name for name, backend in BACKENDS.items() if backend.platform in (None, platform))
    return next((name for name in fitting if reason(name) is None), None)


def implementation_for(
    q: Any,
    k: Any,
    v: Any,
    log_g: Any,
    *,
    normalize: bool = True,
    gate_lower_bound: float | None = -1.25,
    segments: bool = False,
    implementation: str | None = None,
    platform: str | None = None,
) -> str:
    """The name of the implementation that gated_linear_attention uses for these arrays (or ShapeDtypeStructs).

    ``segments``: whether the call has ``segment_ids``.

    None picks, for the platform of ``kernels_pallas.target_platform``: on "cuda" pallas_mosaic_gpu, else pallas_triton,
    and on "tpu" pallas_tpu, where they support the case, else scan. A name is strict: ValueError with the reason when it
    cannot serve, also for an unknown name.
    """
    implementation = requested(implementation)
    platform = platform or target_platform(q, k, v, log_g)

    def reason(name: str) -> str | None:
        def ask(bound: float | None) -> str | None:
            # A call cannot know whether it will be differentiated, so the backend must be able to.
            options = {"normalize": normalize, "lower_bound": bound, "differentiated": True}
            return refusal("gated_linear_attention", name, platform, q, k, v, log_g, **options)

        found = ask(gate_lower_bound)
        if found is None and segments and not takes_segments(name):
            found = ask(None)
            found = found and f"segment_ids become gates without a bound to it, and {found}"
        return found

    if implementation is None:
        found = first_that_serves(platform, reason)
        assert found is not None, "scan takes every call"
        return found
    why = reason(implementation)
    if why is not None:
        raise ValueError(f"implementation: {implementation!r} cannot be used: {why}")
    return implementation
