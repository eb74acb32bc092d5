"""Facts about cutting a sequence into chunks that every backend shares: exponents that fit, strong gates, segments.

A chunked form multiplies q and k by e^(b - r) and e^(r - b), where b is the running sum of log_g and r a reference
point. How many rows may share one reference follows from the gate bound and from the range of float32.
"""

from __future__ import annotations

import dataclasses
import math

MAX_NATS = 80.0
"""Largest rows * |log_g| under one reference point: the masked upper triangle reaches e^80, and float32 ends at e^88."""

STRONG_GATE = -1.25
"""log_g, nats a token. The lowest gate that the layer of the paper can produce: logsigmoid(-20) / 16."""

VANISHED = -128.0
"""Nats a token. e^-128 is 0 in float32, so lower gates than this, -inf included, are the same gate."""

MIN_SEGMENT = 256
"""Tokens. Shorter segments spend more on their states than they win in parallelism."""


def strong_gates(lower_bound: float | None) -> bool:
    """Whether gates may fall below those of the paper's layer, so that one token can outweigh all earlier ones.

    Then gradients need more care: that of a score is do.v - do.o, the two terms nearly cancel where a single token
    makes up most of the output, and what was rounded before the subtraction (o, do / den) is all that is left.
    """
    return lower_bound is None or lower_bound < STRONG_GATE


def reference_rows(lower_bound: float | None, most: int, nats: float = MAX_NATS) -> int:
    """Rows that may share one reference point: the largest power of two within ``nats``, 1 without a bound.

    Args:
      lower_bound: the bound of log_g, nats a token, at most 0, or None.
      most: the largest answer wanted, a power of two.
      nats: largest rows * |log_g|.
    """
    if lower_bound is None:
        return 1
    rows = min(nats / max(-lower_bound, 1e-30), most)
    return 1 << math.floor(math.log2(max(1.0, rows)))


@dataclasses.dataclass(frozen=True)
class Split:
    """A sequence of ``length`` tokens cut into chunks of ``chunk`` tokens and ``segments`` of ``per_segment`` chunks.

    A segment is what one program walks from its first chunk to its last; the last segment may have fewer chunks, and
    the last chunk fewer tokens.
    """

    length: int
    chunk: int
    segments: int
    per_segment: int

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.length // self.chunk)

    @property
    def ragged(self) -> bool:
        """Whether the last chunk is not full."""
        return self.length % self.chunk != 0

    @property
    def even(self) -> bool:
        """Whether all segments have the same number of chunks."""
        return self.count == self.segments * self.per_segment


def split_sequence(length: int, chunk: int, programs: int, wanted: int) -> Split:
    """Cuts a sequence so that enough programs run at a time.

    Args:
      length: tokens.
      chunk: tokens of a chunk.
      programs: programs that one segment of all sequences and heads takes.
      wanted: programs at which doubling the number of segments stops; it also stops at ``MIN_SEGMENT`` tokens.
    """
    segments = 1
    while programs * segments < wanted and length >= 2 * segments * MIN_SEGMENT:
        segments *= 2
    count = -(-length // chunk)
    per_segment = -(-count // segments)
    return Split(length, chunk, -(-count // per_segment), per_segment)
