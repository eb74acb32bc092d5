"""Prompts from a JSONL file, answers to a JSONL file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lawcat_jax.errors import UserError
from lawcat_jax.files import atomic_file, object_of
from lawcat_jax.inference.generation import generate
from lawcat_jax.inference.loading import LoadedModel
from lawcat_jax.inference.text import PLAIN, AnswerText, Request, chat_text, prompt_tokens

_MADE = ("answer", "tokens", "finish")
"""Fields that a row gets."""
_SETTINGS = frozenset(
    """
    system temperature top_k top_p min_p repetition_penalty frequency_penalty presence_penalty logit_bias stop seed n
    max_tokens max_new_tokens max_completion_tokens min_tokens do_sample num_beams tools tool_choice functions function_call
    response_format
    """.split()  # noqa: SIM905
)
"""Fields of a row that other programs take for settings: here the command line has them, for all rows."""


class Row(NamedTuple):
    """An object of a JSONL file: ``text`` as it was written, to which the answer is added, and its ``fields``."""

    text: str
    fields: dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL file: objects with ``prompt``, a text, or ``messages``, a conversation of role and content.

    Raises:
      UserError: naming the line that is neither, that ends with an answer, that has a key twice, that asks with half a
        character, or that has a field which the answers would replace, or that would be taken for a setting; or a file that
        cannot be read or has none.
    """
    rows = list(_rows(Path(path)))
    if not rows:
        raise UserError(f"{path}: no prompts in it")
    return rows


def _rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror or problem}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            text = line.decode()
            row = json.loads(
                text,
                object_pairs_hook=object_of,
                parse_int=float,  # of numbers only the type is looked at, and int() refuses the longest
                parse_constant=_no_number,
            )
        except (ValueError, RecursionError) as problem:
            raise UserError(f"{where}: not valid JSON ({problem})") from None
        asks = isinstance(row, dict) and isinstance(row.get("prompt"), str) != ("messages" in row)
        if not asks or row.get("messages") == []:
            raise UserError(f"{where}: expected an object with either prompt, a text, or messages, a list")
        taken = [name for name in _MADE if name in row]
        if taken:
            raise UserError(
                f"{where}: has {', '.join(taken)} already, which the answer would replace; rename or remove "
                f"{'it' if len(taken) == 1 else 'them'}"
            )
        settings = [name for name in row if name in _SETTINGS and row[name] not in (None, "", [], {})]
        if settings:
            raise UserError(
                f"{where}: field {settings[0]!r} would have no effect, since what the command line says holds for all rows; remove it, "
                "or give it another name"
            )
        turns = row.get("messages", [])
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns
        ):
            raise UserError(f"{where}: messages is a list of objects with role and content, both text")
        if turns and turns[-1]["role"] == "assistant":
            raise UserError(
                f"{where}: the last message is the assistant's, and there is nothing to answer; end with the user's"
            )
        odd = [name for turn in turns for name, value in turn.items() if name not in ("role", "content") and value]
        if odd:
            raise UserError(
                f"{where}: a message has {odd[0]!r}, which would be left out; only role and content are read"
            )
        for said in (row.get("prompt", ""), *(turn[name] for turn in turns for name in ("role", "content"))):
            if half := isinstance(said, str) and re.search("[\ud800-\udfff]", said):
                raise UserError(
                    f"{where}: half a character ({half[0]!r}) in what is asked; put in the other half, or remove it"
                )
        # Line ends within an object can only stand between its fields.
        yield Row(text.strip().replace("\r", " "), row)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def answer_file(
    model: LoadedModel,
    rows: list[Row],
    output: str | Path,
    request: Request = PLAIN,
    *,
    chat: bool = False,
    system: str = "",
    batch_size: int = 8,
) -> int:
    """Write each row, as it was written, with its ``answer``, the number of its ``tokens`` (those of the end token or stop
    string included), and why it ended, ``finish``: "end" (the model's end token), "stop" (a stop string) or "length". The file
    appears when all are there.

    Args:
      rows: see :func:`read_rows`. ``messages`` are written by the model's chat template.
      output: the file.
      request: how answers are made. Its default length is what the longest prompt leaves room for.
      chat: a ``prompt`` is a question in a conversation too, behind ``system`` if there is one.
      batch_size: answers made together.

    Returns:
      Tokens of all answers.

    Raises:
      UserError: as :func:`lawcat_jax.inference.text.continue_text`, or the file cannot be written.
    """
    prompts = [prompt_tokens(model, _prompt(model, row.fields, chat, system)) for row in rows]
    texts = [AnswerText(model.tokenizer, prompt, request.stop) for prompt in prompts]
    total = 0
    with atomic_file(output) as out:  # before the answers are made, which would be lost if it cannot be written
        answers = generate(
            model.graphdef,
            model.params,
            prompts,
            max_new_tokens=min(request.new_tokens(model, len(prompt)) for prompt in prompts),
            eos_ids=model.eos_ids,
            sampling=request.sampling,
            stop=(lambda number, tokens: texts[number].extend(tokens)) if request.stop else None,
            as_teacher=request.softmax(model),
            batch_size=min(batch_size, len(prompts)),
        )
        for row, tokens, text in zip(rows, answers, texts, strict=True):
            text.extend(tokens)
            text.finish()
            finish = "stop" if text.stopped else "end" if tokens[-1] in model.eos_ids else "length"
            total += text.made  # fewer than ``tokens``, which go on until somebody looks
            made = json.dumps({"answer": text.text, "tokens": text.made, "finish": finish}, ensure_ascii=False)
            # Put together as texts: read and written anew, 1e400 or half a character would be others, or fail.
            out.write(f"{row.text.removesuffix('}').rstrip()}, {made.removeprefix('{')}\n")
    return total


def _prompt(model: LoadedModel, row: dict[str, Any], chat: bool, system: str) -> str:
    turns = row.get("messages") or ([{"role": "user", "content": row["prompt"]}] if chat else None)
    if turns is None:
        return row["prompt"]
    own = any(turn["role"] == "system" for turn in turns)
    return chat_text(model.tokenizer, turns if own or not system else [{"role": "system", "content": system}, *turns])
