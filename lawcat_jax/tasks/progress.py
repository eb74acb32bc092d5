"""The line that says how far an evaluation is."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO


class ProgressLine:
    """Samples done and remaining time of one task on one model.

    The estimate goes by tokens, since a long length takes most of the time. On a terminal one line is rewritten;
    elsewhere one line is printed for each length. ``tokens`` False is for tasks that have no lengths.
    """

    def __init__(
        self, label: str, lengths: Sequence[int], samples: int, stream: TextIO | None = None, *, tokens: bool = True
    ):
        self._label, self._stream, self._tokens = label, stream or sys.stderr, tokens
        self._work = {length: max(1, length) * samples for length in sorted(set(lengths))}
        self._start = time.monotonic()

    def __call__(self, length: int, done: int, samples: int, hits: float | None = None) -> None:
        before = sum(work for other, work in self._work.items() if other < length)
        share = (before + self._work[length] * done / samples) / sum(self._work.values())
        elapsed = time.monotonic() - self._start
        text = f"{self._label}: {length} tokens, " if self._tokens else f"{self._label}: "
        text += f"{done}/{samples} samples"
        if hits is not None:
            text += f", {100 * hits / done:.0f} % correct"
        text += f", {_clock(elapsed)} elapsed, {_clock(elapsed * (1 - share) / share)} left"
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[K{text}" + ("\n" if share >= 1 else ""))
        elif done == samples:
            self._stream.write(text + "\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
