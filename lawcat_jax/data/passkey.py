"""Passkey retrieval: the training form of the LAWCAT authors and the evaluation form of Landmark attention.

Training form ("Passkey-870"): task sentence, newline, hay with a needle, newline, question with a trailing
space, key, eos. Evaluation form (Landmark attention, arXiv 2305.16300, as used by LongLoRA and LAWCAT): five
lines, the key asked for without a trailing space. Both wordings are kept to the letter, so they differ.

Training in other wordings: :mod:`lawcat_jax.data.retrieval`. Random streams: :mod:`lawcat_jax.data.samples`.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from lawcat_jax.config.choices import Bos
from lawcat_jax.data.haystack import NOISE
from lawcat_jax.data.samples import Sample, check_eos, in_threads, sample_rng, text_sample
from lawcat_jax.data.tokenize import Tokenizer, decode, encode, encode_offsets, encode_prompt, opening
from lawcat_jax.errors import UserError

HAY = NOISE
TASK = (
    "There is an important piece of info hidden inside a lot of irrelevant text. "
    "Find it and memorize it. I will quiz you about the important information there."
)
NEEDLE = "The pass key is {key}. Remember it."
QUESTION = "What is the pass key? The pass key is "
LANDMARK_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. "
    "Find it and memorize them. I will quiz you about the important information there."
)
LANDMARK_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
LANDMARK_QUESTION = "What is the pass key? The pass key is"

_WORDS = HAY.split(" ")
_MIN_WORDS = 2  # the needle goes between two words
PasskeySample = Sample


class PasskeyGenerator:
    """Draws samples of the training form for one tokenizer.

    What it needs to know of the tokenizer (tokens of each hay word, tokens of the frame) is measured once,
    so that a sample of any length normally costs one tokenizer call.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      add_bos: whether the tokenizer's bos token comes first; see :func:`lawcat_jax.data.tokenize.opening`.

    Raises:
      UserError: for a tokenizer without character offsets or without an eos token.
    """

    def __init__(self, tokenizer: Tokenizer, *, add_bos: bool | Bos = True):
        check_eos(tokenizer, "passkey")
        self._tokenizer = tokenizer
        self._bos = opening(tokenizer, add_bos)
        self._extra = len(self._bos) + 1  # eos

    def sample_words(self, rng: np.random.Generator, max_words: int) -> PasskeySample:
        """A sample whose hay has ``max_words`` words, rounded up to whole repeats of the hay text.

        870 gives the authors' set: 46 repeats, 874 words.
        """
        words = max(1, -(-max_words // len(_WORDS))) * len(_WORDS)
        key, place = self._draw(rng)
        text = self._text(words, key, place)
        return self._sample(text, key, encode_offsets(self._tokenizer, text))

    def sample_tokens(
        self, rng: np.random.Generator, max_tokens: int, *, target_tokens: int | None = None
    ) -> PasskeySample:
        """The longest sample of at most ``max_tokens`` tokens, bos, answer and eos included.

        The hay is cut at word granularity. ``target_tokens`` (at most ``max_tokens``) asks for a shorter one;
        where it is too short for the frame the shortest sample is returned instead.

        Raises:
          UserError: when ``max_tokens`` is too short for the frame; the message names the minimum.
        """
        key, place = self._draw(rng)
        target = max_tokens if target_tokens is None else min(target_tokens, max_tokens)
        words = max(_MIN_WORDS, self._fitting_words(target - self._frame_tokens))
        text, encoding, total = self._measure(words, key, place)
        while total > target and words > _MIN_WORDS:
            words = max(_MIN_WORDS, min(words - 1, self._fitting_words(self._hay_tokens(words) - (total - target))))
            text, encoding, total = self._measure(words, key, place)
        if total > max_tokens:
            raise UserError(
                f"a passkey sample of {max_tokens} tokens is too short for its frame: "
                f"with this tokenizer the minimum is {max(total, self.minimum_tokens)} tokens"
            )
        while total + self._word_tokens[words % len(_WORDS)] <= target:  # the estimate was low (a short key)
            longer = self._measure(words + 1, key, place)
            if longer[2] > target:
                break
            words, (text, encoding, total) = words + 1, longer
        return self._sample(text, key, encoding)

    @functools.cached_property
    def minimum_tokens(self) -> int:
        """Shortest length in tokens that holds any sample: the largest of a few keys at the least hay."""
        keys = ["12345", "00000", "99999", "13579", "86420", "70707", "31415", "92653"]
        return max(self._measure(_MIN_WORDS, key, 0.5)[2] for key in keys)

    def _draw(self, rng: np.random.Generator) -> tuple[str, float]:
        return f"{rng.integers(100_000):05d}", float(rng.random())

    def _text(self, words: int, key: str, place: float) -> str:
        position = 1 + int(place * (words - 1))  # uniform over the gaps between words
        hay = list(itertools.islice(itertools.cycle(_WORDS), words))
        hay.insert(position, NEEDLE.format(key=key))
        return f"{TASK}\n{' '.join(hay)}\n{QUESTION}{key}"

    def _measure(self, words: int, key: str, place: float) -> tuple:
        text = self._text(words, key, place)
        encoding = encode_offsets(self._tokenizer, text)
        return text, encoding, len(encoding) + self._extra

    def _sample(self, text: str, key: str, encoding) -> PasskeySample:
        needle = NEEDLE.format(key=key)
        return text_sample(
            self._tokenizer,
            text,
            key,
            needle_end=text.index(needle) + len(needle),
            question_start=text.rindex("\n") + 1,
            add_bos=bool(self._bos),
            encoding=encoding,
        )

    @functools.cached_property
    def _word_tokens(self) -> list[int]:
        """Tokens of each hay word in running text, measured on the middle one of three repeats."""
        text = " ".join([HAY] * 3)
        ends = list(itertools.accumulate(len(word) + 1 for word in _WORDS * 3))
        counts = [0] * len(ends)
        for start, end in encode_offsets(self._tokenizer, text).offsets:
            counts[bisect.bisect_right(ends, max(start, end - 1))] += 1  # a token "▁word" starts at the space
        return counts[len(_WORDS) : 2 * len(_WORDS)]

    @functools.cached_property
    def _cumulative(self) -> list[int]:
        return [0, *itertools.accumulate(self._word_tokens)]

    @functools.cached_property
    def _frame_tokens(self) -> int:
        """Tokens of a sample without its hay, specials included."""
        return self._measure(2 * len(_WORDS), "12345", 0.5)[2] - self._hay_tokens(2 * len(_WORDS))

    def _hay_tokens(self, words: int) -> int:
        repeats, rest = divmod(words, len(_WORDS))
        return repeats * self._cumulative[-1] + self._cumulative[rest]

    def _fitting_words(self, tokens: int) -> int:
        """The most words of hay that take at most ``tokens`` tokens (by the measured counts)."""
        if tokens <= 0:
            return 0
        repeats, rest = divmod(tokens, max(1, self._cumulative[-1]))
        return repeats * len(_WORDS) + bisect.bisect_right(self._cumulative, rest) - 1


def landmark_characters(i: int) -> int:
    """Hay length n in characters of the paper's i-th evaluation length: 1024 * floor(3750 (i + 1) / 1024)."""
    return 1024 * (3750 * (i + 1) // 1024)


def landmark_prompt(characters: int, j: int) -> tuple[str, str]:
    """Test ``j`` with ``characters`` of hay: (prompt, answer).

    The reference seeds NumPy's global generator with j; ``RandomState(j)`` draws the same numbers without
    touching global state.

    Raises:
      UserError: when ``characters`` is below 1.
    """
    if characters < 1:
        raise UserError(f"a landmark passkey prompt needs at least 1 character of hay, not {characters}")
    random = np.random.RandomState(j)
    before = int(random.randint(0, characters))
    key = str(random.randint(1, 50_000))
    hay = " ".join([HAY] * (characters // (len(HAY) + 1) + 1))
    lines = (
        LANDMARK_TASK,
        hay[:before],
        LANDMARK_NEEDLE.format(key=key),
        hay[: characters - before],
        LANDMARK_QUESTION,
    )
    return "\n".join(lines), key


def landmark_sample(tokenizer: Tokenizer, characters: int, j: int, *, add_bos: bool | Bos = True) -> PasskeySample:
    """Test ``j`` at a hay length in characters; ``tokens`` is the prompt alone (``answer_start == len(tokens)``)."""
    prompt, key = landmark_prompt(characters, j)
    tokens = np.asarray(encode_prompt(tokenizer, prompt, add_bos=add_bos), np.int32)
    return PasskeySample(tokens, len(tokens), len(tokens), key, prompt)


def landmark_sample_tokens(
    tokenizer: Tokenizer, max_tokens: int, j: int, *, add_bos: bool | Bos = True
) -> PasskeySample:
    """Test ``j`` with as much hay as fits: prompt and answer together take at most ``max_tokens`` tokens.

    Raises:
      UserError: when the frame alone is longer; the message names the minimum.
    """
    per_token = _landmark_characters_per_token(tokenizer)

    def total(characters: int) -> int:
        prompt, key = landmark_prompt(characters, j)
        return len(encode_prompt(tokenizer, f"{prompt} {key}", add_bos=add_bos))

    characters, best = 1, total(1)
    if best > max_tokens:
        raise UserError(
            f"a landmark passkey prompt of {max_tokens} tokens is too short for its frame: "
            f"with this tokenizer the minimum is {best} tokens"
        )
    guess, used = characters, best
    for _ in range(8):
        step = int((max_tokens - used) * per_token)
        guess = max(characters + 1, guess + step) if used <= max_tokens else max(1, guess + min(step, -1))
        used = total(guess)
        if used <= max_tokens and guess > characters:
            characters, best = guess, used
        if max_tokens - best <= 1 and guess == characters:  # a token more or less depends on where the hay is cut
            break
    return landmark_sample(tokenizer, characters, j, add_bos=add_bos)


@functools.lru_cache(maxsize=8)
def _landmark_characters_per_token(tokenizer: Tokenizer) -> float:
    return 8 * (len(HAY) + 1) / max(1, len(encode(tokenizer, " ".join([HAY] * 9))) - len(encode(tokenizer, HAY)))


def draw_eval_samples(
    tokenizer: Tokenizer, *, form: str, length: int, samples: int, seed: int, add_bos: bool | Bos = True
) -> Iterator[PasskeySample]:
    """Evaluation samples of at most ``length`` tokens, one by one.

    ``train``: the training wording, from the evaluation stream of ``seed``. ``landmark``: tests j = 0 ...
    samples - 1, which are defined by j alone; ``seed`` has no part in them.

    Raises:
      UserError: for an unknown form, or a length too short for the frame.
    """
    if form not in ("train", "landmark"):
        raise UserError(f"passkey form {form!r} is not one of 'train', 'landmark'")
    generator = PasskeyGenerator(tokenizer, add_bos=add_bos) if form == "train" else None

    def make(j: int) -> PasskeySample:
        if generator is None:
            return landmark_sample_tokens(tokenizer, length, j, add_bos=add_bos)
        return generator.sample_tokens(sample_rng("eval", seed, j), length)

    yield from in_threads(make, range(samples))


def eval_samples(
    tokenizer: Tokenizer, *, form: str, length: int, samples: int, seed: int, add_bos: bool | Bos = True
) -> list[PasskeySample]:
    """All of :func:`draw_eval_samples`."""
    drawn = draw_eval_samples(tokenizer, form=form, length=length, samples=samples, seed=seed, add_bos=add_bos)
    return list(drawn)


def answer_text(sample: PasskeySample, tokenizer: Tokenizer) -> str:
    """Decoded answer tokens of a training-form sample, without surrounding spaces."""
    return decode(tokenizer, sample.tokens[sample.answer_start : sample.answer_end]).strip()
