"""Hostile arguments of the ops: each array and each option with values of every wrong kind, one after the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

import kernels_pallas

B, T, H, G, D, F, W = 2, 5, 4, 2, 8, 4, 3  # G: kv heads; F: features before they are doubled


@dataclasses.dataclass(frozen=True)
class OpCall:
    """A call of an op that has to end with a ValueError of one line that names an argument, or with arrays."""

    name: str
    call: Callable[[], Any]

    def __str__(self) -> str:
        return self.name


def _arrays() -> dict[str, dict[str, Any]]:
    random = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return random.uniform(0.1, 1.0, shape).astype(np.float32)

    state = (array(B, H, 2 * F, D), array(B, H, 2 * F))
    sequence = {
        "q": array(B, T, H, 2 * F),
        "k": array(B, T, H, 2 * F),
        "v": array(B, T, G, D),
        "log_g": -array(B, T, G, 2 * F),
    }
    token = {name: value[:, 0] for name, value in sequence.items()}
    layer = {
        "q": array(B, T, H, D), "k": array(B, T, G, D), "v": array(B, T, G, D), "gate_logits": array(B, T, G, 2 * F),
        "conv_q": array(H, W, D), "conv_k": array(H, W, D), "phi": array(H, D, F),
    }  # fmt: skip
    return {
        "gated_linear_attention": sequence | {"initial_state": state, "segment_ids": np.ones((B, T), np.int32)},
        "decode_step": token | {"state": state},
        "lawcat_attention": layer
        | {
            "initial_state": state,
            "conv_state": (array(B, W - 1, H, D), array(B, W - 1, G, D)),
            "lengths": np.array([T, 2], np.int32),
        },
        "causal_conv1d": {
            "x": array(B, T, D), "w": array(W, D), "initial_state": array(B, W - 1, D),
            "segment_ids": np.ones((B, T), np.int32),
        },
    }  # fmt: skip


def _spoilt(value: Any) -> Iterator[tuple[str, Any]]:
    """Values that stand where an array, or a pair of arrays, should be."""
    for wrong in (None, "x", 3, math.nan, [], {}, object(), b"x", [[1.0]], ()):
        yield type(wrong).__name__ + (f" {wrong}" if isinstance(wrong, str | int | float) else ""), wrong
    if isinstance(value, tuple):
        yield "one of two", value[:1]
        yield "three", (*value, value[0])
        yield "swapped", value[::-1]
        yield "half None", (value[0], None)
        value = value[0]
        wrap: Callable[[Any], Any] = lambda first, rest=value: (first, rest)  # noqa: E731
    else:
        wrap = lambda first: first  # noqa: E731
    for dtype in (
        np.float64,
        np.float16,
        np.int8,
        np.bool_,
        np.complex64,
        np.uint32,
        ml_dtypes.bfloat16,
        "datetime64[s]",
        object,
    ):
        yield f"dtype {np.dtype(dtype)}", wrap(value.astype(dtype))
    yield "a scalar", wrap(value.reshape(-1)[0])
    yield "flat", wrap(value.reshape(-1))
    yield "one more axis", wrap(value[None])
    yield "transposed", wrap(value.T)
    for axis in range(value.ndim):
        yield f"nothing on axis {axis}", wrap(np.take(value, [], axis=axis))
        yield f"twice on axis {axis}", wrap(np.concatenate([value, value], axis=axis))
        yield f"one less on axis {axis}", wrap(np.delete(value, 0, axis=axis))
    for name, fill in (("NaN", np.nan), ("infinity", np.inf), ("huge", 3e38), ("negative", -7.0)):
        filled = value.copy()
        filled.reshape(-1)[0] = fill if value.dtype.kind == "f" else -7 if name == "negative" else 2**31 - 1
        yield name, wrap(filled)


OPTIONS: dict[str, tuple[Any, ...]] = {
    "normalize": (None, 0, 1, "yes", math.nan, [], np.ones(2, bool)),
    "gate_lower_bound": ("x", math.nan, math.inf, -math.inf, 0, 0.0, 1.0, [], True, np.full(2, -1.0), 1j),
    "implementation": ("x", "", 3, [], {}, True, "SCAN", "pallas_tpu", "pallas_triton", "pallas_mosaic_gpu"),
    "gate_normalizer": (0, 0.0, -16.0, math.nan, math.inf, "x", None, [], True, np.full(2, 16.0)),
    "zero_padding": (None, 0, "yes", []),
}
_TAKES = {
    "gated_linear_attention": ("normalize", "gate_lower_bound", "implementation"),
    "decode_step": ("normalize", "gate_lower_bound", "implementation"),
    "lawcat_attention": ("normalize", "gate_lower_bound", "implementation", "gate_normalizer", "zero_padding"),
    "causal_conv1d": (),
}


def op_calls() -> Iterator[OpCall]:
    """Every op, every argument, every value."""
    for op, arguments in _arrays().items():
        function = getattr(kernels_pallas, op)
        for argument, value in arguments.items():
            for what, wrong in _spoilt(value):
                given = {**arguments, argument: wrong}
                yield OpCall(f"{op} {argument}: {what}", lambda f=function, g=given: f(**g))
        for option in _TAKES[op]:
            for number, wrong in enumerate(OPTIONS[option]):
                given = {**arguments, option: wrong}
                yield OpCall(f"{op} {option}: {number} {ascii(wrong)[:20]}", lambda f=function, g=given: f(**g))
