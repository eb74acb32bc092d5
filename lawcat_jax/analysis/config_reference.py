"""Writes ``docs/config.md``, the list of all configuration fields:

    python -m lawcat_jax.analysis.config_reference > docs/config.md

Everything in it comes from ``lawcat_jax.config``: fields, types and defaults from the dataclasses, meanings from the
string below each field, units from the square brackets that the string begins with, options from the Literal types.
Needs no jax.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from lawcat_jax.config import Config, choices
from lawcat_jax.config.tree import options, type_name

HEAD = """# Configuration

All fields of a run's configuration. Generated from `lawcat_jax/config/` by
`python -m lawcat_jax.analysis.config_reference > docs/config.md`; a test fails when this file is not what that command
writes.

A config file is a Python file whose `get_config()` returns a `lawcat_jax.config.Config`; the files in `configs/` are
examples, and `--config=file.py:name` passes `name` to `get_config`. Any field is overridden on the command line:

| kind of value | example |
|---|---|
| number, text | `--config.stage1.learning_rate=3e-3`, `--config.teacher.source=/models/llama` |
| yes or no | `--config.dry_run`, `--noconfig.log.tensorboard` |
| name from a list | `--config.stage1.schedule=plateau` |
| tuple | `--config.eval.lengths=256,512`, `--config.eval.tasks=passkey,perplexity` |
| tuple of patterns | `--config.stage2.trainable="('^lora/', '^mixers/')"` |
| no value | `--config.attention.gate_lower_bound=None` |
| a config that is None | `--config.teacher.architecture=build`, then `--config.teacher.architecture.head_dim=32` |

A field that does not exist, a value of the wrong type and a value that cannot be are refused before anything is loaded,
in files and on the command line. Where a unit is 1, the number has none.
"""


class Field(NamedTuple):
    """One row: the default is Python source; ``unit`` is empty for what is not a number."""

    name: str
    hint: Any
    unit: str
    default: str
    meaning: str


@functools.cache
def _strings(module: str) -> dict[str, str]:
    """``Class.field`` or ``Name`` -> the string below its assignment, as one line, in a module's source."""
    found = {}

    def read(body: list[ast.stmt], prefix: str) -> None:
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.ClassDef):
                read(statement.body, f"{statement.name}.")
            target = statement.target if isinstance(statement, ast.AnnAssign) else None
            if isinstance(statement, ast.Assign):
                target = statement.targets[0]
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(target, ast.Name) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[prefix + target.id] = " ".join(text.value.split())

    read(ast.parse(inspect.getsource(importlib.import_module(module))).body, "")
    return found


def fields(kind: type) -> list[Field]:
    """The rows of one config class, in order.

    Raises:
      ValueError: a field has no string below it, or a number none that begins with its unit in brackets.
    """
    strings, hints, rows = _strings(kind.__module__), typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        name, hint = f"{kind.__name__}.{field.name}", hints[field.name]
        text = strings.get(name)
        if text is None:
            raise ValueError(f"{name}: write a string below the field that says what it is")
        found = re.fullmatch(r"(?:\[([^]]+)\] )?(.*)", text)
        assert found is not None  # any single line matches
        unit, meaning = found.groups()
        if (unit is None) == bool(re.search(r"\b(int|float)\b", type_name(hint))):
            raise ValueError(
                f"{name}: numbers, and only they, begin with their unit in brackets, [1] if they have none"
            )
        default = "" if field.default is dataclasses.MISSING else repr(field.default)
        rows.append(Field(field.name, hint, unit or "", default, meaning))
    return rows


def _node(hint: Any) -> type | None:
    """The config class of a field that holds one, be it optional."""
    for option in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(option):
            return typing.cast(type, option)
    return None


def places(kind: type, path: str = "config") -> Iterator[tuple[str, type]]:
    """(path, class) of every config below ``kind`` and of itself, in the order of the fields."""
    yield path, kind
    for name, hint in typing.get_type_hints(kind).items():
        if (inner := _node(hint)) is not None:
            several = typing.get_origin(hint) is tuple
            yield from places(inner, f"{path}.{name}{'[i]' if several else ''}")


def _choices() -> dict[str, Any]:
    return {name: value for name, value in vars(choices).items() if options(value)}


def _type_cell(hint: Any) -> str:
    if (kind := _node(hint)) is not None and typing.get_origin(hint) is not tuple:
        return f"[{kind.__name__}](#{kind.__name__.lower()})" + (" or None" if kind is not hint else "")
    named = {str(value): name for name, value in _choices().items()}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if str(hint) in named:
        return f"[{named[str(hint)]}](#{named[str(hint)].lower()})"
    if origin is tuple:
        return f"tuple of {_type_cell(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_cell(argument) for argument in arguments)
    return type_name(hint)


def _code(text: str) -> str:
    """The double backquotes of docstrings as Markdown's single ones."""
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table, where bars must be escaped."""
    return _code(text).replace("|", "\\|")


def _other_defaults(path: str, kind: type) -> str:
    """Defaults that the config at ``path`` of a fresh Config has instead of its class's, or nothing."""
    if path.endswith("[i]"):  # an element of a tuple, which is empty at first
        return ""
    node: Any = Config()
    for name in path.split(".")[1:]:
        node = getattr(node, name)
        if node is None:
            return ""
    standard = kind()
    changed = [name for name in vars(standard) if getattr(node, name) != getattr(standard, name)]
    return ", ".join(f"`{name}={getattr(node, name)!r}`" for name in changed)


def reference() -> str:
    """The text of ``docs/config.md``."""
    where: dict[type, list[str]] = {}
    for path, kind in places(Config):
        where.setdefault(kind, []).append(path)
    lines = [HEAD]
    for kind, paths in where.items():
        lines += [f"## {kind.__name__}", "", ", ".join(f"`{path}`" for path in paths), ""]
        lines += [_code(" ".join((inspect.getdoc(kind) or "").split())), ""]
        lines += ["| field | type | unit | default | meaning |", "|---|---|---|---|---|"]
        for row in fields(kind):
            default = f"`{row.default}`" if row.default else ""
            cells = (f"`{row.name}`", _type_cell(row.hint), row.unit, default, row.meaning)
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
        lines.append("")
        for path in paths:
            if text := _other_defaults(path, kind):
                lines += [f"Other defaults in `{path}`: {text}.", ""]
    lines += ["## Names", ""]
    for name, value in _choices().items():
        names = ", ".join(f"`{option}`" for option in typing.get_args(value))
        lines += [f"### {name}", "", f"{names}. {_code(_strings(choices.__name__)[name])}", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")
