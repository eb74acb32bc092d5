"""What one task measures at one length: a share of right answers, or a likelihood."""

from __future__ import annotations

import dataclasses
import math

_Z95 = 1.959963984540054  # the standard normal quantile of 97.5 %


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of 95 % for a proportion: ``hits`` of ``n`` (E. B. Wilson, JASA 22, 1927).

    Unlike the normal approximation it stays inside [0, 1] and has a width where every answer, or none, is right.
    ``hits`` may be fractional, for scores between 0 and 1. No sample at all gives (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    share, spread = hits / n, _Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half) if hits > 0 else 0.0, min(1.0, centre + half) if hits < n else 1.0


def newcombe_interval(hits_a: float, n_a: int, hits_b: float, n_b: int) -> tuple[float, float]:
    """Newcombe's hybrid score interval of 95 % for the difference a - b of two independent proportions, ``hits`` of ``n``
    (R. G. Newcombe, Statistics in Medicine 17, 1998, method 10): the squared distances of both to the ends of their
    Wilson intervals, added. No sample on a side gives (0, 1) there.
    """
    a, b = (hits / n if n else 0.5 for hits, n in ((hits_a, n_a), (hits_b, n_b)))
    (low_a, high_a), (low_b, high_b) = wilson_interval(hits_a, n_a), wilson_interval(hits_b, n_b)
    return a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Scores of ``n`` samples whose prompts have ``mean_tokens`` tokens on average.

    Attributes:
      accuracy: mean score, in [0, 1].
      records: (depth, score) of every sample, in the samples' order. The depth is where in the context the answer
        stands, from 0 (start) to 1 (end), or None where the task has no depth. May be empty.
    """

    accuracy: float
    n: int
    mean_tokens: float
    records: tuple[tuple[float | None, float], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "records", tuple((depth, score) for depth, score in self.records))  # JSON has lists

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of ``accuracy``, by :func:`wilson_interval`."""
        return wilson_interval(self.accuracy * self.n, self.n)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Mean negative log-likelihood ``nats`` per predicted token, over ``n`` tokens of ``samples`` sequences."""

    nats: float
    n: int
    samples: int

    @property
    def perplexity(self) -> float:
        """exp(nats), which is cut off at exp(700) so that it stays a number."""
        return math.exp(min(self.nats, 700.0))
