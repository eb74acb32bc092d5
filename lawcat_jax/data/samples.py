"""The samples that generators give (tokens, and where question and answer lie in them) and their random streams.

A sample is a pure function of (seed, index) and a stream: "train", "validation" and "eval" draw from differently tagged
seeds (:func:`sample_rng`), so that none can repeat another's draw whatever seed the user sets.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from lawcat_jax.config.choices import Bos
from lawcat_jax.data.tokenize import Tokenizer, encode_offsets, opening
from lawcat_jax.errors import UserError

T = TypeVar("T")
_THREADS = 4
_STREAMS = {"train": 1, "validation": 2, "eval": 3}


def sample_rng(stream: str, seed: int, index: int) -> np.random.Generator:
    """Generator of sample ``index`` of a stream ("train", "validation" or "eval").

    The stream's tag is part of the entropy, in a fixed number of words, so two streams never share a state.
    """
    words = [_STREAMS[stream]]
    for value in (seed, index):
        words += [value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF]
    return np.random.default_rng(words)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training sample. ``tokens`` int32 [n] holds bos, text and (training form) eos; the answer's tokens are
    ``tokens[answer_start:answer_end]``.

    What the answer depends on (the needle, the facts) ends before ``tokens[needle_end]`` and the question begins at
    ``tokens[question_start]``, so a cut anywhere in between parts the one from the other; 0 and 0 where a sample
    has no such place. ``label_span``, where it is not the answer's, is the span of tokens whose prediction is trained.
    """

    tokens: np.ndarray
    answer_start: int
    answer_end: int
    answer: str
    text: str
    needle_end: int = 0
    question_start: int = 0
    label_span: tuple[int, int] | None = None

    @property
    def prompt(self) -> list[int]:
        """Tokens before the answer."""
        return self.tokens[: self.answer_start].tolist()


@dataclasses.dataclass(frozen=True)
class EvalSample:
    """One evaluation prompt and what counts as its answer.

    ``tokens`` int32 [n] is the prompt, bos included. ``depth`` is where the needle (or the last supporting fact)
    stands, in percent of the context. ``task`` and ``question`` are what is asked (BABILong's metric needs them). The model
    continues the prompt greedily by at most ``max_new_tokens``. ``haystack`` names the text around the needle; a
    result quotes it.
    """

    tokens: np.ndarray
    prompt: str
    answer: str
    depth: float
    question: str
    max_new_tokens: int
    haystack: str
    task: str


def in_threads(make: Callable[[int], T], indices: Sequence[int]) -> Iterator[T]:
    """``make`` of each index, in order, a few of them at the same time: tokenizers work outside Python's lock.

    Nothing is made far ahead of what is taken, and nothing more once the iterator is closed.
    """
    if len(indices) == 1:
        yield make(indices[0])
        return
    threads = min(_THREADS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads, "lawcat_jax.data.samples") as pool:
        waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        try:
            for index in indices:
                waiting.append(pool.submit(make, index))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def check_eos(tokenizer: Tokenizer, what: str) -> None:
    """Raise a UserError for a tokenizer without an eos token, which ends every ``what`` sample."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no eos token, which ends a {what} sample")


def text_sample(
    tokenizer: Tokenizer,
    text: str,
    answer: str,
    *,
    needle_end: int = 0,
    question_start: int = 0,
    add_bos: bool | Bos = True,
    encoding: Any = None,
) -> Sample:
    """The sample of a text that ends with ``answer``: bos, the text in one tokenizer call, eos.

    The label span comes from character offsets: ``len(encode(answer))`` would count the space token that
    SentencePiece puts before a lone word. A token that merges the space with the answer's first characters belongs to the
    answer. ``needle_end`` and ``question_start`` are characters of ``text``, ``encoding`` is the text's where it is known.
    """
    encoding = encode_offsets(tokenizer, text) if encoding is None else encoding
    bos = opening(tokenizer, add_bos, encoding.ids)
    ends = np.asarray([end for _, end in encoding.offsets], np.int64)

    def first_token_after(character: int) -> int:
        return len(bos) + int(np.searchsorted(ends, character, side="right"))

    tokens = np.asarray([*bos, *encoding.ids, tokenizer.eos_token_id], np.int32)
    start = first_token_after(len(text) - len(answer))
    question = first_token_after(question_start) if question_start else 0
    # a token may hold the needle's last character and what follows: it belongs to the needle
    needle = min(question, first_token_after(needle_end - 1) + 1) if needle_end else 0
    return Sample(tokens, start, len(tokens) - 1, answer, text, needle, question)


def fit(
    measure: Callable[[int], int], budget: int, *, low: int, high: int, start: int | None = None, slack: int = 0
) -> int:
    """The largest ``n`` in [low, high] with ``measure(n) <= budget``: bisection whose steps follow the slope.

    ``measure`` is the length in tokens of something that grows with ``n`` (words of hay, say); ``start`` is a first
    guess. An ``n`` that leaves at most ``slack`` tokens is good enough. Returns ``low - 1`` when even ``low`` is too long.
    """
    first = measure(low)
    if first > budget:
        return low - 1
    below, used_below, above, used_above = low, first, high + 1, 0
    guess = high if start is None else start
    for attempt in itertools.count():
        if above - below <= 1 or budget - used_below <= slack:
            break
        guess = min(max(guess, below + 1), above - 1)
        used = measure(guess)
        if used <= budget:
            below, used_below = guess, used
        else:
            above, used_above = guess, used
        if used_above:
            slope = (used_above - used_below) / (above - below)
        else:
            slope = (used_below - first) / max(1, below - low)
        guess = below + int((budget - used_below) / max(slope, 1e-3))
        if attempt >= 8:  # the slope misleads
            guess = (below + above) // 2
    return below
