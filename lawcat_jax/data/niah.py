"""RULER's S-NIAH-1, -2 and -3: one needle in a haystack, as evaluation prompts for any tokenizer.

Source: RULER (arXiv 2404.06654), ``niah_single_1`` to ``_3``. Frame and needle are RULER's to the character. What is ours:
the haystack grows in fine steps, so that every prompt fills its length (RULER's steps of 500 words leave a 1K prompt
at 70 %); samples draw from their own streams, so that sample ``j`` has the same key, value and place at every length.
Training samples of this task come from :mod:`lawcat_jax.data.retrieval`.
"""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from lawcat_jax.config.choices import Bos
from lawcat_jax.data.haystack import NOISE, Haystack
from lawcat_jax.data.samples import EvalSample, fit, in_threads, sample_rng
from lawcat_jax.data.sentences import split_sentences
from lawcat_jax.data.tokenize import Tokenizer, encode_prompt
from lawcat_jax.errors import UserError

FRAME = (
    "A special magic {t} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {t} afterwards.\n{context}\n"
    "What is the special magic {t} for {key} mentioned in the provided text? "
    "The special magic {t} for {key} mentioned in the provided text is"
)
NEEDLE = "One of the special magic {t}s for {key} is: {value}."
DEPTHS = tuple(int(depth) for depth in np.round(np.linspace(0, 100, 40)))  # percent of the sentences
MAX_NEW_TOKENS = 128
_LINE_WORDS = NOISE.split(" ")


@dataclasses.dataclass(frozen=True)
class Variant:
    """``essays``: the needle stands between sentences of a text, else between lines of noise. ``value``: "number" (7
    digits) or "uuid" (version 4)."""

    essays: bool
    value: str


VARIANTS = {1: Variant(False, "number"), 2: Variant(True, "number"), 3: Variant(True, "uuid")}


@functools.cache
def key_words() -> tuple[list[str], list[str]]:
    """Sorted adjectives and nouns of ``wonderwords``; RULER's keys are all pairs ``adjective-noun``.

    Raises:
      UserError: when the package is not installed.
    """
    try:
        from wonderwords import random_word
    except ImportError as problem:
        raise UserError(
            "S-NIAH keys come from the word lists of the package wonderwords: pip install wonderwords"
        ) from problem
    lists = [random_word._get_words_from_text_file(name) for name in ("adjectivelist.txt", "nounlist.txt")]
    adjectives, nouns = (sorted(set(words)) for words in lists)
    return adjectives, nouns


def draw_key(rng: np.random.Generator) -> str:
    """A key, uniform over the pairs (the 6 million pairs need not be listed for that)."""
    adjectives, nouns = key_words()
    return f"{adjectives[rng.integers(len(adjectives))]}-{nouns[rng.integers(len(nouns))]}"


