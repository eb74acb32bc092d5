"""Block sizes of the Triton kernels: one JSON table by device, dtype and shape, with defaults for what it does not list.

``block_sizes.json`` maps device kind -> kernel -> "dtype:KxV" -> {chunk, block_v, num_warps, num_stages, programs}; ``kernels_pallas.tune``
measures candidates and writes it. A device that is not listed uses the entries of "default" and then the rules in :func:`default_sizes`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

TABLE = Path(__file__).with_name("block_sizes.json")

KERNELS = ("forward", "segment_state", "states", "segment_dstate", "backward", "features", "decode")

_local = threading.local()


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Static sizes of one kernel.

    chunk: tokens of a chunk, a power of two >= 16. block_v: columns of v (and of the state) that a program owns.
    num_warps, num_stages: Triton's compiler parameters. programs: once there are so many programs, the sequence is not
    split into more segments.
    """

    chunk: int = 64
    block_v: int = 64
    num_warps: int = 4
    num_stages: int = 2
    programs: int = 256


def default_sizes(kernel: str, dtype: Any, features: int, values: int) -> BlockSizes:
    """Sizes for shapes that no table lists: the state of a program takes at most 32 (forward) or 64 registers of a thread."""
    if kernel == "decode":
        width = min(values, 64)
        # 64 registers of state a thread, and no more threads than features: lawcat_attention/triton_decode.py says why, and what
        # num_stages means there. The operands of float32 scores leave no registers for an early state.
        warps = max(1, min(features * width // 2048, features // 32))
        return BlockSizes(16, width, warps, 1 if jnp.dtype(dtype) == jnp.float32 else 2, 256)
    # More warps do not help: a product that feeds another puts all warps along its 64 rows, where four are enough.
    if jnp.dtype(dtype) == jnp.float32:
        # float32 tiles are twice as large in shared memory and take three products each.
        return BlockSizes(32, min(values, 64 if kernel != "backward" else values), 4, 1, 256)
    if kernel == "backward":
        return BlockSizes(64, values, 4, 1, 256)
    if kernel == "features":
        return BlockSizes(64, values, 4, 1, 256)  # no loop, so nothing to pipeline
    # Deeper pipelines hide the loads, as long as two programs fit an SM's shared memory.
    stages = 2
    if kernel in ("forward", "segment_dstate") and features * values <= 64 * 64:
        stages = 3
    return BlockSizes(64, min(values, 64), 4, stages, 256)


@functools.lru_cache
def _table(path: Path, stamp: float) -> dict[str, Any]:
    del stamp
    return json.loads(path.read_text())


def read_table(path: Path = TABLE) -> dict[str, Any]:
    """The table as nested dicts; empty when the file does not exist."""
    return _table(path, path.stat().st_mtime) if path.exists() else {}


def shape_key(dtype: Any, features: int, values: int) -> str:
    """How the table names a shape, "bfloat16:64x64" (K x V)."""
    return f"{jnp.dtype(dtype).name}:{features}x{values}"


def device_kind() -> str:
    """Name of the GPU that is compiled for: the abstract device in context, else the first local GPU, else "default"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    if jax.default_backend() == "gpu":
        return jax.devices()[0].device_kind
    return "default"


@contextlib.contextmanager
def override(**sizes: BlockSizes) -> Iterator[None]:
    """Use ``sizes[kernel]`` instead of the table while tracing inside; for tuning and tests."""
    unknown = sorted(set(sizes) - set(KERNELS))
    if unknown:
        raise ValueError(f"override: unknown kernel {unknown[0]!r}; known: {', '.join(KERNELS)}")
    before = getattr(_local, "sizes", {})
    _local.sizes = {**before, **sizes}
    try:
        yield
    finally:
        _local.sizes = before


def lookup(kernel: str, dtype: Any, features: int, values: int) -> BlockSizes:
    """Sizes for a kernel: :func:`override`, the device's entry, the "default" entry, :func:`default_sizes`."""
    overrides = getattr(_local, "sizes", {})
    if kernel in overrides:
        return overrides[kernel]
    table, key = read_table(), shape_key(dtype, features, values)
    for device in (device_kind(), "default"):
        entry = table.get(device, {}).get(kernel, {}).get(key)
        if entry is not None:
            return BlockSizes(**{f.name: entry[f.name] for f in dataclasses.fields(BlockSizes) if f.name in entry})
    return default_sizes(kernel, dtype, features, values)
