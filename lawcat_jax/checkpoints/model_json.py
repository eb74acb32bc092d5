"""``model.json`` of a model directory: what the model is, and what each of its arrays was when it was written.

::

    format_version   1
    model            every field of ModelConfig
    attention, lora  every field of AttentionConfig and LoraConfig, or null
    extra            what the writer added (source, stage, training_length, eval, add_bos)
    params           {path: {"shape", "dtype", "sum"}}, see lawcat_jax.checkpoints.fingerprints
    digest           of model, attention, lora and params

The last two are checked where they are there: earlier versions wrote neither ``sum`` nor ``digest``.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lawcat_jax.checkpoints.fingerprints import digest
from lawcat_jax.checkpoints.hf.config_map import token_ids
from lawcat_jax.checkpoints.hf.read import GENERATION, stated_ids
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
from lawcat_jax.files import read_json

FORMAT_VERSION = 1
MODEL_JSON, TOKENIZER = "model.json", "tokenizer"
_KINDS = {"model": ModelConfig, "attention": AttentionConfig, "lora": LoraConfig}
_PROBLEMS: dict[str, Any] = {"model": model_problems, "attention": attention_problems, "lora": lora_problems}
# The fields that format version 1 has had from the beginning: a file must state them. Those added since have defaults
# that are what earlier versions did, so that a file may lack them.
_ORIGINAL = {
    ModelConfig: "family vocab_size hidden_size num_layers num_heads num_kv_heads head_dim mlp_size rms_norm_eps rope_theta "
    "rope_scaling max_position_embeddings tie_embeddings sliding_window bos_token_id eos_token_ids pad_token_id",
    RopeScaling: "kind factor low_freq_factor high_freq_factor original_max_position_embeddings",
    AttentionConfig: "kind conv conv_size feature_map feature_dim tie_qk normalize rope_linear window_size affine_window "
    "sinks gate_kind gate_rank gate_normalizer gate_lower_bound gate_half_life gate_half_life_max softmax_layers "
    "output_gate init implementation",
    LoraConfig: "rank alpha dropout targets",
}


class ModelJson(NamedTuple):
    """The content of a model.json. ``params``: path -> {"shape", "dtype"} and, unless an earlier version wrote it, "sum".
    ``changed``: the line that says so where the digest is another; readers of the parameters raise it, after they have
    looked for what is plainly wrong.
    """

    model: ModelConfig
    attention: AttentionConfig | None
    lora: LoraConfig | None
    extra: dict[str, Any]
    params: dict[str, dict[str, Any]]
    changed: str = ""


def as_json(
    model: ModelConfig,
    attention: AttentionConfig | None,
    lora: LoraConfig | None,
    extra: Mapping[str, Any],
    params: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The values of a model.json; ``params`` as in :class:`ModelJson`."""
    configs = {"model": model, "attention": attention, "lora": lora}
    return {
        "format_version": FORMAT_VERSION,
        **{name: None if config is None else to_dict(config) for name, config in configs.items()},
        "extra": dict(extra),
        "params": {path: dict(facts) for path, facts in params.items()},
        "digest": _digest(configs, params),
    }


def read(directory: str | os.PathLike) -> ModelJson:
    """Read and check the model.json of a model directory.

    Token ids in the generation_config.json beside the tokenizer win over those in it.

    Raises:
      UserError: unreadable, of another format version, or with missing, unknown or impossible fields.
    """
    path = Path(directory) / MODEL_JSON
    values = read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {values.get('format_version')!r}, but this program reads {FORMAT_VERSION}; "
            "convert again"
        )
    configs = {name: _config(name, values.get(name), path) for name in _KINDS}
    extra, params = _extra(values.get("extra"), path), values.get("params") or {}
    if not isinstance(params, dict) or not all(isinstance(facts, dict) for facts in params.values()):
        raise UserError(f"{path}: params should be an object with an object for every array")
    changed = ""
    if values.get("digest") not in (None, _digest(configs, params)):
        changed = (
            f"{path}: changed since it was written (its digest differs); restore a copy or convert again. If you edited "
            'it on purpose, remove its line "digest"'
        )
    model = dataclasses.replace(configs["model"], **token_ids(stated_ids(path.parent / TOKENIZER / GENERATION)))
    return ModelJson(model, configs["attention"], configs["lora"], extra, params, changed)


def _config(name: str, value: Any, path: Path) -> Any:
    if value is None and name != "model":
        return None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} should be an object")
    try:
        parsed = from_dict(_KINDS[name], value, name)
    except (ConfigError, TypeError) as problem:
        raise UserError(f"{path}: {problem}") from None
    problems = type_problems(parsed, name) or _PROBLEMS[name](parsed, name)
    if missing := _missing(_KINDS[name], value, name):
        problems.append(f"missing: {', '.join(missing)}")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return parsed


def _missing(kind: type, values: Mapping[str, Any], path: str) -> list[str]:
    missing = [f"{path}.{name}" for name in _ORIGINAL[kind].split() if name not in values]
    if kind is ModelConfig and isinstance(values.get("rope_scaling"), dict):
        missing += _missing(RopeScaling, values["rope_scaling"], f"{path}.rope_scaling")
    return missing


def _digest(configs: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    return digest([{name: _meaning(config) for name, config in configs.items()}, dict(params)])


def _meaning(config: Any) -> Any:
    """What a configuration says, in a form that does not change when later versions add fields."""
    if type(config) not in _ORIGINAL:
        return config
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plain, original = type(config)(), _ORIGINAL[type(config)].split()
    return {
        name: _meaning(value) for name, value in fields.items() if name in original or value != getattr(plain, name)
    }


def _extra(extra: Any, path: Path) -> dict[str, Any]:
    extra = {} if extra is None else extra
    if not isinstance(extra, dict):
        raise UserError(f"{path}: extra should be an object, not {str(extra)[:80]!r}")
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
        raise UserError(f"{path}: {'; '.join(problems)}; correct the file, or remove these")
    return extra
