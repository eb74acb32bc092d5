"""Sentence splitting by rules, without downloads: a stand-in for NLTK's Punkt, which RULER and BABILong use.

A sentence ends at ``.``, ``!`` or ``?`` (with closing quotes and brackets) before white space and what may begin a
sentence. Titles ("Mr."), initials ("J. S. Bach") and a few abbreviations do not end one. The split is deterministic and
keeps every character but the white space between sentences.
"""

from __future__ import annotations

import re

_ABBREVIATIONS = frozenset(
    "mr mrs ms messrs dr prof rev hon capt col gen lieut lt maj sgt st mt sr jr esq vs viz etc e.g i.e cf vol no "  # noqa: SIM905
    "fig ed pp ch chap jan feb mar apr jun jul aug sept oct nov dec".split()
)
_END = re.compile(r"[.!?]+[\"'”’)\]»_*]*(?=\s+)|\n[ \t]*\n")
_OPENING = "\"'“‘([«_*—-"


def split_sentences(text: str) -> list[str]:
    """Sentences of ``text`` in order, stripped, none empty. An empty line ends a sentence too (a heading, a paragraph)."""
    sentences, start = [], 0
    for match in _END.finditer(text):
        if not match.group().isspace() and not _ends(text, start, match):
            continue
        sentence = text[start : match.end()].strip()
        if sentence:
            sentences.append(sentence)
        start = match.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def _ends(text: str, start: int, match: re.Match) -> bool:
    following = text[match.end() : match.end() + 40].lstrip().lstrip(_OPENING)
    if following[:1].islower():  # "Oh! cried she", "the i.e. of it"
        return False
    if match.group()[0] != "." or match.group().startswith(".."):
        return True
    tail = text[max(start, match.start() - 20) : match.start()].split()
    word = tail[-1].lstrip(_OPENING) if tail else ""
    if len(word) == 1 and word.isalpha() and word.isupper() and word != "I":  # an initial; "and I." does end one
        return False
    return word.lower() not in _ABBREVIATIONS
