"""Instruction data: conversations as samples whose loss counts on the answers.

Rows are in Alpaca's form (``instruction``, ``input``, ``output``) or chat form (``messages`` of ``role`` and ``content``, or
``conversations`` of ``from`` and ``value``). A tokenizer with a chat template writes them through it; without one,
Alpaca-form rows take the prompt that Stanford Alpaca published.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lawcat_jax.config.choices import Bos
from lawcat_jax.data import text as text_data
from lawcat_jax.data.tokenize import Tokenizer, encode_offsets, opening
from lawcat_jax.errors import UserError

Message = dict[str, str]  # "role": "system" | "user" | "assistant"; "content"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def conversations(source: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a source (.jsonl, .parquet, ``hf:<name>[:config][:split]``), the first ``limit``.

    Raises:
      UserError: naming the source and the row that is in neither form.
    """
    for number, (where, row) in enumerate(text_data.rows(source)):
        if limit is not None and number >= limit:
            return
        messages(row, where)  # a bad row fails here, not in the middle of a run
        yield row


def messages(row: dict[str, Any], where: str = "row") -> list[Message]:
    """The messages of a row, ending with the last answer; an Alpaca row gives one question and one answer.

    Raises:
      UserError: for a row in neither form, or without an answer.
    """
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        extra = row.get("input") or ""
        question = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    turns = row.get("messages") or row.get("conversations")
    if row.get("tools") or any(isinstance(turn, dict) and turn.get("tool_calls") for turn in turns or ()):
        raise UserError(f"instruction data {where}: calls of tools are not supported; leave these rows out")
    found = []
    for turn in turns if isinstance(turns, list | tuple) else ():
        role, content = (
            (turn.get("role") or turn.get("from"), turn["content"] if "content" in turn else turn.get("value"))
            if isinstance(turn, dict)
            else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"instruction data {where}: a message needs role and content (or from and value)")
        found.append({"role": _ROLES.get(role, role), "content": content})
    while found and found[-1]["role"] != "assistant":
        found.pop()
    if not found:
        raise UserError(
            f"instruction data {where}: expected instruction and output, or messages with an assistant's answer; "
            f"it has {', '.join(map(str, row)) or 'nothing'}"
        )
    return found


def encode_conversation(
    tokenizer: Tokenizer, row: dict[str, Any], *, add_bos: bool | Bos = True
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [n], answers bool [n]): which tokens belong to an answer, the mark that ends it included.

    The text is what the chat template writes (a template that writes bos itself gets no second one), or Alpaca's prompt,
    the answer and eos.

    Raises:
      UserError: for chat rows without a chat template, or a template that rewrites earlier turns.
    """
    turns = messages(row)
    spans: list[tuple[int, int]] = []
    if getattr(tokenizer, "chat_template", None):
        text = _templated(tokenizer, turns)
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = _templated(tokenizer, turns[:number], add_generation_prompt=True)
            after = _templated(tokenizer, turns[: number + 1])
            if not text.startswith(before) or not text.startswith(after.rstrip()):
                raise UserError(
                    f"tokenizer {tokenizer.name_or_path!r}: its chat template rewrites earlier turns, so answers cannot be "
                    "told from the prompt"
                )
            spans.append((len(before), len(after.rstrip())))
        closing: list[int] = []
    else:
        if len(turns) != 2 or "instruction" not in row:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: chat rows need one, Alpaca rows do not"
            )
        frame = ALPACA_WITH_INPUT if row.get("input") else ALPACA
        prompt = frame.format(instruction=row["instruction"], input=row.get("input") or "")
        text = f"{prompt}\n{row['output']}"
        spans.append((len(prompt) + 1, len(text)))
        closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoding = encode_offsets(tokenizer, text)
    bos = opening(tokenizer, add_bos, encoding.ids)
    ends = np.asarray([end for _, end in encoding.offsets], np.int64)
    answers = np.zeros(len(ends), bool)
    for start, end in spans:  # a token that reaches into an answer belongs to it
        answers[np.searchsorted(ends, start, side="right") : np.searchsorted(ends, end, side="left") + 1] = True
    tokens = np.asarray([*bos, *encoding.ids, *closing], np.int32)
    return tokens, np.asarray([*[False] * len(bos), *answers, *[True] * len(closing)], bool)


def _templated(tokenizer: Tokenizer, turns: list[Message], add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
