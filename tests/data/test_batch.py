"""The arrays that the pipeline and the benchmark make are those that the compiled step is built for."""

from __future__ import annotations

import numpy as np
import pytest

from lawcat_jax.analysis.throughput.records import example_batch
from lawcat_jax.config import DataConfig
from lawcat_jax.data.batch import batch_shapes
from lawcat_jax.data.pipeline import make_dataset
from tests.data import tokenizers as small

ROWS, LENGTH = 2, 384


def of_the_pipeline(split: str, repeat: bool):
    data = DataConfig(kind="passkey", passkey_words=0, num_samples=8, validation_samples=3)
    options = {"seq_length": LENGTH, "batch_size": ROWS, "seed": 0, "split": split, "repeat": repeat}
    return next(iter(make_dataset(data, small.byte_level(), **options)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: of_the_pipeline("train", True),
        lambda: of_the_pipeline("validation", False),
        lambda: example_batch(vocabulary=100, batch=ROWS, length=LENGTH, seed=0),
    ],
    ids=["training", "validation", "throughput"],
)
def test_shapes_and_dtypes(make):
    expected = {name: (one.shape, one.dtype) for name, one in batch_shapes(ROWS, LENGTH).items()}
    assert {name: (array.shape, array.dtype) for name, array in make().items()} == expected
    assert expected["lengths"] == ((ROWS,), np.dtype("int32"))
    assert expected["mask"] == ((ROWS, LENGTH), np.dtype("bool"))
