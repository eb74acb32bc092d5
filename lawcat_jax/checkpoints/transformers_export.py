"""A student as a Hugging Face model that carries its own code: ``AutoModelForCausalLM`` loads it with
``trust_remote_code=True``.

The directory holds safetensors, config.json with ``auto_map``, tokenizer, generation_config.json, the two files of
``checkpoints/torch`` and a model card. Adapters stay separate arrays, so that reading the directory back
(:mod:`lawcat_jax.checkpoints.exported`) gives the same bits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_jax.checkpoints.exported import FILES, FORMAT_VERSION, KEY, layers_of, torch_name
from lawcat_jax.checkpoints.fingerprints import file_digests
from lawcat_jax.checkpoints.hf.config_map import token_ids_to_hf
from lawcat_jax.checkpoints.hf.mapping import flatten
from lawcat_jax.checkpoints.hf.read import GENERATION, INDEX, Progress
from lawcat_jax.checkpoints.hf.tensors import CODES, write_tensors
from lawcat_jax.checkpoints.hf.write import MAX_SHARD_BYTES, copy_tokenizer, split_into_shards
from lawcat_jax.checkpoints.model_card import model_card
from lawcat_jax.checkpoints.stored_configs import configs_to_json, content_digest
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.files import new_directory, read_json, write_json
from lawcat_jax.models.rope import inverse_frequencies

CODE = Path(__file__).parent / "torch"
_FILES = ("configuration_lawcat.py", "modeling_lawcat.py")


def export_problems(model: ModelConfig, attention: AttentionConfig) -> list[str]:
    """What the torch model does not have, one line each."""
    problems = []
    if attention.kind == "window":
        problems.append("attention.kind 'window'")
    if attention.rotates and model.rope_scaling.kind in ("dynamic", "longrope"):
        problems.append(f"model.rope_scaling.kind {model.rope_scaling.kind!r}, whose angles depend on the length")
    return problems


def write_transformers(
    target: str | os.PathLike,
    *,
    model: ModelConfig,
    attention: AttentionConfig,
    lora: LoraConfig | None,
    params: Mapping[str, Any],
    tokenizer_source: str | os.PathLike | None = None,
    extra: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
) -> int:
    """Write the directory; returns the bytes of its weights.

    Args:
      target: the directory to create; it appears whole or not at all.
      model, attention, lora: the student's configurations.
      params: every parameter of the student, a nested dict.
      tokenizer_source: directory with tokenizer files to copy.
      extra: what a model directory keeps of where the student comes from.
      recipe: configuration and results of its run, for the model card.
      max_shard_bytes: size from which the weights are split into several files.
      overwrite: replace an existing model.
      progress: called with the bytes written.

    Raises:
      UserError: the student has something that the torch model does not have, named; or the target cannot be written.
    """
    problems = export_problems(model, attention)
    if problems:
        raise UserError(f"cannot write {target}: --to=transformers does not support {', '.join(problems)}")
    leaves = dict(flatten(params))
    entries = _entries(leaves, model, attention)
    total = sum(int(np.prod(shape)) * dtype.itemsize for _, dtype, shape, _ in entries)
    with new_directory(target, overwrite=overwrite) as directory:
        copied = copy_tokenizer(tokenizer_source, directory)
        # Beside the weights: whoever saves the model anew, with other files, leaves these behind.
        metadata = {FILES: json.dumps(file_digests(directory, but=[GENERATION]))}
        stated = read_json(directory / GENERATION) if GENERATION in copied else {}
        write_json(directory / GENERATION, {**stated, **_present(token_ids_to_hf(model))})
        values = {**configs_to_json(model, attention, lora), "extra": dict(extra or {})}
        values["digest"] = content_digest(model, attention, lora, values["extra"])
        dtype = np.dtype(leaves["embed/embedding"].dtype).name
        write_json(directory / "config.json", _config(model, attention, values, dtype))
        shards, weight_map = split_into_shards(entries, max_shard_bytes), {}
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_tensors(directory / file, shard, progress, metadata)
            weight_map |= dict.fromkeys((entry[0] for entry in shard), file)
        if len(shards) > 1:
            write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for name in _FILES:
            shutil.copyfile(CODE / name, directory / name)
        card = model_card(model, attention, lora, extra or {}, recipe or {}, trained=_count(leaves), total=total)
        (directory / "README.md").write_text(card, encoding="utf-8")
    return total


def _entries(leaves: Mapping[str, Any], model: ModelConfig, attention: AttentionConfig) -> list[tuple]:
    unknown = {str(leaf.dtype) for leaf in leaves.values() if np.dtype(leaf.dtype) not in CODES}
    if unknown:
        raise UserError(f"dtype {', '.join(unknown)} is not supported (float32, float16, bfloat16)")
    entries = []
    for path, leaf in leaves.items():
        name, dtype = torch_name(path), np.dtype(leaf.dtype)
        shape = leaf.shape[1:] if name.stacked else leaf.shape
        shape = shape[::-1] if name.transpose else shape
        if not name.stacked:
            entries.append((name.torch, dtype, shape, _maker(leaf, None, name.transpose)))
            continue
        for row, layer in enumerate(layers_of(path, model, attention)):
            entries.append((name.torch.format(layer=layer), dtype, shape, _maker(leaf, row, name.transpose)))
    return entries


def _maker(leaf: Any, row: int | None, transpose: bool) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        array = np.asarray(leaf if row is None else leaf[row])
        return np.ascontiguousarray(array.T) if transpose else array

    return make


def _config(model: ModelConfig, attention: AttentionConfig, values: dict[str, Any], dtype: str) -> dict[str, Any]:
    scaling = model.rope_scaling
    factor = scaling.attention_factor if scaling.kind in ("yarn", "longrope") else 1.0
    described = {
        "format_version": FORMAT_VERSION,
        **values,
        "rope": [float(angle) for angle in inverse_frequencies(model)],
        "rope_factor": factor,
    }
    unlimited = not attention.softmax_layers
    return {
        "architectures": ["LawcatForCausalLM"],
        "model_type": KEY,
        "auto_map": {
            "AutoConfig": "configuration_lawcat.LawcatConfig",
            "AutoModel": "modeling_lawcat.LawcatModel",
            "AutoModelForCausalLM": "modeling_lawcat.LawcatForCausalLM",
        },
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        # A state has no limit of its own; tools cut prompts to this.
        "max_position_embeddings": max(model.max_position_embeddings, 1 << 20 if unlimited else 0),
        "tie_word_embeddings": model.tie_embeddings,
        **token_ids_to_hf(model),
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        KEY: described,
    }


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _count(leaves: Mapping[str, Any]) -> dict[str, int]:
    counts = {"mixers": 0, "lora": 0}
    for path, leaf in leaves.items():
        if path.split("/")[0] in counts:
            counts[path.split("/")[0]] += int(np.prod(leaf.shape))
    return counts
