"""Samples made by threads: the same ones in the same order, not far ahead, and errors where they belong."""

from __future__ import annotations

import threading

import pytest

from lawcat_jax.data.samples import in_threads
from lawcat_jax.errors import UserError


def test_in_threads_keeps_the_order_and_does_not_run_away():
    made = []

    def make(index):
        made.append(index)
        return index * index

    items = in_threads(make, range(100))
    assert next(items) == 0
    items.close()
    assert len(made) <= 10
    assert list(in_threads(make, range(100))) == [index * index for index in range(100)]
    assert list(in_threads(make, [7])) == [49]
    assert list(in_threads(make, [])) == []


def test_an_error_comes_out_at_its_sample():
    def make(index):
        if index == 3:
            raise UserError("too little text")
        return threading.get_ident()

    items = in_threads(make, range(10))
    assert threading.get_ident() not in [next(items) for _ in range(3)]
    with pytest.raises(UserError, match="too little text"):
        next(items)
