"""Training samples of needle retrieval (passkey and NIAH) in the wordings of :mod:`lawcat_jax.data.wordings`.

A sample is a task line, hay with a needle at a sentence boundary, and a question with its answer, filled with hay to the
length asked for. The paper's *passkey* wording has its own generator, :class:`lawcat_jax.data.passkey.PasskeyGenerator`;
the paper's NIAH wording (frame of the authors' code; needle and value kinds are ours) is here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from lawcat_jax.config.choices import Bos
from lawcat_jax.data import niah, wordings
from lawcat_jax.data.haystack import NOISE, Haystack
from lawcat_jax.data.passkey import TASK
from lawcat_jax.data.samples import Sample, check_eos, fit, text_sample
from lawcat_jax.data.sentences import split_sentences
from lawcat_jax.data.tokenize import Tokenizer, encode, encode_offsets, opening
from lawcat_jax.errors import UserError

HAYS = ("noise", "books", "mixed")
UUID_FRACTION = 1 / 3
PAPER_QUESTION = "What is the special magic {t} mentioned in the provided text? "
PAPER_LEAD = "The special magic {t} mentioned in the provided text is "

_FILLER_SENTENCES = split_sentences(" ".join((NOISE, *wordings.FILLERS)))


@dataclasses.dataclass(frozen=True)
class _Frame:
    task: str
    needle: str
    question: str  # with the lead, up to the answer
    answer: str
    separator: str = "\n"
    within_sentences: bool = False  # the needle may stand between any two words of the hay
    own_line: bool = False  # the needle is a line by itself
    space_is_answered: bool = False  # the space between lead and answer is the answer's

    def text(self, words: list[str], ends: list[int], place: float) -> tuple[str, int, int]:
        """(text, end of the needle, start of the question) in characters; ``ends`` are word counts at sentence ends."""
        if self.within_sentences:
            at = int(place * (len(words) + 1))
        else:
            boundaries = [0, *(end for end in ends if end <= len(words))]
            at = boundaries[int(place * len(boundaries))]
        head = self.task + self.separator if self.task else ""
        joint = "\n" if self.own_line else " "
        before = head + " ".join(words[:at]) + (joint if at else "") + self.needle
        rest = joint + " ".join(words[at:]) if at < len(words) else ""
        hay = before + rest + self.separator
        return hay + self.question + self.answer, len(before), len(hay)


class RetrievalGenerator:
    """Draws retrieval samples for one tokenizer.

    Args:
      task: "passkey" (one value), or "niah" (a value that belongs to a named thing).
      wording: "paper" (of "niah" only), "varied", "composed" or "selection".
      hay: "noise", "books" (sentences of ``haystack``) or "mixed" (either, half the samples each).
      haystack: the books.

    Raises:
      UserError: for unknown choices, books without a haystack, or a tokenizer without eos or offsets.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        task: str,
        wording: str,
        hay: str = "noise",
        haystack: Haystack | None = None,
        add_bos: bool | Bos = True,
    ):
        known = ("paper", *wordings.WORDINGS) if task == "niah" else tuple(wordings.WORDINGS)
        if wording not in known:
            raise UserError(f"wording {wording!r} of {task} samples is not one of {', '.join(known)}")
        if hay not in HAYS:
            raise UserError(f"hay {hay!r} is not one of {', '.join(HAYS)}")
        if hay != "noise" and haystack is None:
            raise UserError(f"hay {hay!r} needs books: name a text source in hay_source")
        check_eos(tokenizer, task)
        self._tokenizer, self._task, self._wording = tokenizer, task, wording
        self._hay, self._haystack = hay, haystack
        self._add_bos: bool | Bos = add_bos
        sentences = haystack.passage(np.random.default_rng(0), 4000) if haystack is not None else split_sentences(NOISE)
        typical = " ".join(sentences)  # characters a token, with some to spare: hay is cut to fit
        self._characters_per_token = 1.25 * len(typical) / max(1, len(encode(tokenizer, typical)))
        self._specials = 1 + len(opening(tokenizer, add_bos))

    def sample_tokens(self, rng: np.random.Generator, max_tokens: int, *, target_tokens: int | None = None) -> Sample:
        """A sample of at most ``max_tokens`` tokens, bos and eos included, filled to ``target_tokens`` (default: all).

        Where the target is too short for the frame the shortest sample is returned instead.

        Raises:
          UserError: when ``max_tokens`` is too short for the frame; the message names this sample's minimum.
        """
        frame = self._frame(rng)
        place = float(rng.random())
        target = max_tokens if target_tokens is None else min(target_tokens, max_tokens)
        budget = target - self._specials
        books = self._hay == "books" or (self._hay == "mixed" and bool(rng.random() < 0.5))
        words, ends, guess = self._hay_for(frame, place, budget, books, int(rng.integers(2**62)))
        texts: dict[int, tuple] = {}

        def measure(count: int) -> int:
            text = frame.text(words[:count], ends, place)
            texts[count] = (*text, encode_offsets(self._tokenizer, text[0]))
            return len(texts[count][-1])

        count = fit(measure, budget, low=1, high=len(words), start=guess, slack=max(3, budget // 200))
        text, needle_end, question_start, encoding = texts[max(1, count)]
        sample = text_sample(
            self._tokenizer,
            text,
            " " + frame.answer if frame.space_is_answered else frame.answer,
            needle_end=needle_end,
            question_start=question_start,
            add_bos=self._add_bos,
            encoding=encoding,
        )
        if len(sample.tokens) > max_tokens:
            raise UserError(
                f"a {self._task} sample of {max_tokens} tokens is too short for its frame: "
                f"with this tokenizer this one needs {len(sample.tokens)} tokens"
            )
        return dataclasses.replace(sample, answer=frame.answer)

    @functools.cached_property
    def minimum_tokens(self) -> int:
        """A length in tokens that holds any sample: the longest task, needle, question and value, and a word of hay."""
        longest = functools.partial(max, key=lambda text: len(encode(self._tokenizer, text)))
        uuid = "88888888-8888-4888-8888-888888888888"
        if self._wording == "paper":
            key = "-".join(longest(sorted(words, key=len)[-20:]) for words in niah.key_words())
            needle = niah.NEEDLE.format(t="number", key=key, value=uuid)
            texts = [(TASK, needle, (PAPER_QUESTION + PAPER_LEAD).format(t="number"), uuid)]
        else:
            wording, named = wordings.WORDINGS[self._wording], self._task == "niah"
            name = f"{longest(wordings.ADJECTIVES)}-{longest(wordings.NOUNS)}"
            needles = wording.named_needles if named else wording.needles
            questions = wording.named_questions if named else wording.questions
            composed, texts = self._wording == "composed", []
            for kind, value in (("digits", "888888888"), ("word", name), ("uuid", uuid)):
                whats = [*wording.whats[kind]]
                if composed:
                    whats.append(f"{longest(wordings.WHAT_FIRST)} {longest(wordings.WHAT_SECOND[kind])}")
                facts = {"what": longest(whats), "name": name, "value": f"'{value}'" if composed else value}
                filled = [
                    longest([text.format(**facts) for text in group])
                    for group in (wording.tasks, needles, *zip(*questions, strict=True))
                ]
                if composed:  # the needle twice, or with a reminder, and a second sentence of the task
                    filled += [filled[1], longest(wordings.REMINDERS), longest(wordings.TASK_ENDINGS)]
                texts.append((*filled, value))
        sizes = [sum(len(encode(self._tokenizer, part)) for part in parts) for parts in texts]
        return max(sizes) + self._specials + 10  # newlines, the word, and what tokens at the joints may add

    def _hay_for(
        self, frame: _Frame, place: float, budget: int, books: bool, seed: int
    ) -> tuple[list[str], list[int], int]:
        """(words, word counts at sentence ends, words that will about fill ``budget`` tokens), with words to spare."""
        characters = int(self._characters_per_token * max(budget, 1)) + 200
        while True:
            words, ends = self._draw_hay(np.random.default_rng(seed), characters, books)
            encoding = encode_offsets(self._tokenizer, frame.text(words, ends, place)[0])
            excess = len(encoding) - budget
            if excess > 0:
                break
            characters *= 2
        per_word = (len(encoding) - min(len(encoding) - 1, 80)) / len(words)  # about 80 tokens are the frame's
        return words, ends, max(1, len(words) - math.ceil(excess / max(per_word, 0.1)) - 1)

    def _frame(self, rng: np.random.Generator) -> _Frame:
        if self._wording == "paper":
            kind = "uuid" if rng.random() < UUID_FRACTION else "number"
            value = niah.draw_value(rng, kind)
            needle = niah.NEEDLE.format(t=kind, key=niah.draw_key(rng), value=value)
            return _Frame(TASK, needle, (PAPER_QUESTION + PAPER_LEAD).format(t=kind), value)
        if self._wording == "composed":
            return self._composed_frame(rng)
        wording = wordings.WORDINGS[self._wording]
        kind = _kind(rng)
        named = self._task == "niah"
        facts = {"what": _pick(rng, wording.whats[kind]), "name": _name(rng), "value": _value(rng, kind)}
        needle = _pick(rng, wording.named_needles if named else wording.needles).format(**facts)
        question, lead = _pick(rng, wording.named_questions if named else wording.questions)
        between = _pick(rng, ("\n", " "))
        asked = f"{question}{'' if lead.isspace() else between}{lead}".format(**facts)
        asked += "" if lead.isspace() else " "
        task = _pick(rng, wording.tasks).format(**facts)
        return _Frame(_article(task), _article(needle), asked, facts["value"], _pick(rng, ("\n", "\n\n")))

    def _composed_frame(self, rng: np.random.Generator) -> _Frame:
        """Parts of the varied wording, put together anew: see :mod:`lawcat_jax.data.wordings`."""
        parts, named = wordings.VARIED, self._task == "niah"
        kind = _kind(rng)
        what = _pick(rng, parts.whats[kind])
        if rng.random() < 0.5:
            what = f"{_pick(rng, wordings.WHAT_FIRST)} {_pick(rng, wordings.WHAT_SECOND[kind])}"
        value = _number(rng, 3, 9) if kind == "digits" else _value(rng, kind)
        facts = {"what": what, "name": _name(rng), "value": value}
        quoted = facts | {"value": _pick(rng, wordings.QUOTED).format(value=value)}

        def state() -> str:
            return _article(_pick(rng, parts.named_needles if named else parts.needles).format(**quoted))

        form, needle = rng.random(), state()
        if form < 0.3:
            needle = f"{needle} {state()}"
        elif form < 0.5:
            needle = f"{needle} {_pick(rng, wordings.REMINDERS)}"
        elif form < 0.6:
            needle = f"{_pick(rng, wordings.REMINDERS)} {needle}"
        questions = parts.named_questions if named else parts.questions
        question, lead = _pick(rng, questions)
        if rng.random() < 0.4:
            lead = _pick(rng, questions)[1]
        if rng.random() < 0.15 and not lead.isspace() and (not named or "{name}" in lead):
            question = ""  # the lead asks by itself
        between = "" if lead.isspace() or not question else _pick(rng, ("\n", " "))
        asked = f"{question}{between}{lead}".format(**facts) + ("" if lead.isspace() else " ")
        task = "" if rng.random() < 0.1 else _article(_pick(rng, parts.tasks).format(**facts))
        if task and rng.random() < 0.4:
            task = f"{task.removesuffix(':')} {_pick(rng, wordings.TASK_ENDINGS)}"
        return _Frame(
            task,
            needle,
            asked,
            value,
            _pick(rng, ("\n", "\n\n")),
            within_sentences=bool(rng.random() < 0.3),
            own_line=bool(rng.random() < 0.3),
            space_is_answered=asked.endswith(" "),
        )

    def _draw_hay(self, rng: np.random.Generator, characters: int, books: bool) -> tuple[list[str], list[int]]:
        """Words of the hay and the word counts at which sentences end."""
        if books:
            assert self._haystack is not None  # the constructor checked it
            sentences = self._haystack.passage(rng, characters)
        else:
            noise = NOISE if self._wording == "paper" else _pick(rng, (NOISE, NOISE, *wordings.FILLERS))
            if self._wording == "composed" and rng.random() < 0.7:
                noise = " ".join(rng.permutation(_FILLER_SENTENCES)[: int(rng.integers(2, 9))])
            sentences = split_sentences(noise) * (characters // len(noise) + 1)
        lists = [sentence.split() for sentence in sentences]
        return list(itertools.chain.from_iterable(lists)), list(itertools.accumulate(map(len, lists)))


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _kind(rng: np.random.Generator) -> str:
    """Of a value."""
    return ("digits", "word", "uuid")[rng.choice(3, p=(0.6, 0.15, 0.25))]


def _name(rng: np.random.Generator) -> str:
    return f"{_pick(rng, wordings.ADJECTIVES)}-{_pick(rng, wordings.NOUNS)}"


def _number(rng: np.random.Generator, least: int, most: int) -> str:
    return "".join(str(digit) for digit in rng.integers(10, size=int(rng.integers(least, most + 1))))


def _value(rng: np.random.Generator, kind: str) -> str:
    if kind == "digits":
        return _number(rng, 4, 8)
    return _name(rng) if kind == "word" else niah.draw_value(rng, "uuid")


def _article(text: str) -> str:
    for vowel in "aeioI":  # "a access code" from a template with "a {what}"
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return text
