"""Argument checks that several ops share. All raise ValueError with one line that begins with the argument's name."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import numpy as np


def describe(x: Any) -> str:
    """An array's dtype and shape, "float32[2, 64]"."""
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


def check_array(name: str, x: Any, dims: int, *, dtypes=("float32", "bfloat16")) -> None:
    """Refuses what is no array, has another number of dimensions, or another dtype."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{name}: expected an array, got {type(x).__name__}")
    if len(x.shape) != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got {describe(x)}")
    if str(x.dtype) not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(dtypes)}, got {describe(x)}")


def check_shape(name: str, x: Any, shape: tuple[int, ...], meaning: str) -> None:
    """Refuses another shape; ``meaning`` is the shape in letters."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {meaning} = {list(shape)}, got {describe(x)}")


def check_bound(bound: Any) -> None:
    """Refuses a gate bound that is not static, not finite, or not below 0."""
    if bound is None:
        return
    if isinstance(bound, jax.core.Tracer) or not isinstance(bound, (int, float, np.floating, np.integer)):
        raise ValueError(f"gate_lower_bound: expected a static float or None, got {type(bound).__name__}")
    if not bound < 0 or not np.isfinite(bound):
        raise ValueError(f"gate_lower_bound: expected a finite number below 0 (nats a token) or None, got {bound}")


def check_state(state: Any, batch: int, heads: int, features: int, width: int, name: str = "initial_state") -> None:
    """Refuses what is not (S [B, H, K, V], z [B, H, K]) in float32."""
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise ValueError(f"{name}: expected a pair (S, z) of arrays, got {type(state).__name__}")
    for part, x, shape, meaning in (
        ("S", state[0], (batch, heads, features, width), "[B, H, K, V]"),
        ("z", state[1], (batch, heads, features), "[B, H, K]"),
    ):
        check_array(f"{name} {part}", x, len(shape), dtypes=("float32",))
        check_shape(f"{name} {part}", x, shape, meaning)


def check_sharding(name: str, x: Any) -> None:
    """Refuses an array whose sequence axis is known to be sharded: the op would gather it onto every device."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        # Under explicit sharding the type of a tracer says how it is sharded as well.
        spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ()) if isinstance(x, jax.core.Tracer) else ()
    else:
        spec = getattr(x.sharding, "spec", ())
        sizes = dict(getattr(getattr(x.sharding, "mesh", None), "shape", {}))
        axes = spec[1] if len(spec) > 1 else None
        axes = (axes,) if isinstance(axes, str) else axes or ()
        if all(sizes.get(axis, 1) == 1 for axis in axes):
            return
    if len(spec) > 1 and spec[1]:
        raise ValueError(
            f"{name}: its sequence axis is sharded over {spec[1]!r}; call kernels_pallas.context_parallel "
            "under jax.shard_map, or shard batch and heads instead"
        )
