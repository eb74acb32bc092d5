"""Perplexity over packed text: a uniform model has the perplexity of its vocabulary."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lawcat_jax.config import EvalConfig
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.registry import task_named
from lawcat_jax.tasks.runner import run_evaluation
from tests.data import tokenizers as small
from tests.tasks.fakes import model

PERPLEXITY = task_named("perplexity")


def _uniform(batch):
    weights = batch["loss_weights"]
    return float(np.sum(weights) * math.log(50)), float(np.sum(weights))


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "book.txt").write_text("The sky is blue. Here we go. " * 200)
    return str(tmp_path / "book.txt")


def test_uniform_model(book):
    seen = []
    settings = EvalConfig(tasks=("perplexity",), text=book, samples=10, batch_size=4)
    subject = model(small.byte_level(), nll=_uniform)
    result = PERPLEXITY.measure(subject, 32, settings, lambda *state: seen.append(state))[32]
    assert result.perplexity == pytest.approx(50)
    assert result.nats == pytest.approx(math.log(50))
    assert result.n == 320  # filled-up rows do not count
    assert seen == [(32, 4, 10), (32, 8, 10), (32, 10, 10)]


def test_report(book, tmp_path):
    settings = EvalConfig(tasks=("perplexity",), lengths=(16, 32), samples=3, batch_size=2, text=book)
    lines = []
    run_evaluation(
        settings,
        [model(small.byte_level(), nll=_uniform)],
        output=tmp_path / "eval",
        echo=lines.append,
    )
    written = json.loads((tmp_path / "eval" / "perplexity.json").read_text())
    assert written["task"] == "perplexity"
    assert written["results"]["32"]["n"] == 96
    assert written["results"]["16"]["perplexity"] == pytest.approx(50)
    assert "50.000" in lines[0]


def test_what_is_reported_and_computed_are_the_sequences_that_there_are(book, tmp_path):
    """A text of some 60 sequences of 100 tokens, of which a thousand are asked for: nothing is padded but a last row or so."""
    batches, seen, lines = [], [], []

    def nll(batch):
        batches.append(np.sum(batch["loss_weights"], axis=1) > 0)
        return _uniform(batch)

    settings = EvalConfig(tasks=("perplexity",), lengths=(100,), samples=1000, batch_size=25, text=book)
    subject = model(small.byte_level(), nll=nll)
    result = PERPLEXITY.measure(subject, 100, settings, lambda *state: seen.append(state))[100]
    there_are = result.samples
    assert result.n == 100 * there_are
    assert 10 < there_are < 100
    assert seen[-1] == (100, there_are, there_are)
    assert sum(map(len, batches)) - there_are < len(batches)  # rows of padding
    assert len({len(rows) for rows in batches}) == 1  # one program
    batches.clear()
    run_evaluation(settings, [subject], output=tmp_path / "eval", echo=lines.append)
    written = json.loads((tmp_path / "eval" / "perplexity.json").read_text())
    assert written["samples"] == written["results"]["100"]["samples"] == there_are
    for text in (lines[0], (tmp_path / "eval" / "perplexity.md").read_text()):
        assert f"{there_are} samples of a length, and not the 1000 that were asked for" in text


def test_batches_divide_over_devices(book):
    settings = EvalConfig(tasks=("perplexity",), text=book, samples=9, batch_size=3)
    sizes = []

    def nll(batch):
        sizes.append(len(batch["tokens"]))
        return _uniform(batch)

    result = PERPLEXITY.measure(model(small.byte_level(), nll=nll, devices=2), 32, settings)[32]
    assert result.samples == 9
    assert sizes == [6, 6]  # at most 3 for each of two devices


def test_no_text():
    with pytest.raises(UserError, match="name a text"):
        PERPLEXITY.check(EvalConfig(lengths=(32,)), small.byte_level())


def test_a_changed_text_is_measured_anew(book):
    settings = EvalConfig(tasks=("perplexity",), text=book)
    before = PERPLEXITY.identity(settings)
    assert PERPLEXITY.identity(settings) == before
    with open(book, "a") as file:
        file.write("More.")
    assert PERPLEXITY.identity(settings) != before
