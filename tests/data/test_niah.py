"""S-NIAH prompts character by character, their lengths, and the metric."""

from __future__ import annotations

import re
import uuid

import numpy as np
import pytest

from lawcat_jax.data import niah
from lawcat_jax.data.haystack import Haystack
from lawcat_jax.data.sentences import split_sentences
from lawcat_jax.data.tokenize import encode
from lawcat_jax.errors import UserError
from tests.data import tokenizers as small
from tests.data.texts import prose

pytest.importorskip("wonderwords")
GREEN = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
GOLDEN = [
    ("lush-creationism", "9914858", 62.0),
    ("daffy-expectation", "4297137", 95.0),
    ("alleged-crumb", "3561145", 54.0),
]  # (key, value, depth) of seed 42
ESSAYS = Haystack("made up", (prose(12_000),))


def _samples(variant, length, samples=5, tokenizer=None, seed=42, haystack=ESSAYS):
    tokenizer = small.byte_level() if tokenizer is None else tokenizer
    return niah.eval_samples(tokenizer, variant, length, samples, seed, haystack)


def _expected(kind, key, value, before, after, joint):
    """RULER's prompt, spelt out."""
    return (
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the {kind} afterwards.\n"
        + joint.join([*before, f"One of the special magic {kind}s for {key} is: {value}.", *after])
        + f"\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for "
        f"{key} mentioned in the provided text is"
    )


def _key(sample):
    return re.search(r"magic \w+ for (.+?) mentioned", sample.question).group(1)


@pytest.mark.parametrize("length", [1024, 2048])
def test_noise_prompts_are_rulers(length):
    for sample in _samples(1, length):
        context = sample.prompt.split("\n")[1:-1]
        lines = len([line for line in context if line == GREEN])
        rest = context[-1:] if context[-1] != GREEN and not context[-1].startswith("One of the special") else []
        place = round(sample.depth * lines / 100)
        before, after = [GREEN] * place, [GREEN] * (lines - place) + rest
        assert sample.prompt == _expected("number", _key(sample), sample.answer, before, after, "\n")
        assert not rest or GREEN.startswith(rest[0] + " ")
        assert re.fullmatch(r"[1-9]\d{6}", sample.answer)
        assert sample.haystack == "noise"


@pytest.mark.parametrize(("variant", "kind"), [(2, "number"), (3, "uuid")])
def test_essay_prompts_are_rulers(variant, kind):
    for sample in _samples(variant, 2048, samples=12):
        needle = f"One of the special magic {kind}s for {_key(sample)} is: {sample.answer}."
        context = sample.prompt.split("afterwards.\n")[1].rsplit("\nWhat is", 1)[0]
        before, after = (part.strip() for part in context.split(needle))
        words = " ".join([before, after]).split()
        sentences = split_sentences(" ".join(ESSAYS.documents[0].split()[: len(words)]))
        place = int(len(sentences) * (sample.depth / 100))
        assert sample.depth in np.round(np.linspace(0, 100, 40))
        parts = [" ".join(sentences[:place])], [" ".join(sentences[place:])]
        assert sample.prompt == _expected(kind, _key(sample), sample.answer, *parts, " ")
        assert sample.haystack == "made up"
        if kind == "uuid":
            assert uuid.UUID(sample.answer).version == 4


def test_depth_0_and_100_keep_rulers_spaces():
    assert niah.essay_context("One two. Three.", "N.", 0) == " N. One two. Three."
    assert niah.essay_context("One two. Three.", "N.", 50) == "One two. N. Three."
    assert niah.essay_context("One two. Three.", "N.", 100) == "One two. Three. N. "
    assert niah.noise_context(57, "N.", 0.5) == (f"{GREEN}\nN.\n{GREEN}\n{GREEN}", 100 / 3)
    assert niah.noise_context(22, "N.", 0.99) == (f"N.\n{GREEN}\nThe grass is", 0.0)


def test_depths_are_rulers():
    assert niah.DEPTHS[:5] == (0, 3, 5, 8, 10)
    assert len(niah.DEPTHS) == 40
    assert niah.DEPTHS[-1] == 100


def test_golden_draws_do_not_change():
    drawn = [(_key(sample), sample.answer, sample.depth) for sample in _samples(2, 1024, 3)]
    assert drawn == GOLDEN  # a change here changes every published result


