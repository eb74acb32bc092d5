"""Sentence splitting and haystacks."""

from __future__ import annotations

import numpy as np
import pytest

from lawcat_jax.data.haystack import Haystack, load_haystack
from lawcat_jax.data.sentences import split_sentences
from lawcat_jax.errors import UserError
from tests.data.texts import prose

CASES = {
    "One. Two! Three? Four": ["One.", "Two!", "Three?", "Four"],
    'He said "Go." Then he went.': ['He said "Go."', "Then he went."],
    "Mr. Bennet met Dr. Jones at St. Ives. He left.": ["Mr. Bennet met Dr. Jones at St. Ives.", "He left."],
    "J. S. Bach wrote it. So did I. It is good.": ["J. S. Bach wrote it.", "So did I.", "It is good."],
    '"Oh!" cried she. "No?" said he.': ['"Oh!" cried she.', '"No?" said he.'],
    "Pi is 3.14 or so. Fine.": ["Pi is 3.14 or so.", "Fine."],
    "CHAPTER I\n\nIt was\nlate.": ["CHAPTER I", "It was\nlate."],
    "Well... we go. Well... We go.": ["Well... we go.", "Well...", "We go."],
    "  \n\n ": [],
}


@pytest.mark.parametrize("text", CASES)
def test_split(text):
    assert split_sentences(text) == CASES[text]


def test_no_character_is_lost():
    text = prose(3000) + ' "Well," he said... "Mr. X. is (not) here!" ' + prose(100, 1)
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_words_and_names(tmp_path):
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text("One two\nthree.")
    (tmp_path / "essays" / "b.txt").write_text("  Four five. ")
    haystack = load_haystack(str(tmp_path / "essays"))
    assert haystack.words(5) == "One two three. Four five."
    assert haystack.name.endswith("essays")
    assert load_haystack(str(tmp_path / "essays" / "a.txt")).name == "a"
    with pytest.raises(UserError, match="has 5 words, 6 are needed"):
        haystack.words(6)


def test_passages_are_whole_sentences_of_one_place():
    text = prose(5000)
    haystack = Haystack("made up", (text, prose(100, 1)))
    known = {" ".join(sentence.split()) for document in haystack.documents for sentence in split_sentences(document)}
    for seed in range(20):
        passage = haystack.passage(np.random.default_rng(seed), 2000)
        assert passage == haystack.passage(np.random.default_rng(seed), 2000)
        assert set(passage) <= known
        assert 1800 < sum(map(len, passage)) < 3500
    assert (
        sum(map(len, haystack.passage(np.random.default_rng(0), 100_000))) > 95_000
    )  # more than there is: places repeat


def test_bad_haystacks(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_haystack(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="name a text source"):
        load_haystack("")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        load_haystack(str(tmp_path / "blank.txt"))
    with pytest.raises(UserError, match="too little text"):
        Haystack("x", ("Short.",)).passage(np.random.default_rng(0), 100)
    with pytest.raises(UserError, match="no sentences"):
        Haystack("x", ("word " * 500,)).passage(np.random.default_rng(0), 100)
