"""What all config classes have in common: unknown fields are refused, values are checked against types, JSON in and out."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot run. The message lists every problem found, one per line."""


class Node:
    """Base of the config dataclasses. Setting or passing a field that does not exist is an error.

    Raises:
      ConfigError: names the class, the field and the nearest existing one.
    """

    def __new__(cls, *_: Any, **values: Any) -> Any:
        for name in values:
            _refuse_unknown(cls, name)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__"):  # __class__: models make hashable copies
            _refuse_unknown(type(self), name)
        object.__setattr__(self, name, value)


def _refuse_unknown(kind: type, name: str) -> None:
    fields = field_names(kind)
    if name not in fields:
        raise ConfigError(f"{kind.__name__} has no field {name!r}{nearest(name, fields)}")


def field_names(kind: type) -> list[str]:
    """Names of the fields of a config class, in order."""
    return [field.name for field in dataclasses.fields(kind)]


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean '...'?`` with the name of ``known`` that looks most like ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def options(hint: Any) -> tuple | None:
    """The values that a Literal type allows, with None for an optional one; None for any other type."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        literal = [values for values in map(options, typing.get_args(hint)) if values]
        return (*literal[0], None) if literal else None
    return None


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is Literal:  # which of the names it may be is for choice_problems
        return isinstance(value, str)
    if hint is type(None):
        return value is None
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple | list) and all(_matches(element, item) for element in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """A type as a person writes it: ``float``, ``str or None``, ``tuple of int``; a name from a list of options is
    ``str``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "str"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"tuple of {type_name(arguments[0])}"
    return "None" if hint is type(None) else hint.__name__


def type_problems(node: Any, path: str) -> list[str]:
    """Every field of the dataclass tree ``node`` whose value does not have its annotated type."""
    problems = []
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, hint, name = getattr(node, field.name), hints[field.name], f"{path}.{field.name}"
        if dataclasses.is_dataclass(value) and _matches(value, hint):
            problems += type_problems(value, name)
        elif not _matches(value, hint):
            shown, allowed = type(value).__name__ if dataclasses.is_dataclass(value) else repr(value), options(hint)
            wanted = f"one of {', '.join(map(repr, allowed))}" if allowed else f"a {type_name(hint)}"
            problems.append(f"{name}: {shown} is not {wanted}")
    return problems


def choice_problems(node: Any, path: str) -> list[str]:
    """Every field of ``node`` itself that holds a name which its Literal type (or tuple of them) does not list."""
    problems = []
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, hint = getattr(node, field.name), hints[field.name]
        values = (value,)
        if typing.get_origin(hint) is tuple:
            values, hint = value, typing.get_args(hint)[0]
        allowed = options(hint)
        if allowed is None:
            continue
        for item in values:
            if item not in allowed:
                problems.append(f"{path}.{field.name}: {item!r} is not one of {', '.join(map(repr, allowed))}")
    return problems


def limit_problems(node: Any, path: str, limits: Mapping[str, int]) -> list[str]:
    """Every field of ``node`` named in ``limits`` that is, or holds, a number above its limit: more than any machine can
    run, found by looking at it."""
    problems = []
    for name, most in limits.items():
        value = getattr(node, name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number is not None and number > most:
                problems.append(f"{path}.{name}: {number} is more than can be run (at most {most})")
    return problems


def unshare(node: Any) -> None:
    """Replace dataclasses that stand at several places below ``node`` by copies, at all places but the first: changing one
    field then never changes another."""
    seen: set[int] = set()

    def visit(holder: Any) -> None:
        for field in dataclasses.fields(holder):
            value = getattr(holder, field.name)
            if dataclasses.is_dataclass(value):
                if id(value) in seen:
                    value = copy.deepcopy(value)
                    setattr(holder, field.name, value)
                seen.add(id(value))
                visit(value)

    visit(node)


def from_dict(kind: type, values: dict, path: str = "config") -> Any:
    """Rebuild a dataclass tree from plain JSON values.

    Raises:
      ConfigError: for fields that ``kind`` does not have.
    """
    hints = typing.get_type_hints(kind)
    fields = set(field_names(kind))
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ConfigError(f"{path}: unknown field(s) {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
    out = {}
    for name, value in values.items():
        kinds = [hint for hint in (typing.get_args(hints[name]) or (hints[name],)) if dataclasses.is_dataclass(hint)]
        if kinds and isinstance(value, dict):
            value = from_dict(typing.cast(type, kinds[0]), value, f"{path}.{name}")
        elif typing.get_origin(hints[name]) is tuple and isinstance(value, list | tuple):
            value = tuple(
                from_dict(typing.cast(type, kinds[0]), item, f"{path}.{name}[{index}]")
                if kinds and isinstance(item, dict)
                else item
                for index, item in enumerate(value)
            )
        out[name] = value
    return kind(**out)


def to_dict(node: Any) -> dict:
    """Plain JSON values of a dataclass tree (the inverse of :func:`from_dict`)."""
    return dataclasses.asdict(node)
