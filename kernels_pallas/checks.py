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


def check_flag(name: str, value: Any) -> None:
    """Refuses what is no Python or NumPy bool: a string, say, would be taken for True."""
    if not isinstance(value, (bool, np.bool_)):
        found = repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
        raise ValueError(f"{name}: expected True or False, got {found}")


def check_normalizer(value: Any) -> None:
    """Refuses a divisor of the gates that is not static, not finite, or not above 0."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise ValueError(f"gate_normalizer: expected a static float, got {type(value).__name__}")
    if not value > 0 or not np.isfinite(value):
        raise ValueError(f"gate_normalizer: expected a finite number above 0, got {value}")


def check_lengths(lengths: Any, batch: int, most: int) -> None:
    """Refuses what is not int [B], and concrete values outside 0 .. ``most``.

    Values that are known only while a program runs cannot be refused: callers clamp them to that range. Concrete ones
    on a device are waited for.
    """
    check_array("lengths", lengths, 1, dtypes=("int32", "int64", "uint32"))
    check_shape("lengths", lengths, (batch,), "[B]")
    if isinstance(lengths, jax.core.Tracer) or not isinstance(lengths, (jax.Array, np.ndarray)):
        return
    if isinstance(lengths, jax.Array) and not lengths.is_fully_addressable:
        return
    values = np.asarray(lengths)
    if np.any(values < 0) or np.any(values > most):
        raise ValueError(f"lengths: expected 0 to {most} valid tokens for each sequence, got {values.tolist()}")


def check_segments(segment_ids: Any, batch: int, length: int) -> None:
    """Refuses what is not int [B, T]."""
    check_array("segment_ids", segment_ids, 2, dtypes=("int32", "int64", "uint32"))
    check_shape("segment_ids", segment_ids, (batch, length), "[B, T]")


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
