"""What every kernel file needs: the target platform, interpret mode, and shapes that carry the varying mesh axes."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

EPS = 1e-10
"""Added to the float32 denominator (method: epsilon of the normaliser)."""

LOG2E = 1.4426950408889634

_local = threading.local()


def platform_name(platform: str) -> str:
    """What :func:`target_platform` calls the platform that a device names."""
    return "cuda" if platform == "gpu" else platform


def target_platform(*arrays: Any) -> str:
    """The platform ("cpu", "cuda", "rocm", "tpu") this call will run on, decided while tracing.

    In order: :func:`lowering_for`; the abstract device of the mesh in context (so ``use_abstract_mesh`` and
    ``shard_map`` over a mesh of another platform's topology lower ahead of time without further help); the devices of
    concrete arguments; ``jax.default_device``; the default backend. ``jax.lax.platform_dependent`` is not used because
    its branches must agree on the shapes of the residuals, which differ by backend.
    """
    override = getattr(_local, "platform", None)
    if override is not None:
        return override
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None)
    if platform:
        return platform_name(platform)
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            return platform_name(next(iter(array.devices())).platform)
    default = getattr(jax.config, "jax_default_device", None)
    if default is not None:
        return platform_name(default if isinstance(default, str) else default.platform)
    return platform_name(jax.default_backend())


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``jnp.einsum`` into float32: float32 operands at HIGHEST precision, bfloat16 operands as they are.

    XLA on CPUs lacks some batched products of bfloat16 into float32; there the operands are widened, which changes
    nothing: a product of two bfloat16 numbers is exact in float32.
    """
    if a.dtype != jnp.float32 and target_platform(a) == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def valid_tokens(lengths: jax.Array, length: int, start: Any = 0) -> jax.Array:
    """[B, T] bool: positions start .. start + T - 1 that lie before each sequence's length; lengths [B]."""
    return (start + jnp.arange(length))[None] < lengths[:, None]


def without_padding(valid: jax.Array | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays [B, T, ...] with zeros where ``valid`` [B, T] is False, and zero gradient there; ``valid`` None is all.

    A mask on one factor of a product does not do: 0 times what padding holds is NaN where that is NaN or infinite.
    """
    if valid is None:
        return arrays
    return tuple(jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0) for x in arrays)


def segment_starts(segment_ids: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """[B, T] bool: tokens whose id differs from that of the token before. The first token goes on from what was before
    these, and padding (``valid`` False) goes on with its sequence's last segment."""
    starts = jnp.concatenate(
        [jnp.zeros_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return starts if valid is None else starts & valid


def segment_numbers(segment_ids: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """[B, T] int32 that grow from segment to segment, also where an id comes again later: 0 in the first one, which goes on
    from what was before these tokens, and in the others 1 + the position of their first token; see
    :func:`segment_starts`."""
    starts = segment_starts(segment_ids, valid)
    after = jnp.arange(1, starts.shape[1] + 1, dtype=jnp.int32)
    return lax.cummax(jnp.where(starts, after, 0), axis=1)


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Choose kernels for ``platform`` ("cpu", "cuda" or "tpu") while tracing, whatever devices this process has."""
    before = getattr(_local, "platform", None)
    _local.platform = platform_name(platform)
    try:
        yield
    finally:
        _local.platform = before


def interpret_mode() -> bool:
    """True inside :func:`interpret` or when ``KERNELS_PALLAS_INTERPRET=1``: Pallas kernels then run on any device,
    slowly."""
    return getattr(_local, "interpret", False) or os.environ.get("KERNELS_PALLAS_INTERPRET", "") == "1"


@contextlib.contextmanager
def interpret(enabled: bool = True) -> Iterator[None]:
    """Run Pallas kernels traced inside in the Pallas interpreter (for tests on a CPU)."""
    before = getattr(_local, "interpret", False)
    _local.interpret = enabled
    try:
        yield
    finally:
        _local.interpret = before


def fold_vmap(function: Callable[..., Any], shared: tuple[int, ...] = ()) -> Callable[..., Any]:
    """``function`` with a rule for ``jax.vmap``, which Mosaic GPU kernels lack: the mapped axis becomes part of the batch.

    Arguments are pytrees of arrays whose first axis is the batch, except at the positions in ``shared``, which have no
    batch axis. When one of those is mapped, the calls run one after another."""
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def rule(axis_size: int, batched: Any, *args: Any) -> Any:
        if any(jax.tree.leaves([batched[i] for i in shared])):
            full = jax.tree.map(
                lambda x, b: x if b else jnp.broadcast_to(x, (axis_size, *x.shape)), tuple(args), tuple(batched)
            )
            out = lax.map(lambda each: folded(*each), full)
        else:

            def fold(x, b):
                x = x if b else jnp.broadcast_to(x, (axis_size, *x.shape))
                return x.reshape(-1, *x.shape[2:])

            args = tuple(x if i in shared else jax.tree.map(fold, x, batched[i]) for i, x in enumerate(args))
            out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), folded(*args))
        return out, jax.tree.map(lambda _: True, out)

    return folded


def varying_axes(*arrays: Any) -> frozenset[str]:
    """Mesh axes over which any of the arrays varies; empty outside ``shard_map`` and under ``check_vma=False``."""
    axes: frozenset[str] = frozenset()
    for array in arrays:
        if array is not None:
            kind = jax.typeof(array)
            manual = getattr(kind, "manual_axis_type", None)
            axes |= manual.varying if manual is not None else getattr(kind, "vma", frozenset())
    return axes


def match_varying(x: jax.Array, *arrays: Any) -> jax.Array:
    """``x`` marked as varying over the same mesh axes as ``arrays`` (loop carries must agree on this under
    ``shard_map``)."""
    missing = tuple(sorted(varying_axes(*arrays) - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def match_varying_all(*arrays: Any) -> tuple[Any, ...]:
    """The arrays (or pytrees of them, None allowed) marked as varying over the same mesh axes: only then may a
    ``custom_vjp`` return gradients that vary under ``shard_map``."""
    leaves = jax.tree.leaves(arrays)
    return jax.tree.map(lambda x: match_varying(x, *leaves), arrays)


def out_struct(shape: tuple[int, ...], dtype: Any, *arrays: Any) -> jax.ShapeDtypeStruct:
    """An ``out_shape`` entry for ``pallas_call`` with the varying mesh axes of the kernel's inputs."""
    axes = varying_axes(*arrays)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    if "manual_axis_type" in inspect.signature(jax.ShapeDtypeStruct.__init__).parameters:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))
    # The name in other releases of jax than the one that pyright sees.
    return jax.ShapeDtypeStruct(shape, dtype, vma=axes)  # pyright: ignore[reportCallIssue]
