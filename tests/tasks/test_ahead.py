"""Work ahead on a thread: the same items, the same exceptions, and an end."""

from __future__ import annotations

import threading
import time

import pytest

from lawcat_jax.tasks.ahead import Ahead


def test_items_come_in_order_and_a_few_ahead():
    made = []

    def make():
        for number in range(50):
            made.append(number)
            yield number

    with Ahead(make, 3) as items:
        assert next(items) == 0
        time.sleep(0.3)
        assert len(made) <= 5  # three wait, one is on its way
        assert list(items) == list(range(1, 50))
        assert list(items) == []


def test_an_exception_comes_out_where_it_happened():
    def make():
        yield 1
        raise ValueError("no more text")

    with Ahead(make, 5) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="no more text"):
            next(items)
        assert list(items) == []


def test_the_thread_ends_when_its_items_are_not_wanted():
    before = threading.active_count()
    with Ahead(lambda: iter(range(1000)), 2) as items:
        next(items)
        assert threading.active_count() == before + 1
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before
