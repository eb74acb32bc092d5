"""Rows of instruction data as conversations: what a row says is honoured, or the row is refused by file, row and field.

Forms: ``messages`` of ``role`` and ``content`` (or ``conversations`` of ``from`` and ``value``), with an optional ``system`` or
``system_prompt`` beside them; or ``instruction``, ``input`` (optional) and ``output``, with an optional ``system`` and ``history``
(pairs of a question and its answer). A message's ``weight`` (a number) and ``train``, ``training`` or ``loss`` (a switch) say how
much its answer counts; a row's ``weight`` is a factor on all of its answers. ``prompt`` and ``text`` may repeat what a row says.

A field may change what should be learnt (``chosen``, ``tools``, ``images``, ``label``, ...), so one that is not known to be a
mere note is refused; a field without a value (null or empty) is none. The user may name more notes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from lawcat_jax.data.documents import rows
from lawcat_jax.data.source_files import say_once
from lawcat_jax.errors import UserError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
_ALPACA = ("instruction", "input", "output")
_TURNS = ("messages", "conversations")
_SYSTEM = ("system", "system_prompt")
_ON_INPUTS = ("train_on_input", "train_on_inputs")
_COPIES = ("prompt", "text")  # what many data sets add to a row: its first question, or all of it as one text
_SWITCHES = ("train", "training", "loss")
_ROW = {*_ALPACA, *_TURNS, *_SYSTEM, *_ON_INPUTS, *_COPIES, "history", "weight"}
_MESSAGE = {"role", "from", "content", "value", "weight", *_SWITCHES}
# Notes about a row or message, in lower case, which say nothing of what is to be learnt from it.
_NOTES = set(
    """
    id _id uid uuid guid idx index row row_id number hash md5 sha256 conversation_id prompt_id message_id parent_id
    source sources dataset dataset_name origin subset task task_id task_name task_type category categories subcategory domain topic
    topics subject type tag tags language lang locale model model_name model_id generator author annotator annotators title url urls
    license licence date time timestamp created created_at updated_at version difficulty level quality score scores rating views
    length num_turns turn_count num_tokens n_tokens token_count meta metadata info notes comment comments avatarurl
    """.split()  # noqa: SIM905
)
_LARGEST = 1e9  # of a weight; products of two stay within float32
_TOOLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message. ``role``: system, user or assistant; ``weight``: how much an answer counts, 0 for all others."""

    role: str
    content: str
    weight: float


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The messages of a row, ending with the last answer. ``where``: file and row; ``alpaca``: instruction, input and output
    where the row holds nothing else, else None."""

    where: str
    turns: tuple[Turn, ...]
    alpaca: tuple[str, str, str] | None = None

    @property
    def learnt(self) -> bool:
        """Whether an answer counts, and none that counts is empty."""
        counted = [turn.content.strip() for turn in self.turns if turn.weight]
        return bool(counted) and all(counted)


def conversations(source: str, limit: int | None = None, notes: Collection[str] = ()) -> Iterator[Conversation]:
    """Conversations of a source (.jsonl, .parquet, ``hf:<name>[:config][:split]``), of its first ``limit`` rows. Rows with
    nothing to learn from are passed over; how many there were is printed at the end.

    Args:
      source: as above.
      limit: None is no limit.
      notes: further fields of rows and messages that are ignored.

    Raises:
      UserError: naming the source, the row and the field that is not understood.
    """
    passed: list[str] = []
    for number, (where, row) in enumerate(rows(source)):
        if limit is not None and number >= limit:
            break
        found = read_row(row, where, notes)
        if found.learnt:
            yield found
        else:
            passed.append(where)
    if passed:
        count = "1 row" if len(passed) == 1 else f"{len(passed)} rows"
        say_once(
            f"instruction data {source!r}: {count} passed over, with an empty answer or none of a weight above 0 (for example "
            f"{passed[0]})"
        )


def read_row(row: Mapping[str, Any], where: str = "row", notes: Collection[str] = ()) -> Conversation:
    """The conversation of a row; see the module for what it may hold, :func:`conversations` for ``notes``.

    Raises:
      UserError: naming ``where`` and the field that is missing, of a wrong type, not known, or contradicts another.
    """
    return _Row(row, where, notes).read()


def _is_given(name: str, value: Any) -> bool:
    """Whether a field has a value; lists of tools are often JSON within a text."""
    if name in _TOOLS and value in ("[]", "{}", "null"):
        return False
    return value is not None and not (isinstance(value, str | list | tuple | dict) and len(value) == 0)


class _Row:
    def __init__(self, row: Mapping[str, Any], where: str, notes: Collection[str]):
        self._where, self._notes = where, notes
        self._given = {name: value for name, value in row.items() if name not in notes}
        self._names = list(row)

    def _fail(self, text: str) -> NoReturn:
        raise UserError(f"instruction data {self._where}: {text}")

    def read(self) -> Conversation:
        row = {name: value for name, value in self._given.items() if _is_given(name, value)}
        forms = [name for name in _TURNS if name in row]
        single = [name for name in _ALPACA if name in row]
        if not forms and not {"instruction", "output"} <= self._given.keys():
            self._fail(
                "expected instruction and output, or messages with an assistant's answer; "
                f"it has {', '.join(map(str, self._names)) or 'nothing'}"
            )
        self._refuse_unknown(row, _ROW, "field")
        if len(forms) > 1 or (forms and single):
            self._fail(f"it holds both {(single or forms[1:])[0]!r} and {forms[0]!r}; leave one of them out")
        if forms and "history" in row:
            self._fail(f"'history' goes with instruction and output, not with {forms[0]!r}; leave it out")
        alpaca = None
        if forms:
            turns = self._messages(row[forms[0]], forms[0])
        else:
            turns, alpaca = self._instruction(row)
        turns = self._system(row, turns)
        while turns and turns[-1].role != "assistant":
            turns.pop()
        if not turns:
            self._fail("expected instruction and output, or messages with an assistant's answer; it has no answer")
        self._refuse_training_on_inputs(row)
        self._refuse_other_copies(row, [turn.content for turn in turns], alpaca or ())
        factor = self._weight(row.get("weight"), "'weight'")
        turns = [dataclasses.replace(turn, weight=turn.weight * factor) for turn in turns]
        return Conversation(self._where, tuple(turns), alpaca if len(turns) == 2 else None)

    def _refuse_unknown(self, values: Mapping[str, Any], known: Collection[str], what: str) -> None:
        tools = [name for name in values if name in _TOOLS]
        if tools:
            self._fail(f"{what} {tools[0]!r}: calls of tools are not supported; leave these rows out")
        odd = [name for name in values if name not in known and str(name).lower() not in _NOTES]
        if odd:
            self._fail(
                f"{what} {odd[0]!r} is not known, and may change what is to be learnt; leave it out, or name it in the stage's "
                "data.ignored_fields"
            )

    def _text(self, value: Any, name: str) -> str:
        """A text, or the texts of a list of parts, one after another as chat templates write them."""
        if isinstance(value, list) and all(isinstance(part, dict) for part in value):
            parts = [{key: inner for key, inner in part.items() if _is_given(key, inner)} for part in value]
            odd = [part for part in parts if part.keys() - {"text"} != {"type"} or part["type"] != "text"]
            if odd:
                kind = odd[0].get("type", "of no type")
                self._fail(f"{name} has a part that is no text ({str(kind)[:40]}); leave these rows out")
            return "".join(self._text(part.get("text", ""), name) for part in parts)
        if not isinstance(value, str):
            self._fail(f"{name} holds {_shown(value)}, not text")
        return value

    def _instruction(self, row: Mapping[str, Any]) -> tuple[list[Turn], tuple[str, str, str]]:
        given = {
            "input": "",
            **{name: value for name, value in self._given.items() if name != "input" or value is not None},
        }
        for name in _ALPACA:
            if not isinstance(given[name], str):
                self._fail(f"field {name!r} holds {_shown(given[name])}, not text")
        instruction, extra, output = (given[name] for name in _ALPACA)
        if not (instruction.strip() or extra.strip()):
            self._fail("field 'instruction' is empty")
        turns = self._history(row["history"]) if "history" in row else []
        question = "\n\n".join(filter(None, (instruction, extra)))
        return [*turns, Turn("user", question, 0.0), Turn("assistant", output, 1.0)], (instruction, extra, output)

    def _history(self, value: Any) -> list[Turn]:
        pairs = value if isinstance(value, list | tuple) else [value]
        turns = []
        for number, pair in enumerate(pairs, 1):
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                self._fail(
                    f"field 'history': entry {number} is {_shown(pair)}, not a pair of a question and its answer"
                )
            turns += [Turn("user", pair[0], 0.0), Turn("assistant", pair[1], 1.0)]
        return turns

    def _messages(self, value: Any, name: str) -> list[Turn]:
        if not isinstance(value, list | tuple):
            self._fail(f"field {name!r} holds {_shown(value)}, not a list of messages")
        return [self._turn(turn, f"message {number}") for number, turn in enumerate(value, 1)]

    def _turn(self, turn: Any, name: str) -> Turn:
        if not isinstance(turn, dict):
            self._fail(f"{name} is {_shown(turn)}: a message needs role and content (or from and value)")
        turn = {key: value for key, value in turn.items() if key not in self._notes}
        values = {key: value for key, value in turn.items() if _is_given(key, value)}
        self._refuse_unknown(values, _MESSAGE, f"{name}: field")
        role, content = (self._either(turn, pair, name) for pair in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or content is None:
            self._fail(f"{name}: a message needs role and content (or from and value)")
        known = _ROLES.get(role.strip().lower())
        if known is None:
            self._fail(f"{name}: role {role[:40]!r} is not supported, only {', '.join(_ROLES)}; leave these rows out")
        text, weight = self._text(content, name), self._weight(values.get("weight"), f"{name}: 'weight'")
        for switch in _SWITCHES:
            weight *= self._switch(values.get(switch, True), f"{name}: {switch!r}")
        stated = any(key in values for key in ("weight", *_SWITCHES))
        if known != "assistant" and stated and weight:
            self._fail(f"{name}: a {known} message has a weight of {weight:g}, but only answers are learnt from")
        return Turn(known, text, weight if known == "assistant" else 0.0)

    def _either(self, values: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
        """The value of the one of several names of a field that is there."""
        found = [values[name] for name in names if values.get(name) is not None]
        if any(value != found[0] for value in found):
            self._fail(f"{where}: {' and '.join(names)} differ; leave one of them out")
        return found[0] if found else None

    def _system(self, row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
        system = self._either(row, _SYSTEM, "the row")
        if system is None:
            return turns
        text = self._text(system, "field 'system'")
        if turns and turns[0].role == "system":
            if turns[0].content.strip() != text.strip():
                self._fail("its 'system' differs from the system message that it begins with; leave one of them out")
            return turns
        return [Turn("system", text, 0.0), *turns]

    def _weight(self, value: Any, name: str) -> float:
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
            self._fail(f"{name} is {_shown(value)}, not a number from 0 to {_LARGEST:g}")
        return float(value)

    def _switch(self, value: Any, name: str) -> bool:
        if value not in (True, False):  # also 0 and 1
            self._fail(f"{name} is {_shown(value)}, not true or false")
        return bool(value)

    def _refuse_training_on_inputs(self, row: Mapping[str, Any]) -> None:
        for name in _ON_INPUTS:
            if name in row and self._switch(row[name], repr(name)):
                self._fail(
                    f"{name!r} is true: set the stage's data.prompt_weight for all rows instead, and leave it out"
                )

    def _refuse_other_copies(self, row: Mapping[str, Any], said: Sequence[str], parts: Sequence[str]) -> None:
        """``parts``: what a text must hold instead of all that is ``said``, where a question is put together."""
        said, parts = ([text.strip() for text in texts] for texts in (said, parts or said))
        for name in (name for name in _COPIES if name in row):
            value = row[name].strip() if isinstance(row[name], str) else ""
            if value not in said and not (value and all(text in value for text in parts)):
                self._fail(
                    f"field {name!r} is no copy of what the row says; leave it out, or name it in data.ignored_fields"
                )


def _shown(value: Any) -> str:
    """A value and its type, in few characters."""
    if value is None:
        return "null"
    return f"{json.dumps(value, default=str)[:40]} (of type {type(value).__name__})"
