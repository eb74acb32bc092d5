"""``model.json`` of a model directory: what the model is, and what each of its arrays was when it was written.

::

    format_version   1
    model            every field of ModelConfig
    attention, lora  every field of AttentionConfig and LoraConfig, or null
    extra            what the writer added (source, stage, training_length, eval, add_bos)
    params           {path: {"shape", "dtype", "hash"}}, see lawcat_jax.checkpoints.fingerprints
    tokenizer        {name: SHA-256} of the files in tokenizer/, but for generation_config.json, which users edit
    digest           of model, attention, lora, params and what is known in extra

The last three are checked where they are there: earlier versions wrote ``sum`` in place of ``hash``, or neither of these nor
``digest``, or no ``tokenizer`` and a ``digest`` without ``extra``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lawcat_jax.checkpoints.fingerprints import check_files, digest
from lawcat_jax.checkpoints.hf.config_map import token_ids
from lawcat_jax.checkpoints.hf.read import GENERATION, stated_ids
from lawcat_jax.checkpoints.stored_configs import (
    configs_from_json,
    configs_to_json,
    content_digest,
    extra_from_json,
    meaning,
)
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.files import read_json

FORMAT_VERSION = 1
MODEL_JSON, TOKENIZER = "model.json", "tokenizer"


class ModelJson(NamedTuple):
    """The content of a model.json. ``params``: path -> {"shape", "dtype"} and, unless an earlier version wrote it, "hash"
    (or "sum").
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
    tokenizer: Mapping[str, str],
) -> dict[str, Any]:
    """The values of a model.json; ``params`` as in :class:`ModelJson`, ``tokenizer`` as ``file_digests`` gives them."""
    return {
        "format_version": FORMAT_VERSION,
        **configs_to_json(model, attention, lora),
        "extra": dict(extra),
        "params": {path: dict(facts) for path, facts in params.items()},
        "tokenizer": dict(tokenizer),
        "digest": _digest(model, attention, lora, params, extra),
    }


def read(directory: str | os.PathLike) -> ModelJson:
    """Read and check the model.json of a model directory.

    Token ids in the generation_config.json beside the tokenizer win over those in it.

    Raises:
      UserError: unreadable, of another format version, of layers that have changed since, with missing, unknown or
        impossible fields, or beside tokenizer files that have changed.
    """
    path = Path(directory) / MODEL_JSON
    values = read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {values.get('format_version')!r}, but this program reads {FORMAT_VERSION}; "
            "convert again"
        )
    _refuse_outdated(path, values.get("attention"))
    model, attention, lora = configs_from_json(values, str(path))
    extra, params = extra_from_json(values, str(path)), values.get("params") or {}
    if not isinstance(params, dict) or not all(isinstance(facts, dict) for facts in params.values()):
        raise UserError(f"{path}: params should be an object with an object for every array")
    files = values.get("tokenizer")
    if not isinstance(files, dict | None):
        raise UserError(f"{path}: tokenizer should be an object with a digest for every file")
    check_files(
        path.parent / TOKENIZER, files or {}, f'if you did it on purpose, remove its line in "tokenizer" of {path}'
    )
    changed = ""
    if values.get("digest") not in (None, _digest(model, attention, lora, params, None if files is None else extra)):
        changed = (
            f"{path}: changed since it was written (its digest differs); restore a copy or convert again. If you edited "
            'it on purpose, remove its line "digest"'
        )
    model = dataclasses.replace(model, **token_ids(stated_ids(path.parent / TOKENIZER / GENERATION)))
    return ModelJson(model, attention, lora, extra, params, changed)


def _refuse_outdated(path: Path, attention: Any) -> None:
    """Raises UserError for students of layers that have changed since: they would load and compute something else."""
    if not isinstance(attention, dict) or "window_kind" in attention:  # which came with both changes
        return
    remedy = "train it again, or use the version of this program that wrote it"
    if attention.get("feature_map") == "relu":
        raise UserError(f"{path}: a student of feature_map 'relu' with a bias per feature, now one per head; {remedy}")
    if attention.get("kind") == "lawcat" and attention.get("window_size"):
        raise UserError(f"{path}: a student whose linear sums beside a window lack the factor K^-0.5; {remedy}")


def _digest(
    model: ModelConfig,
    attention: AttentionConfig | None,
    lora: LoraConfig | None,
    params: Mapping[str, Any],
    extra: Mapping[str, Any] | None,
) -> str:
    if extra is None:  # of an earlier version
        configs = {"model": model, "attention": attention, "lora": lora}
        return digest([{name: meaning(config) for name, config in configs.items()}, dict(params)])
    return digest([content_digest(model, attention, lora, extra), dict(params)])
