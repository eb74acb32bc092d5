"""Perplexity over packed text: a uniform model has the perplexity of its vocabulary."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lawcat_jax.config import EvalConfig
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.perplexity import evaluate_perplexity
from lawcat_jax.tasks.runner import run_evaluation
from tests.data import tokenizers as small


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
    result = evaluate_perplexity(
        _uniform,
        small.byte_level(),
        source=book,
        length=32,
        samples=10,
        batch_size=4,
        progress=lambda *state: seen.append(state),
    )
    assert result.perplexity == pytest.approx(50)
    assert result.nats == pytest.approx(math.log(50))
    assert result.n == 320  # filled-up rows do not count
    assert seen == [(32, 4, 10), (32, 8, 10), (32, 10, 10)]


def test_report(book, tmp_path):
    settings = EvalConfig(tasks=("perplexity",), lengths=(16, 32), samples=3, batch_size=2, text=book)
    lines = []
    run_evaluation(
        settings,
        small.byte_level(),
        model="m",
        output=tmp_path / "eval",
        generators={},
        nlls={"student": _uniform},
        echo=lines.append,
    )
    written = json.loads((tmp_path / "eval" / "perplexity.json").read_text())
    assert written["task"] == "perplexity"
    assert written["results"]["32"]["n"] == 96
    assert written["results"]["16"]["perplexity"] == pytest.approx(50)
    assert "50.000" in lines[0]


def test_no_text():
    with pytest.raises(UserError, match="name a text"):
        evaluate_perplexity(_uniform, small.byte_level(), source="", length=32)
