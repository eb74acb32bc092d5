"""Continue texts and conversations with a loaded model."""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lawcat_jax.data.tokenize import StreamDecoder, Tokenizer, bos_rule, encode_behind, encode_prompt
from lawcat_jax.errors import UserError
from lawcat_jax.inference.loading import LoadedModel
from lawcat_jax.inference.sampling import GREEDY, Sampling
from lawcat_jax.inference.session import Session
from lawcat_jax.models import bind

NEW_TOKENS = 128
"""Tokens of an answer at most, where nobody says otherwise; fewer where softmax attention has no positions for them."""


@dataclasses.dataclass(frozen=True)
class Request:
    """How answers are made.

    Attributes:
      max_new_tokens: most tokens of an answer; None is :data:`NEW_TOKENS`, or as many as the model has positions for.
      sampling: how tokens are chosen.
      stop: an answer ends before the first of these strings; see :class:`AnswerText`.
      teacher: use the student's teacher.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    teacher: bool = False

    def softmax(self, model: LoadedModel) -> bool:
        """Whether every layer has softmax attention."""
        return self.teacher or not model.is_student

    def new_tokens(self, model: LoadedModel, before: int) -> int:
        """Tokens to make at most after ``before`` tokens.

        Raises:
          UserError: softmax attention was trained for fewer positions.
        """
        positions = bind(model.graphdef, model.params).config.max_position_embeddings
        if not self.softmax(model):
            return self.max_new_tokens or NEW_TOKENS
        wanted = self.max_new_tokens or max(1, min(NEW_TOKENS, positions - before))
        if before + wanted > positions:
            raise UserError(
                f"prompt and answer take up to {before} + {wanted} tokens, but softmax attention was trained for "
                f"{positions} positions; shorten the prompt or --max_new_tokens"
            )
        return wanted


PLAIN = Request()


class AnswerText:
    """The text of one answer, from its tokens one by one, up to the first stop string.

    Stop strings are looked for in the text with its special tokens, as transformers does with ``stop_strings``; what is shown
    has none. Text is held back while it may be the start of a stop string, or ends in an incomplete character.

    Args:
      tokenizer: the model's.
      context: the tokens before the answer, behind which it is spelt.
      stop: the strings.

    Attributes:
      text: what is shown so far.
      made: tokens so far, up to the one that completes the stop string.
      stopped: whether a stop string was made; tokens after it are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str] = ()):
        self.text, self.made, self.stopped = "", 0, False
        self._stop, self._longest = stop, max(map(len, stop), default=0)
        self._shown = StreamDecoder(tokenizer, context)
        self._whole = StreamDecoder(tokenizer, context, special=True)
        self._shows, self._spells = "", ""  # the text without and with special tokens, what is held back included
        self._ends: list[tuple[int, int]] = [(0, 0)]  # of each token: lengths of the text with and without them

    def push(self, token: int) -> str:
        """What is shown with ``token`` that was not before."""
        if self.stopped:
            return ""
        self.made += 1
        if not self._stop:
            return self._show(self._shown.push(token))
        return self._add(self._shown.push(token), self._whole.push(token))

    def finish(self) -> str:
        """What was held back, where no token follows."""
        if self.stopped:
            return ""
        if not self._stop:
            return self._show(self._shown.flush())
        piece = self._add(self._shown.flush(), self._whole.flush())
        return piece if self.stopped else piece + self._show(self._shows[len(self.text) :])

    def extend(self, tokens: Sequence[int]) -> bool:
        """Take those of ``tokens``, all of the answer so far, that are new; whether it has stopped."""
        for token in tokens[self.made :]:
            self.push(token)
        return self.stopped

    def _add(self, shown: str, spelt: str) -> str:
        start = max(0, len(self._spells) - self._longest)
        self._shows += shown
        self._spells += spelt
        self._ends.append((len(self._spells), len(self._shows)))
        found = [place for word in self._stop if (place := self._spells.find(word, start)) >= 0]
        if found:
            self.stopped = True
            return self._show(self._shows[len(self.text) : self._place(min(found))])
        starts = (n for word in self._stop for n in range(1, len(word)) if self._spells.endswith(word[:n]))
        return self._show(self._shows[len(self.text) : self._place(len(self._spells) - max(starts, default=0))])

    def _place(self, spelt: int) -> int:
        """Characters that are shown of the first ``spelt`` of the text with special tokens."""
        number = bisect.bisect_left(self._ends, spelt, key=lambda end: end[0])
        if number == 0:
            return 0
        (_, before), (whole, shown) = self._ends[number - 1 : number + 1]
        return max(before, shown - (whole - spelt))

    def _show(self, piece: str) -> str:
        self.text += piece
        return piece


