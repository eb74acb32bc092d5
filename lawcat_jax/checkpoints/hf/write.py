"""Our parameters -> a Hugging Face directory that ``transformers`` loads, streamed tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lawcat_jax.checkpoints.hf.config_map import model_config_to_hf, token_ids_to_hf
from lawcat_jax.checkpoints.hf.mapping import Slot, base_shapes, flatten, hf_slots, linearised_layers
from lawcat_jax.checkpoints.hf.read import GENERATION, INDEX, TOKENIZER_FILES, Progress
from lawcat_jax.checkpoints.hf.tensors import CODES, write_tensors
from lawcat_jax.checkpoints.hf.values import check_float16
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.files import new_directory, read_in_one_line, read_json, write_json

MAX_SHARD_BYTES = 5_000_000_000  # as transformers: hub uploads and memory maps stay manageable


def write_hf(
    target: str | os.PathLike,
    *,
    model: ModelConfig,
    params: Mapping[str, Any],
    attention: AttentionConfig | None = None,
    lora: LoraConfig | None = None,
    tokenizer_source: str | os.PathLike | None = None,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
) -> None:
    """Write config.json, generation_config.json, safetensors and tokenizer files.

    The linear-attention mixers have no place in a pretrained architecture and are left out; LoRA, when ``params``
    has it, is merged in float32 and rounded once: W + (alpha / r) a b.

    Args:
      target: the directory to create; it appears whole or not at all.
      model: architecture.
      params: nested dict; the base part and optionally ``lora``.
      attention: tells which layers are linearised, that is, which layers the LoRA arrays belong to.
      lora: rank and alpha of ``params['lora']``.
      tokenizer_source: directory with tokenizer files to copy.
      dtype: of the written weights; None keeps that of ``params``.
      max_shard_bytes: size from which the weights are split into several files.
      progress: called with the bytes written.

    Raises:
      UserError: the target exists, or parameters are missing or do not have the shapes of ``model``.
    """
    leaves = dict(flatten(params))
    check_leaves(leaves, base_shapes(model), f"cannot write {target}", partial=True)
    merge = _merger(model, attention, lora, leaves)
    entries = [
        (name, kind := _dtype(leaves, slot, dtype), slot.hf_shape, _maker(leaves, slot, merge, kind))
        for name, slot in hf_slots(model).items()
    ]
    kinds = {kind for _, kind, _, _ in entries}
    unknown = [str(kind) for kind in kinds if kind not in CODES]
    if unknown:
        raise UserError(f"cannot write {target}: dtype {', '.join(unknown)} (supported: float32, float16, bfloat16)")
    shards = split_into_shards(entries, max_shard_bytes)
    with new_directory(target, overwrite=overwrite) as directory:
        main = max(kinds, key=lambda kind: sum(np.prod(shape) for _, k, shape, _ in entries if k == kind))
        values = model_config_to_hf(model, main.name)
        write_json(directory / "config.json", values)
        weight_map, total = {}, 0
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_tensors(directory / file, shard, progress)
            for name, kind, shape, _ in shard:
                weight_map[name] = file
                total += int(np.prod(shape)) * kind.itemsize
        if len(shards) > 1:
            write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        copied = copy_tokenizer(tokenizer_source, directory)
        ids = {name: value for name, value in token_ids_to_hf(model).items() if value is not None}
        stated = read_json(directory / GENERATION) if GENERATION in copied else {}
        if GENERATION not in copied or any(stated.get(name) != value for name, value in ids.items()):
            write_json(directory / GENERATION, {**stated, **ids})


def copy_tokenizer(source: str | os.PathLike | None, target: Path) -> list[str]:
    """Copy tokenizer files and generation_config.json; returns the names that existed."""
    copied = []
    for name in (*TOKENIZER_FILES, GENERATION):
        if source is not None and (Path(source) / name).is_file():
            target.mkdir(exist_ok=True)
            with read_in_one_line(str(Path(source) / name)):
                content = (Path(source) / name).read_bytes()
            (target / name).write_bytes(content)  # content only: hub caches hold read-only links
            copied.append(name)
    return copied


def check_leaves(
    leaves: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], where: str, *, partial: bool = False
) -> None:
    """Compare parameter paths and shapes with what is expected; ``partial`` allows further ones.

    Raises:
      UserError: every missing, unexpected and wrongly shaped parameter by name.
    """
    missing = [path for path in expected if path not in leaves]
    unexpected = [] if partial else [path for path in leaves if path not in expected]
    wrong = [
        f"{path} is {list(leaves[path].shape)}, should be {list(shape)}"
        for path, shape in expected.items()
        if path in leaves and tuple(leaves[path].shape) != tuple(shape)
    ]
    named = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong}
    parts = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in named.items() if names]
    if parts:
        raise UserError(f"{where}: parameters do not fit the model: {'; '.join(parts)}")


def _merger(model, attention, lora, leaves) -> Callable[[str, int | None, np.ndarray], np.ndarray]:
    adapters = {}
    for path, leaf in leaves.items():
        if path.startswith("lora/"):
            _, projection, part = path.split("/")
            adapters.setdefault(f"layers/attention/{projection}/kernel", {})[part] = leaf
    if adapters and lora is None:
        raise UserError("the parameters hold LoRA adapters, but no LoRA configuration says how to scale them")
    rows = {layer: row for row, layer in enumerate(linearised_layers(model, attention))}

    def merge(path: str, layer: int | None, kernel: np.ndarray) -> np.ndarray:
        if path not in adapters or layer not in rows:
            return kernel
        a, b = (np.asarray(adapters[path][part][rows[layer]], np.float32) for part in "ab")
        return (kernel.astype(np.float32) + (lora.alpha / lora.rank) * (a @ b)).astype(kernel.dtype)

    return merge


def _dtype(leaves, slot: Slot, dtype: np.dtype | None) -> np.dtype:
    kinds = {np.dtype(dtype or leaves[path].dtype) for path, _ in slot.parts}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)  # parts that differ meet there without loss


def _maker(leaves, slot: Slot, merge, dtype: np.dtype) -> Callable[[], np.ndarray]:
    def part(path: str) -> np.ndarray:
        leaf = leaves[path]
        array = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
        with np.errstate(over="ignore"):
            cast = merge(path, slot.layer, array if array.dtype == dtype else array.astype(dtype))
        if dtype == np.float16:
            check_float16(array, cast, path)
        return _transposed(cast) if slot.transpose else cast

    def make() -> np.ndarray:
        parts = [part(path) for path, _ in slot.parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return make


def _transposed(array: np.ndarray) -> np.ndarray:
    if array.dtype == ml_dtypes.bfloat16:  # as raw words: NumPy moves bfloat16 element by element
        return np.ascontiguousarray(array.view(np.uint16).T).view(array.dtype)
    return np.ascontiguousarray(array.T)


def split_into_shards(entries: list[tuple], limit: int) -> list[list[tuple]]:
    """The entries of ``write_tensors``, in order, in groups of at most ``limit`` bytes (or of one larger tensor)."""
    shards, size = [[]], 0
    for entry in entries:
        count = int(np.prod(entry[2])) * entry[1].itemsize
        if shards[-1] and size + count > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += count
    return shards
