"""Long documents in pieces whose token ids, one after another, are exactly those of the whole document.

A tokenizer's transient memory is about 100 bytes a token, so a book is given to it in pieces. The only place where a document
is cut is a single space between two letters, and only where the tokenizer is known to treat what is on either side of it
apart; otherwise the document stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from lawcat_jax.data.tokenize import Tokenizer

PIECE = 1 << 16
"""Characters from which on the next place for a cut is looked for."""
_PROBES = (("a", "b"), ("The", "sky"), ("é", "ß"), ("東", "京"), ("ꙮ", "ꙮ"))  # the last is unknown to most vocabularies
_FILLERS = "\u115f\u1160\u3164\uffa0"  # letters that some normalisers take for spaces
_LETTER_AND_SPACE = re.compile("(?:[^\\W\\d_]|\ufffd) ")  # U+FFFD: part of a character, which may be a letter


def cutter(tokenizer: Tokenizer) -> Callable[[str], list[str]]:
    """What cuts a document for this tokenizer."""
    drop = _drops_space(tokenizer)
    if drop is None:
        return lambda text: [text]
    return lambda text: _pieces(text, drop)


def _pieces(text: str, drop: bool) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > PIECE:
        cut = text.find(" ", start + PIECE)
        while cut >= 0 and not (_is_letter(text[cut - 1 : cut]) and _is_letter(text[cut + 1 : cut + 2])):
            cut = text.find(" ", cut + 1)
        if cut < 0:
            break
        pieces.append(text[start:cut])
        start = cut + drop
    return [*pieces, text[start:]]


def _is_letter(character: str) -> bool:
    return character.isalpha() and character not in _FILLERS


def _drops_space(tokenizer: Tokenizer) -> bool | None:
    """Whether the space at a cut is left out, because the tokenizer puts one before every text (SentencePiece) or ignores
    spaces; None where cutting might change ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None

    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    vocabulary = backend.get_vocab(with_added_tokens=False)
    if any(map(_holds_cut, vocabulary)) or any(map(_is_near_cut, tokenizer.get_added_vocab())):
        return None
    if all(ids(f"{a} {b}") == ids(a) + ids(b) for a, b in _PROBES):
        return True
    return False if all(ids(f"{a} {b}") == ids(a) + ids(f" {b}") for a, b in _PROBES) else None


def _holds_cut(token: str) -> bool:
    """Whether a token of the vocabulary has a letter with a space behind it: only such a one can reach over a cut."""
    from tokenizers import decoders

    if "Ġ" in token[1:]:  # a space in byte-level vocabularies
        return bool(_LETTER_AND_SPACE.search(decoders.ByteLevel().decode([token])))
    return bool(_LETTER_AND_SPACE.search(token.replace("▁", " ")))


def _is_near_cut(token: str) -> bool:
    """Whether an added token, which is found before anything else is done to a text, may stand at a cut or reach over it."""
    return token == " " or token[:1].isalpha() or token[-1:].isalpha() or bool(_LETTER_AND_SPACE.search(token))
