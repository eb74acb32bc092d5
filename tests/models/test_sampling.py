"""Filters of logits equal transformers' own, and what is drawn stays within them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lawcat_jax.errors import UserError
from lawcat_jax.inference.sampling import Sampling, choose, filtered, penalized

ROWS, VOCABULARY = 6, 257
CHOICES = {"top_k": (0, 1, 7, 300), "top_p": (1.0, 0.6, 1e-6), "min_p": (0.0, 0.05, 1.0)}


def logits(seed=0):
    drawn = np.random.default_rng(seed).normal(0, 3, (ROWS, VOCABULARY)).astype(np.float32)
    drawn[:, 1] = drawn[:, 0]  # a tie
    return drawn


@pytest.mark.parametrize("temperature", [0.7, 1.9])
def test_filters_equal_those_of_transformers(temperature):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    for top_k, top_p, min_p in itertools.product(*CHOICES.values()):
        scores = theirs.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits()))
        if top_k:
            scores = theirs.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = theirs.TopPLogitsWarper(top_p)(None, scores)
        if min_p:
            scores = theirs.MinPLogitsWarper(min_p)(None, scores)
        found = filtered(jnp.asarray(logits()), Sampling(temperature, top_k, top_p, min_p).values())
        np.testing.assert_allclose(np.asarray(found), scores.numpy(), rtol=1e-6, err_msg=str((top_k, top_p, min_p)))


def test_repetition_penalty_equals_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (ROWS, 40))
    seen = np.zeros((ROWS, VOCABULARY), bool)
    seen[np.arange(ROWS)[:, None], tokens] = True
    for penalty in (1.3, 0.5):
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(tokens), torch.tensor(logits()))
        found = penalized(jnp.asarray(logits()), jnp.asarray(seen), penalty)
        np.testing.assert_allclose(np.asarray(found), scores.numpy(), rtol=1e-6)


def test_draws_follow_the_filtered_distribution():
    """Frequencies of 4,000 draws from one row, and nothing that was filtered out."""
    row = jnp.asarray(np.repeat(logits()[:1, :12], 4000, axis=0))
    values = Sampling(1.5, top_k=6, top_p=0.9).values()
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.bincount(np.asarray(choose(row, 3, keys, values, None)), minlength=12) / 4000
    wanted = np.asarray(jax.nn.softmax(filtered(row[:1], values), axis=-1))[0]
    assert not drawn[wanted == 0].any()
    assert np.abs(drawn - wanted).max() < 4 * np.sqrt(0.25 / 4000)
    greedy = np.asarray(choose(row[:1], 0, keys[:1], Sampling().values(), None))
    assert greedy == np.argmax(row[0])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": float("nan")}, "--temperature: nan"),
        ({"temperature": 1e30}, "--temperature: 1e\\+30 must be at most 1000"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top_p: 1.5 must be at most 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top_p: must be above 0"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty"),
        ({"temperature": 1.0, "min_p": -1.0}, "--min_p"),
        ({"top_k": 5}, "--top_k filters what is drawn: give a --temperature"),
        ({"seed": 2**70}, "--seed"),
    ],
)
def test_what_cannot_be_is_refused(sampling, message):
    with pytest.raises(UserError, match=message):
        Sampling(**sampling).check("--")
