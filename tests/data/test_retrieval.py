"""Training samples of needle retrieval: wordings, spans, lengths."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lawcat_jax.config import DataConfig
from lawcat_jax.data import retrieval, wordings
from lawcat_jax.data.haystack import NOISE, Haystack
from lawcat_jax.data.passkey import TASK
from lawcat_jax.data.samples import fit, sample_rng
from lawcat_jax.data.sources import make_source
from lawcat_jax.data.tokenize import decode, encode
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small
from tests.data.texts import prose

BOOKS = Haystack("made up", (prose(12_000),))


def _generator(tokenizer=None, **options):
    defaults = {"task": "passkey", "wording": "varied", "hay": "mixed", "haystack": BOOKS}
    return retrieval.RetrievalGenerator(tokenizer or small.byte_level(), **(defaults | options))


def _draw(generator, count, length=600, stream="train"):
    return [generator.sample_tokens(sample_rng(stream, 0, index), length) for index in range(count)]


@pytest.mark.parametrize("name", small.ALL)
@pytest.mark.parametrize(("task", "wording"), [("passkey", "varied"), ("niah", "varied"), ("niah", "selection")])
def test_spans_and_lengths(name, task, wording):
    tokenizer = small.ALL[name]()
    for sample in _draw(_generator(tokenizer, task=task, wording=wording), 12):
        assert 590 <= len(sample.tokens) <= 600
        assert sample.tokens[1:-1].tolist() == encode(tokenizer, sample.text)
        answer = decode(tokenizer, encode(tokenizer, sample.answer)).strip()  # this vocabulary may lack the hyphen
        assert decode(tokenizer, sample.tokens[sample.answer_start : sample.answer_end]).strip() == answer
        assert sample.text.count(sample.answer) == 2  # needle and answer
        before = decode(tokenizer, sample.tokens[: sample.needle_end])
        assert answer in before
        assert 0 < sample.needle_end <= sample.question_start < sample.answer_start
        if name != "metaspace":  # which does not spell newlines
            question = decode(tokenizer, sample.tokens[sample.question_start :])
            assert sample.text.endswith(question)
            assert not question.startswith("\n")
            assert sample.answer not in decode(tokenizer, sample.tokens[sample.question_start : sample.answer_start])


def test_the_papers_niah_text():
    pytest.importorskip("wonderwords")
    uuids = 0
    for sample in _draw(_generator(task="niah", wording="paper", hay="noise"), 24):
        intro, hay, question = sample.text.split("\n")
        kind = "uuid" if "-" in sample.answer else "number"
        uuids += kind == "uuid"
        assert intro == TASK
        assert question == (
            f"What is the special magic {kind} mentioned in the provided text? The special magic {kind} mentioned in the "
            f"provided text is {sample.answer}"
        )
        needle = re.search(rf"One of the special magic {kind}s for (\S+ ?\S*-.+?) is: {sample.answer}\.", hay)
        before, after = hay.split(needle.group(0))
        joined = " ".join([before.strip(), after.strip()]).strip()
        assert " ".join([NOISE] * 60).startswith(joined)
        assert not before or before.rstrip()[-1] in ".?!"  # a sentence boundary
    assert 3 <= uuids <= 16


def test_many_wordings_of_every_part():
    for part in ("tasks", "needles", "named_needles", "questions", "named_questions"):
        assert len(set(getattr(wordings.VARIED, part))) >= 20
    samples = _draw(_generator(hay="noise"), 150, 250)
    kinds = {"digits": 0, "uuid": 0, "word": 0}
    sizes = set()
    for sample in samples:
        if sample.answer.isdigit():
            kinds["digits"] += 1
            sizes.add(len(sample.answer))
        else:
            kinds["uuid" if len(sample.answer) == 36 else "word"] += 1
    assert sizes == {4, 5, 6, 7, 8}
    assert min(kinds.values()) > 10
    assert len({sample.text.split("\n")[0] for sample in samples}) > 60


@pytest.mark.parametrize("name", small.ALL)
@pytest.mark.parametrize("task", ["passkey", "niah"])
def test_composed_samples(name, task):
    tokenizer = small.ALL[name]()
    for sample in _draw(_generator(tokenizer, task=task, wording="composed"), 24):
        assert 590 <= len(sample.tokens) <= 600
        assert sample.tokens[1:-1].tolist() == encode(tokenizer, sample.text)
        answer = decode(tokenizer, encode(tokenizer, sample.answer)).strip()
        # the space that a tokenizer writes by itself is learned with the answer
        spanned = decode(tokenizer, sample.tokens[sample.answer_start : sample.answer_end])
        assert spanned.strip() == answer
        if name == "byte_level" and sample.text[: -len(sample.answer)].endswith(" "):
            assert spanned == " " + answer
        assert answer in decode(tokenizer, sample.tokens[: sample.needle_end])
        assert 0 < sample.needle_end <= sample.question_start <= sample.answer_start
        asked = sample.text.rindex(sample.answer)
        assert sample.text[:asked].count(sample.answer) in (1, 2)  # stated once or twice


def test_composed_frames_hardly_repeat():
    def frames(samples):
        """What stands before the hay and after it, without the values."""
        found = set()
        for sample in samples:
            text = re.sub(r"\n+", "\n", sample.text.replace(sample.answer, "#"))
            found.add((text.split("\n")[0][:60], text[-40:]))
        return len(found)

    def needles(samples):
        return len({re.split(r"(?<=\.) ", s.text.replace(s.answer, "#").split("#")[1])[0] for s in samples})

    varied, composed = (_draw(_generator(wording=name, hay="noise"), 200, 300) for name in ("varied", "composed"))
    assert {len(s.answer) for s in composed if s.answer.isdigit()} == {3, 4, 5, 6, 7, 8, 9}
    assert frames(composed) > frames(varied)
    assert frames(composed) > 190
    assert needles(composed) > 1.5 * needles(varied)
    own_line = [s for s in composed if re.search(r"\S\n[^\n]*" + re.escape(s.answer) + r"[^\n]*\n\S", s.text)]
    assert 20 < len(own_line) < 140
    fillers = {part for s in composed for part in s.text.split(". ")[3:5]}
    assert len(fillers) > 30


def test_selection_shares_no_template_with_varied():
    for part in ("tasks", "needles", "named_needles", "questions", "named_questions"):
        assert not set(getattr(wordings.SELECTION, part)) & set(getattr(wordings.VARIED, part))
    varied = {what for whats in wordings.VARIED.whats.values() for what in whats}
    assert not varied & {what for whats in wordings.SELECTION.whats.values() for what in whats}


def test_needles_stand_everywhere():
    tokenizer = small.byte_level()
    shares = [s.needle_end / len(s.tokens) for s in _draw(_generator(tokenizer, hay="books"), 100, 400)]
    counts = np.histogram(shares, bins=4, range=(0.1, 0.95))[0]
    assert counts.min() > 9


def test_books_and_noise_are_mixed():
    noisy = [any(filler[:30] in s.text for filler in (NOISE, *wordings.FILLERS)) for s in _draw(_generator(), 60)]
    assert 0.3 < np.mean(noisy) < 0.7


def test_same_seed_same_samples_and_target():
    generator = _generator()
    first, second = generator.sample_tokens(sample_rng("train", 0, 5), 600), _draw(generator, 6)[5]
    assert first.text == second.text
    short = generator.sample_tokens(sample_rng("train", 0, 5), 900, target_tokens=500)
    assert 485 <= len(short.tokens) <= 500


def test_bad_requests():
    with pytest.raises(UserError, match="wording 'paper' of passkey samples is not one of varied, composed, selection"):
        _generator(wording="paper")
    with pytest.raises(UserError, match="hay 'straw' is not one of"):
        _generator(hay="straw")
    with pytest.raises(UserError, match="needs books"):
        _generator(haystack=None)
    with pytest.raises(UserError, match=r"too short for its frame.*needs \d+ tokens"):
        _generator().sample_tokens(sample_rng("train", 0, 0), 30)


@pytest.mark.parametrize(
    ("task", "wording"), [("passkey", "varied"), ("niah", "varied"), ("niah", "composed"), ("passkey", "selection")]
)
def test_the_minimum_holds_every_sample(task, wording):
    generator = _generator(task=task, wording=wording, hay="noise")
    assert max(len(s.tokens) for s in _draw(generator, 150, generator.minimum_tokens)) <= generator.minimum_tokens
    data = DataConfig(kind=task, wording="varied", num_samples=4)
    with pytest.raises(UserError, match=r"too short for their longest frame.*minimum is \d+ tokens"):
        make_source(data, small.byte_level(), seq_length=100, seed=0, split="train")


@pytest.mark.parametrize("slack", [0, 7])
def test_fit_finds_the_largest(slack):
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = np.cumsum(rng.integers(0, 9, size=int(rng.integers(1, 400))))
        budget, calls = int(rng.integers(sizes[-1] + 10)), []
        found = fit(
            lambda n: calls.append(n) or int(sizes[n]),  # noqa: B023
            budget,
            low=0,
            high=len(sizes) - 1,
            start=int(rng.integers(-5, 500)),
            slack=slack,
        )
        best = int(np.searchsorted(sizes, budget, side="right")) - 1
        assert found <= best
        assert found == best or budget - sizes[found] <= slack
        assert len(calls) < 22
