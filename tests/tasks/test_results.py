"""Intervals against published values and against scipy."""

from __future__ import annotations

import pytest

from lawcat_jax.tasks.results import Accuracy, newcombe_interval, wilson_interval


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


@pytest.mark.parametrize(
    ("hits_a", "n_a", "hits_b", "n_b", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998) 873-890, table II, method 10
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (0, 10, 0, 10, -0.2775, 0.2775),
        (10, 10, 0, 20, 0.6791, 1.0000),
        (10, 10, 0, 10, 0.6075, 1.0000),
    ],
)
def test_published_newcombe_intervals(hits_a, n_a, hits_b, n_b, low, high):
    assert newcombe_interval(hits_a, n_a, hits_b, n_b) == pytest.approx((low, high), abs=5e-5)
    assert newcombe_interval(hits_b, n_b, hits_a, n_a) == pytest.approx((-high, -low), abs=5e-5)
