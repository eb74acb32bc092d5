"""Values of weights that a conversion would spoil or carry along: what float16 cannot hold, NaN and infinity."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lawcat_jax.checkpoints.hf.mapping import flatten
from lawcat_jax.errors import UserError

_TINY = float(np.finfo(np.float16).tiny)  # below it float16 has fewer digits
_BLOCK = 1 << 24  # values that are looked at together


@dataclasses.dataclass
class Small:
    """How many values were cast to float16, how many of them became zero, and how many lost digits."""

    cast: int = 0
    zero: int = 0
    denormal: int = 0

    def __str__(self) -> str:
        return (
            f"float16: of {self.cast:,} weights {self.zero:,} are too small and become zero, {self.denormal:,} lie below "
            f"{_TINY:.1e} and lose digits; bfloat16 and float32 keep them"
        )


_counts: contextvars.ContextVar[Small | None] = contextvars.ContextVar("small", default=None)


@contextlib.contextmanager
def counted() -> Iterator[Small]:
    """Count the small values of every cast to float16 in this context."""
    small = Small()
    token = _counts.set(small)
    try:
        yield small
    finally:
        _counts.reset(token)


def check_float16(source: Any, cast: Any, where: str) -> None:
    """Look at a cast to float16; both arrays of numpy or both of jax.

    Raises:
      UserError: a finite value became infinite.
    """
    if isinstance(source, np.ndarray):
        xp: Any = np
    else:
        import jax.numpy as xp
    wide = source.astype(np.float32)
    if not bool(xp.all(xp.isfinite(cast) | ~xp.isfinite(wide))):
        raise UserError(f"{where} has values beyond float16; choose bfloat16 or float32")
    small = _counts.get()
    if small is not None and source.dtype != np.float16:
        tiny = (wide != 0) & (xp.abs(wide) < _TINY)
        zero = int(xp.count_nonzero(tiny & (cast == 0)))
        small.cast += cast.size
        small.zero += zero
        small.denormal += int(xp.count_nonzero(tiny & (cast != wide))) - zero


def not_finite(params: Mapping[str, Any]) -> list[str]:
    """Paths of the parameters, numpy arrays, that hold NaN or infinity."""
    return [path for path, leaf in flatten(params) if not _finite(leaf)]


def _finite(leaf: np.ndarray) -> bool:
    values = leaf.reshape(-1)
    return all(_all_finite(values[start : start + _BLOCK]) for start in range(0, values.size, _BLOCK))


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:  # as raw words (the exponent is all ones): NumPy looks at each by itself
        return not bool(((values.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(values).all())
