"""Perplexity by position: blocks of positions, and the one pass with carried state against one whole forward pass."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from lawcat_jax.config import EvalConfig
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.decoder_model import model_nll, position_nll
from lawcat_jax.tasks.registry import task_named
from tests.data import tokenizers as small
from tests.models.helpers import LAWCAT, TINY, build, forward
from tests.tasks.fakes import model

POSITIONS = task_named("perplexity_by_position")
ROWS, LENGTH = 2, 24


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "book.txt").write_text("The sky is blue. Here we go. " * 200)
    return str(tmp_path / "book.txt")


def test_blocks_of_positions(book):
    seen = []

    def nll(batch):  # position t costs log(t + 2) nats
        weights = np.asarray(batch["loss_weights"], np.float64)
        return np.log(np.arange(weights.shape[1]) + 2.0) * weights.sum(axis=0), weights.sum(axis=0)

    settings = EvalConfig(
        tasks=(POSITIONS.name,), lengths=(16, 40), text=book, samples=3, batch_size=2, position_block=16
    )
    assert POSITIONS.lengths(settings) == [40]
    subject = model(small.byte_level(), position_nll=nll)
    found = POSITIONS.measure(subject, 40, settings, lambda *state: seen.append(state))
    assert {x: result.n for x, result in found.items()} == {16: 48, 32: 48, 40: 24}  # rows of weight zero do not count
    assert found[16].nats == pytest.approx(np.mean(np.log(np.arange(2, 18))))
    assert found[40].nats == pytest.approx(np.mean(np.log(np.arange(34, 42))))
    assert seen == [(40, 2, 3), (40, 3, 3)]


def test_no_text():
    with pytest.raises(UserError, match="perplexity_by_position: name a text"):
        POSITIONS.check(EvalConfig(lengths=(32,)), small.byte_level())


@pytest.mark.parametrize(
    ("as_teacher", "chunk"),
    [
        (False, 8),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, 8), (False, 7), (False, 0), (True, 0))),
    ],
)
def test_carried_state_equals_one_whole_pass(as_teacher, chunk):
    """A hybrid, so that key-value buffers and recurrent states are carried; the reference sums in numpy."""
    graphdef, params = build(dataclasses.replace(TINY, num_layers=2), dataclasses.replace(LAWCAT, softmax_layers=(1,)))
    random = np.random.default_rng(0)
    tokens = random.integers(0, TINY.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    weights = random.integers(0, 2, (ROWS, LENGTH)).astype(np.float32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": weights}
    batch["lengths"] = np.full(ROWS, LENGTH, np.int32)
    logits = np.asarray(forward(params, batch["tokens"], graphdef=graphdef, as_teacher=as_teacher), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0] * weights).sum(axis=0)
    totals, counts = position_nll(graphdef, params, as_teacher=as_teacher, chunk=chunk)(batch)
    np.testing.assert_allclose(totals, expected, atol=1e-4)
    np.testing.assert_array_equal(counts, weights.sum(axis=0))


@pytest.mark.slow
def test_the_sum_over_positions_is_the_perplexity_task():
    graphdef, params = build(TINY, LAWCAT)
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.ones((ROWS, LENGTH), np.float32)}
    batch["lengths"] = np.full(ROWS, LENGTH, np.int32)
    total, weight = model_nll(graphdef, params, as_teacher=False)(batch)
    totals, weights = position_nll(graphdef, params, as_teacher=False, chunk=8)(batch)
    assert totals.sum() == pytest.approx(total, rel=1e-5)
    assert weights.sum() == weight
    assert math.isfinite(total)
