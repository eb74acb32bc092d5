"""Access to the fields of a Hugging Face ``config.json`` with defaults and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from lawcat_jax.errors import UserError


class Fields:
    """A parsed ``config.json``, with what transformers assumes for fields that it does not state.

    Its methods raise :class:`UserError` with the file and the field.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self._values, self._defaults, self.where = values, defaults, where

    def get(self, name: str, default: Any = None) -> Any:
        """The stated value, else the family's default, else ``default``."""
        return self._values.get(name, self._defaults.get(name, default))

    def states(self, name: str) -> bool:
        """Whether the field has a value other than null, stated or by default."""
        return self.get(name) is not None

    def number(self, name: str) -> int:
        """A whole number."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(f"{name}: {value!r} is not a int")
        return value

    def per_layer(self, name: str) -> list | None:
        """A list with one entry for every layer, or None where the field is null or absent."""
        value, layers = self.get(name), self.number("num_hidden_layers")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < layers:
            self.fail(f"{name} should be a list of {layers} entries, one for each layer, not {str(value)[:80]}")
        return value[:layers]

    def fail(self, problem: str) -> NoReturn:
        """Refuse the file."""
        raise UserError(f"{self.where}: {problem}")
