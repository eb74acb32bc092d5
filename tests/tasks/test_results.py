"""Intervals against published values and against scipy."""

from __future__ import annotations

import pytest

from lawcat_jax.tasks.results import Accuracy, wilson_interval


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_wilson_intervals(hits, n, low, high):
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_intervals_equal_scipy_and_are_symmetric():
    stats = pytest.importorskip("scipy.stats")
    for n in (1, 10, 50, 500):
        for hits in {0, 1, n // 2, n - 1, n}:
            known = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
            assert Accuracy(hits / n, n, 1.0).interval == pytest.approx((known.low, known.high), abs=1e-12)
            low, high = wilson_interval(n - hits, n)
            assert wilson_interval(hits, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert wilson_interval(0, 0) == (0, 1)