def draw_value(rng: np.random.Generator, kind: str) -> str:
    """A 7-digit number or a UUID of version 4."""
    if kind == "number":
        return str(rng.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def noise_context(words: int, needle: str, place: float) -> tuple[str, float]:
    """(context, depth in percent): lines of noise with the needle before one of them, ``place`` in [0, 1).

    ``words`` in all; where that is no multiple of a line's 19 words the last line is cut, which RULER has no steps for.
    """
    whole, rest = divmod(words, len(_LINE_WORDS))
    index = int(place * whole)
    lines = [NOISE] * whole
    lines.insert(index, needle)
    if rest:
        lines.append(" ".join(_LINE_WORDS[:rest]))
    return "\n".join(lines), 100 * index / max(1, whole)


def essay_context(text: str, needle: str, depth: int) -> str:
    """The needle after ``depth`` percent of the text's sentences, joined by spaces as RULER joins them (so a needle at
    depth 0 has a space before it, one at 100 a space behind it)."""
    sentences = split_sentences(text)
    place = int(len(sentences) * (depth / 100))
    return " ".join([" ".join(sentences[:place]), needle, " ".join(sentences[place:])])


def draw_eval_samples(
    tokenizer: Tokenizer,
    variant: int,
    length: int,
    samples: int,
    seed: int = 42,
    haystack: Haystack | None = None,
    *,
    add_bos: bool | Bos = True,
) -> Iterator[EvalSample]:
    """S-NIAH-``variant`` prompts one by one: prompt and 128 new tokens take at most ``length`` tokens, and at least 99 %
    of it.

    Args:
      haystack: text of variants 2 and 3 (:func:`lawcat_jax.data.haystack.load_haystack`); variant 1 takes none.

    Raises:
      UserError: for an unknown variant, a length below the frame (the minimum is named), a missing haystack, one that
        is too short for the length, or a missing ``wonderwords``.
    """
    if variant not in VARIANTS:
        raise UserError(f"S-NIAH variant {variant!r} is not one of {', '.join(map(str, VARIANTS))}")
    if VARIANTS[variant].essays and haystack is None:
        raise UserError(f"S-NIAH-{variant} needs a haystack: name essays or books (a path, hf:..., or tfds:...)")

    def make(index: int, guess: int) -> tuple[EvalSample, int]:
        return _eval_sample(tokenizer, variant, length, seed, index, haystack, add_bos, guess)

    if samples > 0:
        first, words = make(0, length)
        yield first  # its size is a good guess for all others
        yield from in_threads(lambda index: make(index, words)[0], range(1, samples))


def eval_samples(*args: Any, **kwargs: Any) -> list[EvalSample]:
    """All of :func:`draw_eval_samples`."""
    return list(draw_eval_samples(*args, **kwargs))


def _eval_sample(
    tokenizer: Tokenizer,
    variant: int,
    length: int,
    seed: int,
    index: int,
    haystack: Haystack | None,
    add_bos: bool | Bos,
    guess: int,
) -> tuple[EvalSample, int]:
    rng = sample_rng("eval", seed, index)
    kind = VARIANTS[variant].value
    key, value, place = draw_key(rng), draw_value(rng, kind), float(rng.random())
    depth = DEPTHS[int(place * len(DEPTHS))]
    needle = NEEDLE.format(t=kind, key=key, value=value)

    @functools.cache  # the last measurement is the sample
    def prompt(words: int) -> tuple[str, float, list[int]]:
        if haystack is None or not VARIANTS[variant].essays:
            context, at = noise_context(words, needle, place)
        else:
            context, at = essay_context(haystack.words(words), needle, depth), float(depth)
        text = FRAME.format(t=kind, key=key, context=context)
        return text, at, encode_prompt(tokenizer, text, add_bos=add_bos)

    def measure(words: int) -> int:
        return len(prompt(words)[2])

    budget, slack = length - MAX_NEW_TOKENS, length // 100
    if haystack is None or not VARIANTS[variant].essays:
        line = len(_LINE_WORDS)
        high = 16 * max(1, length)
        lines = fit(
            lambda lines: measure(line * lines), budget, low=1, high=high, start=guess // line, slack=slack // 2
        )
        words = line * lines
        if words > 0 and budget - measure(words) > slack:
            words = fit(measure, budget, low=words, high=words + line - 1)
    else:
        high = len(haystack.word_list)
        words = fit(measure, budget, low=1, high=high, start=min(guess, high), slack=slack // 2)
        if words == high and budget - measure(words) > slack:
            raise UserError(
                f"haystack {haystack.name!r} has {high} words, too few for a prompt of {length} tokens: give more text"
            )
    if words < 1:
        least = measure(1 if VARIANTS[variant].essays else len(_LINE_WORDS)) + MAX_NEW_TOKENS
        raise UserError(
            f"S-NIAH-{variant} at {length} tokens is too short for its frame and {MAX_NEW_TOKENS} new tokens: "
            f"with this tokenizer the minimum is {least} tokens"
        )
    text, at, tokens = prompt(words)
    name = haystack.name if haystack is not None and VARIANTS[variant].essays else "noise"
    question = text[text.rindex("\n") + 1 :]
    return EvalSample(
        np.asarray(tokens, np.int32), text, value, at, question, MAX_NEW_TOKENS, name, f"niah_single_{variant}"
    ), words


def score(sample: EvalSample, output: str) -> float:
    """1.0 where the answer occurs in the output, whatever its case, else 0.0 (RULER's ``string_match_all``)."""
    return float(sample.answer.lower() in output.lower())
