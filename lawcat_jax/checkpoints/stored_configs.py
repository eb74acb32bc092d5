"""The three configurations of a model and what its writer added as JSON, as every file format of this project stores them.

Fields that the first version had must be stated. Those added since have defaults that are what earlier versions did, so that
a file may lack them.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from lawcat_jax.checkpoints.fingerprints import digest
from lawcat_jax.config import (
    AttentionConfig,
    Bos,
    ConfigError,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    RopeScaling,
    attention_problems,
    from_dict,
    lora_problems,
    model_problems,
    to_dict,
    type_problems,
)
from lawcat_jax.errors import UserError

Configs = tuple[ModelConfig, AttentionConfig | None, LoraConfig | None]

_KINDS = {"model": ModelConfig, "attention": AttentionConfig, "lora": LoraConfig}
_PROBLEMS: dict[str, Any] = {"model": model_problems, "attention": attention_problems, "lora": lora_problems}
_READ = ("source", "revision", "stage", "training_length", "add_bos", "eval")  # keys of ``extra``
_ORIGINAL = {
    ModelConfig: "family vocab_size hidden_size num_layers num_heads num_kv_heads head_dim mlp_size rms_norm_eps rope_theta "
    "rope_scaling max_position_embeddings tie_embeddings sliding_window bos_token_id eos_token_ids pad_token_id",
    RopeScaling: "kind factor low_freq_factor high_freq_factor original_max_position_embeddings",
    AttentionConfig: "kind conv conv_size feature_map feature_dim tie_qk normalize rope_linear window_size affine_window "
    "sinks gate_kind gate_rank gate_normalizer gate_lower_bound gate_half_life gate_half_life_max softmax_layers "
    "output_gate init implementation",
    LoraConfig: "rank alpha dropout targets",
}


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
      UserError: a section is missing or no object, or has missing, unknown or impossible fields.
    """
    model, attention, lora = (_config(name, values.get(name), where) for name in _KINDS)
    return model, attention, lora


def extra_from_json(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the writer of a file added under ``extra``: its own keys are checked, all others are kept as they are.

    Args:
      values: a parsed JSON object.
      where: file that it comes from, for messages.

    Raises:
      UserError: no object, or impossible values.
    """
    extra = values.get("extra")
    extra = {} if extra is None else extra
    if not isinstance(extra, dict):
        raise UserError(f"{where}: extra should be an object, not {str(extra)[:80]!r}")
    problems = [
        f"extra.{name}: {extra[name]!r} is not a str"
        for name in ("source", "revision", "stage")
        if not isinstance(extra.get(name), str | None)
    ]
    if extra.get("add_bos") not in (None, *typing.get_args(Bos)):
        problems.append(f"extra.add_bos: {extra['add_bos']!r} is not one of {', '.join(typing.get_args(Bos))}")
    length, stored = extra.get("training_length"), extra.get("eval")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        problems.append(f"extra.training_length: {length!r} is not a number of tokens")
    if not isinstance(stored, dict | None):
        problems.append(f"extra.eval: {str(stored)[:80]!r} is not an object")
    else:
        known = {field.name for field in dataclasses.fields(EvalConfig)}
        settings = {name: value for name, value in (stored or {}).items() if name in known}
        problems += type_problems(from_dict(EvalConfig, settings), "extra.eval")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; correct the file, or remove these")
    return extra


def content_digest(model: ModelConfig, attention: Any, lora: Any, extra: Mapping[str, Any]) -> str:
    """Digest of the configurations and of what of ``extra`` the program reads: notes of the user may be added to it."""
    configs = {"model": model, "attention": attention, "lora": lora}
    read = {name: extra[name] for name in _READ if extra.get(name) is not None}
    return digest([{name: meaning(config) for name, config in configs.items()}, read])


def meaning(config: Any) -> Any:
    """What a configuration says, as values that do not change when later versions add fields to it."""
    if type(config) not in _ORIGINAL:
        return config
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plain, original = type(config)(), _ORIGINAL[type(config)].split()
    return {name: meaning(value) for name, value in fields.items() if name in original or value != getattr(plain, name)}


def _config(name: str, value: Any, where: str) -> Any:
    if value is None and name != "model":
        return None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {name} should be an object")
    try:
        parsed = from_dict(_KINDS[name], value, name)
    except (ConfigError, TypeError) as problem:
        raise UserError(f"{where}: {problem}") from None
    problems = type_problems(parsed, name) or _PROBLEMS[name](parsed, name)
    if missing := _missing(_KINDS[name], value, name):
        problems.append(f"missing: {', '.join(missing)}")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    return parsed


def _missing(kind: type, values: Mapping[str, Any], path: str) -> list[str]:
    missing = [f"{path}.{name}" for name in _ORIGINAL[kind].split() if name not in values]
    if kind is ModelConfig and isinstance(values.get("rope_scaling"), dict):
        missing += _missing(RopeScaling, values["rope_scaling"], f"{path}.rope_scaling")
    return missing
