"""The three configurations of a model as JSON, as every file format of this project stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lawcat_jax.config import (
    AttentionConfig,
    ConfigError,
    LoraConfig,
    ModelConfig,
    attention_problems,
    from_dict,
    model_problems,
    to_dict,
    type_problems,
)
from lawcat_jax.errors import UserError

Configs = tuple[ModelConfig, AttentionConfig | None, LoraConfig | None]


def configs_to_json(model: ModelConfig, attention: AttentionConfig | None, lora: LoraConfig | None) -> dict[str, Any]:
    """``{"model": ..., "attention": ..., "lora": ...}``; the latter two are None for a teacher."""
    optional = {"attention": attention, "lora": lora}
    return {"model": to_dict(model)} | {k: None if v is None else to_dict(v) for k, v in optional.items()}


def configs_from_json(values: Mapping[str, Any], where: str) -> Configs:
    """The inverse of :func:`configs_to_json`; other keys are ignored.

    Args:
      values: a parsed JSON object.
      where: file that it comes from, for messages.

    Raises:
      UserError: a section is missing or no object, or has unknown or invalid fields.
    """
    kinds = {"model": ModelConfig, "attention": AttentionConfig, "lora": LoraConfig}
    parsed: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = values.get(name)
        if value is None and name != "model":
            parsed[name] = None
            continue
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name} should be an object")
        try:
            parsed[name] = from_dict(kind, value, name)
        except (ConfigError, TypeError) as problem:
            raise UserError(f"{where}: {problem}") from None
        problems = type_problems(parsed[name], name)
        if not problems:
            checks = {"model": model_problems, "attention": attention_problems}
            problems = checks[name](parsed[name], name) if name in checks else []
        if problems:
            raise UserError(f"{where}: {'; '.join(problems)}")
    return parsed["model"], parsed["attention"], parsed["lora"]
