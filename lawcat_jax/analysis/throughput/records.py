"""What the command and its two sides tell each other: a request in, measurements out, both as JSON files.

Nothing here imports jax or torch: the command itself must not take the devices that its children measure.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_jax.analysis.packages import installed
from lawcat_jax.config import Config, from_dict
from lawcat_jax.data.batch import Batch
from lawcat_jax.files import read_json, write_json

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "torch",
    "triton",
    "transformers",
    "fla-core",
    "flash-linear-attention",
)


REFUSED = 2
"""The status of a side that measured nothing, because the mesh does not fit: :func:`read_refusal` has the reason."""


@dataclasses.dataclass
class Request:
    """What one side is asked to measure.

    A step is timed ``repeats`` times over ``steps`` steps each, after ``warmup`` steps; no repeat begins that would end
    after ``deadline`` (seconds since the epoch; None: no limit), but one is always made. ``results`` is the file to write to. For the
    peer: ``gla`` (``fla`` or ``reference``), ``normalisers`` (see :mod:`lawcat_jax.analysis.throughput.torch_model`), and by
    stage the number of sequences per step and of trainable parameters (none given: the configuration's, and unchecked).
    For a mesh of a sweep: ``devices``, how many of the machine to use (0: all); for the program ``prefill``, ``batch``
    and ``length`` (tokens of a sequence). ``chip`` is that of :func:`lawcat_jax.analysis.throughput.prediction.main`.
    """

    config: dict[str, Any]
    stages: list[str]
    steps: int
    repeats: int
    warmup: int
    deadline: float | None
    results: str
    gla: str = "fla"
    normalisers: list[str] = dataclasses.field(default_factory=list)
    batch: dict[str, int] = dataclasses.field(default_factory=dict)
    trainable: dict[str, int] = dataclasses.field(default_factory=dict)
    devices: int = 0
    length: dict[str, int] = dataclasses.field(default_factory=dict)
    chip: str = ""

    def settings(self) -> Config:
        """The configuration, as typed dataclasses."""
        return from_dict(Config, self.config)

    def left(self) -> float:
        """Seconds until the deadline."""
        return math.inf if self.deadline is None else self.deadline - time.time()


@dataclasses.dataclass
class Measurement:
    """One stage, or ``prefill``, on one side. Without ``ms`` it was not measured, and ``problem`` says why.

    ``ms``: median, least and most over the repeats, milliseconds per step. ``tokens_per_second`` over all devices;
    ``mfu`` the share of their bf16 peak that the model's own operations make up (None: unknown device).
    ``peak_bytes`` is the allocator's peak of the fullest device since the process began, which on the JAX side includes
    drawing the weights (``notes["peak_bytes_before"]``). ``memory``: bytes per device by the compiler's own account.
    ``compile_seconds``: tracing and compiling; ``first_step_seconds``: the first step after that (PyTorch: with all
    kernels' compilation and tuning). ``losses``: of the first and of the last step.
    """

    side: str
    stage: str
    variant: str
    batch: int
    length: int
    problem: str = ""
    device: str = ""
    devices: int = 1
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    trainable: int = 0
    ms: dict[str, float] | None = None
    repeats: int = 0
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    compile_seconds: float | None = None
    first_step_seconds: float | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def timed(self, seconds: list[float]) -> None:
        """Enter the seconds per step of every repeat so far."""
        median = statistics.median(seconds)
        self.ms = {"median": 1e3 * median, "least": 1e3 * min(seconds), "most": 1e3 * max(seconds)}
        self.repeats = len(seconds)
        self.tokens_per_second = self.batch * self.length / median


class Results:
    """The file of one side, written anew, whole, at every change."""

    def __init__(self, path: str | os.PathLike):
        self._path, self._measurements = Path(path), {}

    def put(self, measurement: Measurement) -> None:
        """Add a measurement, in place of an earlier one of the same stage and variant."""
        self._measurements[measurement.stage, measurement.variant] = dataclasses.asdict(measurement)
        write_json(self._path, {"versions": installed(PACKAGES), "measurements": list(self._measurements.values())})

    def refuse(self, reason: str) -> None:
        """Say why nothing is measured, for :func:`read_refusal`."""
        write_json(self._path, {"versions": installed(PACKAGES), "measurements": [], "refused": reason})


def read_results(path: str | os.PathLike) -> tuple[dict[str, str], list[Measurement]]:
    """(versions, measurements) of a file of :class:`Results`; nothing where there is no such file."""
    if not Path(path).is_file():
        return {}, []
    values = read_json(path)
    return values["versions"], [Measurement(**entry) for entry in values["measurements"]]


def read_refusal(path: str | os.PathLike) -> str:
    """The reason that a side with status :data:`REFUSED` has left; empty where it left none."""
    return read_json(path).get("refused", "") if Path(path).is_file() else ""


def write_request(path: str | os.PathLike, request: Request) -> None:
    """For :func:`read_request` in another process."""
    write_json(path, dataclasses.asdict(request))


def read_request(path: str | os.PathLike) -> Request:
    """The inverse of :func:`write_request`."""
    return Request(**read_json(path))


def one_line(problem: BaseException) -> str:
    """An exception as one line of at most 300 characters."""
    text = " ".join(str(problem).split())
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        text = f"out of memory: {text}"
    return f"{text or type(problem).__name__}"[:300]


def example_batch(vocabulary: int, batch: int, length: int, seed: int) -> Batch:
    """Random tokens as a training batch: no padding, and every token but the last has a target."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (batch, length)).astype(np.int32)
    weights = np.ones((batch, length), np.float32)
    weights[:, -1] = 0
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": weights,
        "mask": np.ones((batch, length), np.bool_),
        "lengths": np.full((batch,), length, np.int32),
    }


def example_batches(vocabulary: int, batch: int, length: int) -> Iterator[Batch]:
    """A few different :func:`example_batch`, in turn, without end."""
    return itertools.cycle([example_batch(vocabulary, batch, length, seed) for seed in range(4)])
