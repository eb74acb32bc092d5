"""Conversations as tokens whose loss counts on the answers.

A tokenizer with a chat template writes them through it; without one, rows of ``instruction``, ``input`` and ``output`` take the
prompt that Stanford Alpaca published. :mod:`lawcat_jax.data.conversations` says what rows may hold.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lawcat_jax.config.choices import Bos
from lawcat_jax.data.conversations import Conversation, Turn
from lawcat_jax.data.tokenize import Tokenizer, encode_offsets, opening
from lawcat_jax.errors import UserError

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_NO_DATE = "it writes today's date"


class Encoded(NamedTuple):
    """A conversation of n tokens, int32 [n]; ``answers`` bool [n]: which of them belong to an answer, the mark that ends it
    included; ``weights`` float32 [n]: how much each of these counts, 0 for the other tokens."""

    tokens: np.ndarray
    answers: np.ndarray
    weights: np.ndarray


def encode_conversation(
    tokenizer: Tokenizer, conversation: Conversation, *, add_bos: bool | Bos = True, date: str = ""
) -> Encoded:
    """What the chat template writes (one that writes bos itself gets no second one), or Alpaca's prompt, the answer and eos.

    Args:
      tokenizer: with or without a chat template.
      conversation: ends with an answer.
      add_bos: see :func:`lawcat_jax.data.tokenize.opening`.
      date: YYYY-MM-DD, what a template that writes today's date writes instead.

    Raises:
      UserError: a chat without a chat template; a template that refuses the conversation, leaves out a message, rewrites
        earlier turns, or writes today's date where no ``date`` is given.
    """
    turns = conversation.turns
    if getattr(tokenizer, "chat_template", None):
        text, spans = _through_template(tokenizer, conversation, date)
        closing: list[int] = []
    else:
        if conversation.alpaca is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: chats, and rows with a system or history, need "
                f"one (instruction data {conversation.where})"
            )
        instruction, extra, output = conversation.alpaca
        prompt = (ALPACA_WITH_INPUT if extra else ALPACA).format(instruction=instruction, input=extra)
        text = f"{prompt}\n{output}"
        spans = [(len(prompt) + 1, len(text))]
        closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoding = encode_offsets(tokenizer, text)
    bos = opening(tokenizer, add_bos, encoding.ids)
    begins, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
    answers, weights = np.zeros(len(ends), bool), np.zeros(len(ends), np.float32)
    counted = [turn.weight for turn in turns if turn.role == "assistant"]
    for (start, end), weight in zip(spans, counted, strict=True):
        # A token that reaches into an answer belongs to it; all tokens of a character have that character's place.
        span = (ends > start) & (begins < end)
        answers[span], weights[span] = True, weight
    first, last = len(bos), len(closing)
    return Encoded(
        np.asarray([*bos, *encoding.ids, *closing], np.int32),
        np.pad(answers, (first, last), constant_values=(False, True)),
        np.pad(weights, (first, last), constant_values=(0.0, counted[-1])),
    )


def _through_template(tokenizer: Tokenizer, conversation: Conversation, date: str) -> tuple[str, list[tuple[int, int]]]:
    """(text, characters at which each answer begins and ends)."""
    turns, where = conversation.turns, f"tokenizer {tokenizer.name_or_path!r}: its chat template"
    template = _dated(tokenizer, date)

    def rendered(turns: Sequence[Turn], *, asked: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return _rendered(tokenizer, template, messages, asked, f"{where} refuses {conversation.where}")

    text, spans, seen, end = rendered(turns), [], 0, 0
    marks = _marks(turns, text)
    # Of what a message says, the same words may stand elsewhere, in the template's own text too; a mark stands nowhere else.
    marked = rendered([dataclasses.replace(turn, content=mark) for turn, mark in zip(turns, marks, strict=True)])
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        after = rendered(turns[: number + 1]).rstrip()
        if number:
            before = rendered(turns[:number], asked=True)
        else:  # no template writes a conversation without a message
            first = rendered([dataclasses.replace(turn, content=marks[0]), *turns[1:]])
            before, *more = first.split(marks[0])
            if not text.startswith(before) or len(more) > 1:
                raise UserError(
                    f"{where} writes the answer that the conversation begins with twice, or another text in front of it "
                    f"that depends on it, so it cannot be told from the prompt (instruction data {conversation.where})"
                )
        if not text.startswith(before) or not text.startswith(after):
            raise UserError(
                f"{where} rewrites earlier turns, so answers cannot be told from the prompt (instruction data "
                f"{conversation.where})"
            )
        for place in range(seen, number + 1):
            begin, stop = (len(before), len(after)) if place == number else (end, len(before))
            if marks[place] not in marked or not _holds(text[begin:stop], turns[place].content):
                what = {"assistant": "part of an answer", "user": "part of a question"}
                raise UserError(
                    f"{where} leaves out {what.get(turns[place].role, 'the system message')} of instruction data "
                    f"{conversation.where}; leave such rows out"
                )
        spans.append((len(before), len(after)))
        seen, end = number + 1, len(after)
    return text, spans


def _marks(turns: Sequence[Turn], text: str) -> list[str]:
    """A word for each message that stands neither in what is said nor in what the template made of it."""
    mark = "message"
    while any(mark in said for said in (text, *(turn.content for turn in turns))):
        mark += "q"
    return [f"{mark}{number}{mark}" for number in range(len(turns))]


def _holds(text: str, content: str) -> bool:
    """Whether a message stands in a text, white space apart."""
    return "".join(content.split()) in "".join(text.split())


def _rendered(tokenizer: Tokenizer, template: str, messages: list[dict[str, str]], asked: bool, refuses: str) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=asked
        )
    except (jinja2.exceptions.TemplateError, TypeError, KeyError, ValueError) as problem:
        if _NO_DATE in str(problem):
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r}: its chat template writes today's date, and what is trained on must not "
                "depend on the day: set the stage's data.chat_date, such as 2026-01-31"
            ) from None
        raise UserError(f"{refuses}: {' '.join(str(problem).split())[:200]}") from problem


def _dated(tokenizer: Tokenizer, date: str) -> str:
    """The chat template, in which ``strftime_now`` tells the time at the beginning of ``date`` or, without one, refuses.

    It is defined in the template itself: transformers hands no functions to templates.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as problem:  # several, and none of them the default
        reason = str(problem).strip().split("\n")[0]
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: its chat template cannot be used ({reason})"
        ) from problem
    if not writes_date(template):
        return template
    value = f'raise_exception("{_NO_DATE}")'
    if date:
        day = datetime.datetime.fromisoformat(date)
        codes = sorted(set(re.findall(r"%[-_0^#]?[A-Za-z]", template)))
        value = "format" + "".join(f' | replace("{code}", "{day.strftime(code)}")' for code in codes)
    # The empty expression keeps a newline that the template may begin with.
    return f"{{%- macro strftime_now(format) -%}}{{{{ {value} }}}}{{%- endmacro %}}{{{{ '' }}}}{template}"


def writes_date(template: object) -> bool:
    """Whether a chat template, or one of several, asks for today's date."""
    return "strftime_now" in str(template)
