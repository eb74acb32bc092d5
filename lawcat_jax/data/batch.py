"""The arrays of a training batch: the only place that states their names, shapes and dtypes."""

# No "from __future__ import annotations": a TypedDict sees NotRequired only in annotations that are not strings.

import functools
import typing
from collections.abc import Collection
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int32


class Batch(TypedDict):
    """B sequences of up to T input tokens, padded on the right; numpy arrays on the host, jax arrays in a step.

    To add an array that every batch has, declare it here and fill it in :mod:`lawcat_jax.data.pipeline`. One that only
    some batches have is declared ``NotRequired[...]``, and :func:`lawcat_jax.data.pipeline.optional_arrays` says when.
    """

    tokens: Int32[Any, "B T"]
    """Inputs."""
    targets: Int32[Any, "B T"]
    """What each position predicts: ``tokens`` shifted left by one."""
    loss_weights: Float32[Any, "B T"]
    """Weight of predicting ``targets[:, t]`` in the cross entropy; 0 at padding."""
    lengths: Int32[Any, "B"]
    """Number of valid inputs of each row."""
    mask: Bool[Any, "B T"]
    """Valid and not end of text: the positions at which attention transfer compares student and teacher."""
    segment_ids: NotRequired[Int32[Any, "B T"]]
    """With ``data.pack``: 1, 2, ... for the documents of a row, 0 for padding."""
    continues: NotRequired[Bool[Any, "B"]]
    """With ``data.pieces``, in training: whether a row goes on with what the same row held in the batch before."""
    kl_weights: NotRequired[Float32[Any, "B T"]]
    """Weight of each position in the divergence from the teacher, where it is not that of the cross entropy."""
    teacher_ids: NotRequired[Int32[Any, "B T k"]]
    """With ``teacher_logits`` of a stage, like the next two: the tokens of the teacher's k largest logits."""
    teacher_logits: NotRequired[Float32[Any, "B T k"]]
    """These logits."""
    teacher_rest: NotRequired[Float32[Any, "B T"]]
    """The log-sum-exp of all other logits; -inf without any."""


class ArrayShape(NamedTuple):
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: np.dtype


@functools.cache
def _declared() -> dict[str, tuple[tuple[str, ...], np.dtype]]:
    hints = typing.get_type_hints(Batch)
    return {name: (tuple(hint.dim_str.split()), np.dtype(hint.dtypes[0])) for name, hint in hints.items()}


def batch_shapes(
    batch_size: int, seq_length: int, optional: Collection[str] = (), *, kept_logits: int = 0
) -> dict[str, ArrayShape]:
    """Shapes and dtypes by name of the arrays of a batch with B = ``batch_size``, T = ``seq_length`` and k =
    ``kept_logits``: those that every batch has, and of the others those named in ``optional``.
    """
    sizes = {"B": batch_size, "T": seq_length, "k": kept_logits}
    names = {*Batch.__required_keys__, *optional}
    return {
        name: ArrayShape(tuple(sizes[axis] for axis in axes), dtype)
        for name, (axes, dtype) in _declared().items()
        if name in names
    }
