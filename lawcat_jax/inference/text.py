"""Continue texts and conversations with a loaded model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lawcat_jax.data.tokenize import Tokenizer, bos_rule, decode, encode, encode_prompt, stream_text
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
      stop: an answer ends before the first of these strings.
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


def cut(text: str, stop: Sequence[str]) -> str:
    """``text`` before the first of the strings."""
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]


def stopped(tokenizer: Tokenizer, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """What :func:`lawcat_jax.inference.generation.generate` takes as ``stop``: whether one of the strings was made."""
    if not stop:
        return None

    def call(tokens: Sequence[int]) -> bool:
        text = decode(tokenizer, tokens)
        return any(word in text for word in stop)

    return call


def before_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first of the strings; text is held back while it may be the start of one."""
    held = ""
    for piece in pieces:
        held += piece
        shown = cut(held, stop)
        if len(shown) < len(held):
            if shown:
                yield shown
            return
        starts = (n for word in stop for n in range(1, len(word)) if held.endswith(word[:n]))
        safe = len(held) - max(starts, default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


class Answer:
    """Pieces of the text of one answer, as they are made.

    Attributes:
      text: what was given so far.
      read, made: tokens of the prompt that were read for it, and of the answer so far.
      nbytes: what the model remembers, in bytes.
    """

    def __init__(self, model: LoadedModel, session: Session, tokens: Sequence[int], request: Request):
        self.text, self.read, self.made = "", len(tokens), 0
        self._session, self._times = session, []
        before = [*session.tokens, *tokens][-8:]  # what the first token may need to be spelt right
        made = session.stream(
            tokens,
            max_new_tokens=request.new_tokens(model, len(session.tokens) + len(tokens)),
            eos_ids=model.eos_ids,
            sampling=request.sampling,
        )
        self._pieces = before_stop(stream_text(model.tokenizer, self._counted(made), context=before), request.stop)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    @property
    def nbytes(self) -> int:
        return self._session.nbytes

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.made += 1
            self._times.append(time.monotonic())
            yield token

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
      session: what was read and made before, to which the text is appended; a new one if there is none.

    Raises:
      UserError: at once, for a prompt of no tokens, or one that is too long for softmax attention; else as
        :func:`lawcat_jax.inference.generation.generate`.
    """
    if session is None:
        session = new_session(model, request)
    first = not session.tokens
    return Answer(model, session, prompt_tokens(model, prompt) if first else encode(model.tokenizer, prompt), request)


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
    import jinja2

    if not has_chat_template(tokenizer):
        raise UserError("this model has no chat template; leave --chat and --system out and give plain text")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (jinja2.exceptions.TemplateError, TypeError, KeyError) as problem:
        raise UserError(f"the model's chat template refuses this conversation: {problem}") from problem


class Conversation:
    """Questions and answers in the form of the model's chat template. What was read is not read again.

    Attributes:
      messages: of role and content, all so far.
      reread: how often the whole conversation had to be read again, because the template writes earlier turns
        differently afterwards.
    """

    def __init__(self, model: LoadedModel, request: Request = PLAIN, *, system: str = ""):
        self.messages = [{"role": "system", "content": system}] if system else []
        self.reread = 0
        self._model, self._request = model, request
        self._session, self._seen, self._answer = new_session(model, request), "", None

    def ask(self, question: str) -> Answer:
        """The answer to a question, in pieces as they are made; it may be left off before its end.

        Raises:
          UserError: see :func:`chat_text` and :func:`continue_text`.
        """
        self._finish()
        self.messages.append({"role": "user", "content": question})
        text = chat_text(self._model.tokenizer, self.messages)
        if self._session.tokens and text.startswith(self._seen):
            tokens = encode(self._model.tokenizer, text[len(self._seen) :])
        else:
            if self._session.tokens:
                self.reread += 1
                self._session = new_session(self._model, self._request)
            tokens = prompt_tokens(self._model, text)
        self._answer = Answer(self._model, self._session, tokens, self._request)
        self._seen, self._start = text, len(self._session.tokens)
        return self._answer

    def _finish(self) -> None:
        """Write down what the model has said. Its end token is compared as the template spells it."""
        if self._answer is None:
            return
        tokenizer, made = self._model.tokenizer, self._session.tokens[self._start :]
        ended = made[-1:] if made and made[-1] in self._model.eos_ids else []
        said = decode(tokenizer, made[: len(made) - len(ended)])
        self.messages.append({"role": "assistant", "content": said})
        self._seen += said + tokenizer.decode(ended, skip_special_tokens=False)
        self._answer = None