def test_same_sample_at_every_length_and_other_with_another_seed():
    short, long = _samples(2, 1024), _samples(2, 3000)
    assert [(s.answer, s.depth, _key(s)) for s in short] == [(s.answer, s.depth, _key(s)) for s in long]
    assert [s.prompt for s in _samples(2, 1024)] == [s.prompt for s in short]
    assert not {s.answer for s in _samples(2, 1024, seed=1)} & {s.answer for s in short}


@pytest.mark.parametrize("name", small.ALL)
@pytest.mark.parametrize("variant", [1, 2, 3])
def test_lengths_are_filled_to_one_percent(name, variant):
    tokenizer = small.ALL[name]()
    for length in (1024, 1500, 8192):
        for sample in _samples(variant, length, 2, tokenizer):
            used = len(sample.tokens) + 128
            assert 0.99 * length <= used <= length
            assert sample.tokens.tolist() == [tokenizer.bos_token_id, *encode(tokenizer, sample.prompt)]


def test_an_oracle_scores_all_and_a_constant_nothing():
    for variant in (1, 2, 3):
        for sample in _samples(variant, 2048, 8):
            pattern = rf"One of the special magic \w+ for {re.escape(_key(sample))} is: (\S+)\."
            found = re.findall(pattern, sample.prompt)
            assert len(found) == 1
            assert niah.score(sample, f" {found[0]}. And so on") == 1
            assert niah.score(sample, " 1234567.") == 0


def test_bad_requests(monkeypatch):
    with pytest.raises(UserError, match="variant 4 is not one of 1, 2, 3"):
        _samples(4, 1024)
    with pytest.raises(UserError, match="needs a haystack"):
        _samples(2, 1024, haystack=None)
    for variant in (1, 2):
        with pytest.raises(UserError, match=r"at 200 tokens is too short.*minimum is \d{3} tokens"):
            _samples(variant, 200)
    with pytest.raises(UserError, match=r"haystack 'short' has \d+ words, too few for a prompt of 4096 tokens"):
        _samples(2, 4096, haystack=Haystack("short", (prose(300),)))
    import builtins

    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda n, *a: (_ for _ in ()).throw(ImportError(n)) if n == "wonderwords" else real(n, *a),
    )
    niah.key_words.cache_clear()
    with pytest.raises(UserError, match="pip install wonderwords"):
        _samples(1, 1024)


NUMBER, ID = "4609053", "4c301994-8978-4b0f-8c1f-9632f124b70b"
# (answer, output, score): RULER's rule is a case-insensitive substring
TABLE = [
    (NUMBER, "4609053", 1),
    (NUMBER, " 4609053", 1),
    (NUMBER, "4609053.", 1),
    (NUMBER, "4609053. The special magic", 1),
    (NUMBER, "is 4609053", 1),
    (NUMBER, "**4609053**", 1),
    (NUMBER, "\n\n4609053\n", 1),
    (NUMBER, '"4609053"', 1),
    (NUMBER, "1234567, 4609053", 1),
    (NUMBER, "not 4609053 but 1234567", 1),
    (NUMBER, "46090531", 1),
    (NUMBER, "14609053", 1),
    (NUMBER, "x4609053x", 1),
    (NUMBER, "4609053 4609053", 1),
    (NUMBER, "", 0),
    (NUMBER, " ", 0),
    (NUMBER, "460905", 0),
    (NUMBER, "4609054", 0),
    (NUMBER, "4,609,053", 0),
    (NUMBER, "4 609 053", 0),
    (NUMBER, "4609 053", 0),
    (NUMBER, "46O9053", 0),
    (NUMBER, "3509064", 0),
    (NUMBER, "I do not know", 0),
    (NUMBER, "460905\n3", 0),
    (NUMBER, "four million", 0),
    (ID, ID, 1),
    (ID, ID.upper(), 1),
    (ID, f" {ID}.", 1),
    (ID, f"uuid: {ID} or so", 1),
    (ID, f"{{{ID}}}", 1),
    (ID, ID.title(), 1),
    (ID, f"\t{ID}\n", 1),
    (ID, ID.replace("-", ""), 0),
    (ID, ID[:-1], 0),
    (ID, ID[1:], 0),
    (ID, ID.replace("-", " "), 0),
    (ID, ID.replace("4c", "4d"), 0),
    (ID, "", 0),
    (ID, ID[:18] + "\n" + ID[18:], 0),
]


def test_metric_on_answers_made_by_hand():
    assert len(TABLE) >= 40
    for answer, output, expected in TABLE:
        sample = niah.EvalSample(np.zeros(0, np.int32), "", answer, 0.0, "", 128, "noise", "niah_single_1")
        assert niah.score(sample, output) == expected, (answer, output)
