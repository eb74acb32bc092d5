"""PEFT LoRA adapters of any linear module, merged into the weights of the model they were trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lawcat_jax.checkpoints.hf.adapter_config import AdapterConfig
from lawcat_jax.checkpoints.hf.mapping import Slot, flatten, hf_slots, unflatten
from lawcat_jax.checkpoints.hf.tensors import Tensor, open_tensors
from lawcat_jax.config import ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_COPY = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")  # of base weights, which PEFT may add
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.\w+)?\.weight")


class Pair(NamedTuple):
    """The factors of one module: A [r, in], B [out, r]."""

    a: Tensor
    b: Tensor


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter and no model."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def base_of(directory: Path) -> str | None:
    """What the adapter's configuration names as its base model: a path or hub id, or None."""
    name = read_json(directory / CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def adapter_tensors(source: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's safetensors file.

    Raises:
      UserError: there is none, or only a pickle file.
    """
    if not (source / WEIGHTS).is_file() and (source / "adapter_model.bin").is_file():
        raise UserError(f"{source}: adapter_model.bin is a pickle file, which can run code when opened; need {WEIGHTS}")
    return open_tensors(source / WEIGHTS)


def merge_adapter(source: Path, model: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a model with an adapter merged into them: W + scale B A, summed in float32 and rounded once.

    Args:
      source: directory of the adapter.
      model: architecture of the base.
      params: nested dict of numpy arrays; arrays that are writable are changed in place.

    Raises:
      UserError: not a plain LoRA adapter (:class:`AdapterConfig`), or one for other modules or shapes; names are listed.
    """
    config = AdapterConfig(read_json(source / CONFIG), str(source / CONFIG))
    slots = {name.removesuffix(".weight"): slot for name, slot in hf_slots(model).items() if slot.transpose}
    targets = config.targets(slots)
    leaves = dict(flatten(params))
    tensors = adapter_tensors(source)
    for name in [name for name in tensors if not _TENSOR.fullmatch(name)]:
        if (copy := _COPY.fullmatch(name)) and f"{copy[1]}.weight" in hf_slots(model):
            _check_copy(tensors.pop(name), hf_slots(model)[f"{copy[1]}.weight"], leaves, f"{source}: {name}")
    pairs = _pairs(source, tensors, config, slots, targets)
    for module, pair in pairs.items():
        a, b = (tensor.rows(0, tensor.shape[0]).astype(np.float32) for tensor in pair)
        delta = config.alpha(module) / config.rank(module) * (b @ a)
        if not np.isfinite(delta).all():
            raise UserError(f"{source}: the adapter of {module} holds NaN or infinity")
        start, slot = 0, slots[module]
        for path, rows in slot.parts:
            if not leaves[path].flags.writeable:
                leaves[path] = leaves[path].copy()
            kernel = leaves[path] if slot.layer is None else leaves[path][slot.layer]  # [in, rows]
            with np.errstate(over="ignore"):
                merged = (kernel.astype(np.float32) + delta[start : start + rows].T).astype(kernel.dtype)
            if kernel.dtype == np.float16 and np.isinf(merged).any():
                raise UserError(
                    f"{source}: merged, {module} has values beyond float16; choose --dtype=bfloat16 or float32"
                )
            kernel[...] = merged
            start += rows
    return unflatten(leaves)


def _check_copy(tensor: Tensor, slot: Slot, leaves: Mapping[str, np.ndarray], where: str) -> None:
    """A base weight that lies in the adapter's file as well must be that of the base model."""
    parts = [leaves[path] if slot.layer is None else leaves[path][slot.layer] for path, _ in slot.parts]
    base = np.concatenate([part.T if slot.transpose else part for part in parts])
    if tensor.dtype is None or tensor.shape != base.shape:
        raise UserError(f"{where} is {tensor.code}{list(tensor.shape)}, the base model's is {list(base.shape)}")
    if not np.array_equal(tensor.rows(0, tensor.shape[0]).astype(base.dtype), base):
        raise UserError(f"{where} differs from the base model's: name the model that the adapter was trained on")


def _pairs(
    source: Path, tensors: Mapping[str, Tensor], config: AdapterConfig, slots: Mapping[str, Slot], targets: list[str]
) -> dict[str, Pair]:
    found: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    unexpected = []
    for name, tensor in tensors.items():
        parsed = _TENSOR.fullmatch(name)
        if parsed is None or parsed[1] not in targets:
            unexpected.append(name)
        else:
            found.setdefault(parsed[1], {})[parsed[2]] = tensor
    missing = [f"{module}.lora_{part}" for module in targets for part in "AB" if part not in found.get(module, {})]
    for module, parts in found.items():
        rank, (outputs, inputs) = config.rank(module), slots[module].hf_shape
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            tensor = parts.get(part)
            if tensor is None:
                continue
            if tensor.dtype is None:
                problems.append(f"{module}.lora_{part} is {tensor.code}, which is not supported")
            elif tensor.shape != shape:
                problems.append(f"{module}.lora_{part} is {list(tensor.shape)}, should be {list(shape)}")
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            problems.append(f"{len(names)} {kind}: {', '.join(names[:20])}{more}")
    if problems:
        raise UserError(f"{source}: the adapter does not fit this model: {'; '.join(problems)}")
    return {module: Pair(parts["A"], parts["B"]) for module, parts in found.items()}