class Answer:
    """Pieces of the text of one answer, as they are made.

    Attributes:
      text: what was given so far.
      read, made: tokens that were read for it, and of the answer so far.
      nbytes: what the model remembers, in bytes.
    """

    def __init__(self, model: LoadedModel, session: Session, tokens: Sequence[int], request: Request):
        self.read = len(tokens)
        self._session, self._times = session, []
        self._spelt = AnswerText(model.tokenizer, [*session.tokens, *tokens], request.stop)
        made = session.stream(
            tokens,
            max_new_tokens=request.new_tokens(model, len(session.tokens) + len(tokens)),
            eos_ids=model.eos_ids,
            sampling=request.sampling,
        )
        self._pieces = self._given(made)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def text(self) -> str:
        return self._spelt.text

    @property
    def made(self) -> int:
        return self._spelt.made

    @property
    def nbytes(self) -> int:
        return self._session.nbytes

    def _given(self, tokens: Iterator[int]) -> Iterator[str]:
        for token in tokens:
            self._times.append(time.monotonic())
            if piece := self._spelt.push(token):
                yield piece
            if self._spelt.stopped:
                return
        if piece := self._spelt.finish():
            yield piece

    def summary(self) -> str:
        """Tokens, speed and memory in one line. The speed leaves out the first two tokens, for which programs may be
        compiled."""
        text = f"{self.read} tokens read, {self.made} made"
        if len(self._times) > 2:
            text += f", {(len(self._times) - 2) / max(self._times[-1] - self._times[1], 1e-9):.1f} tokens/s"
        return f"{text}, state {_size(self.nbytes)}"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def continue_text(
    model: LoadedModel, prompt: str, request: Request = PLAIN, *, session: Session | None = None
) -> Answer:
    """The text that follows ``prompt``, in pieces as they are made, up to the model's end token.

    Args:
      model: see :func:`lawcat_jax.inference.loading.load_for_inference`.
      prompt: text; the tokenizer's bos token is put before it as :func:`lawcat_jax.data.tokenize.bos_rule` says.
      request: how the answer is made.
      session: what was read and made before, to which the text is appended; a new one if there is none. The tokens that were made
        stay as they are, and the text goes on behind them (:func:`lawcat_jax.data.tokenize.encode_behind`).

    Raises:
      UserError: at once, for a prompt of no tokens, or one that is too long for softmax attention; else as
        :func:`lawcat_jax.inference.generation.generate`.
    """
    if session is None:
        session = new_session(model, request)
    tokens = encode_behind(model.tokenizer, prompt) if session.tokens else prompt_tokens(model, prompt)
    return Answer(model, session, tokens, request)


def new_session(model: LoadedModel, request: Request) -> Session:
    """A session of the model that answers a request."""
    return Session(model.graphdef, model.params, as_teacher=request.softmax(model))


def prompt_tokens(model: LoadedModel, prompt: str) -> list[int]:
    """Token ids of a prompt from its start.

    Raises:
      UserError: there are none.
    """
    tokens = encode_prompt(model.tokenizer, prompt, add_bos=bos_rule(model.tokenizer))
    if not tokens:
        raise UserError("the prompt is empty, and this tokenizer has no bos token to start from")
    return tokens


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer says how conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> str:
    """A conversation as the model's chat template writes it, up to where its next answer begins.

    Raises:
      UserError: there is no template, or it refuses the conversation.
    """
    if not has_chat_template(tokenizer):
        raise UserError("this model has no chat template; leave --chat and --system out and give plain text")
    import jinja2

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (jinja2.exceptions.TemplateError, TypeError, KeyError) as problem:
        raise UserError(f"the model's chat template refuses this conversation: {problem}") from problem


class Conversation:
    """Questions and answers in the form of the model's chat template.

    Each answer follows the tokens of the whole conversation, as if it was read anew. What was read is not read again as long as
    its tokens are the first of these.

    Attributes:
      messages: of role and content, all so far; an answer as it was shown.
      reread: how often the whole conversation had to be read again: the template writes earlier turns differently afterwards, an
        answer was cut off by a stop string or has hidden special tokens, or its text has other tokens than those that were made.
    """

    def __init__(self, model: LoadedModel, request: Request = PLAIN, *, system: str = ""):
        self.messages = [{"role": "system", "content": system}] if system else []
        self.reread = 0
        self._model, self._request = model, request
        self._session = new_session(model, request)
        self._answer: Answer | None = None

    def ask(self, question: str) -> Answer:
        """The answer to a question, in pieces as they are made; it may be left off before its end.

        Raises:
          UserError: see :func:`chat_text` and :func:`continue_text`.
        """
        if self._answer is not None:
            self.messages.append({"role": "assistant", "content": self._answer.text})
            self._answer = None
        self.messages.append({"role": "user", "content": question})
        tokens = prompt_tokens(self._model, chat_text(self._model.tokenizer, self.messages))
        kept = self._session.tokens
        if kept and (len(kept) >= len(tokens) or tokens[: len(kept)] != kept):
            self.reread += 1
            self._session = new_session(self._model, self._request)
        self._answer = Answer(self._model, self._session, tokens[len(self._session.tokens) :], self._request)
        return self._answer
