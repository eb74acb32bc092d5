"""LoRA adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as [r, in] and B as [out, r] per layer; ours are a [M, in, r] and b [M, r, out], stacked over
the M linearised layers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from lawcat_jax.checkpoints.hf import families
from lawcat_jax.checkpoints.hf.adapter_config import AdapterConfig
from lawcat_jax.checkpoints.hf.mapping import flatten, linearised_layers, unflatten
from lawcat_jax.checkpoints.hf.merge import CONFIG, WEIGHTS, adapter_tensors
from lawcat_jax.checkpoints.hf.tensors import write_tensors
from lawcat_jax.checkpoints.hf.write import check_leaves
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig, Projection
from lawcat_jax.errors import UserError
from lawcat_jax.files import new_directory, read_json, write_json
from lawcat_jax.projections import LORA_TARGETS, PROJECTIONS

_NAME = "base_model.model.{module}.lora_{part}.weight"
_README = """These LoRA adapters were trained for a student with linear attention. On the softmax attention of their base
model they are another model, not the student: that needs its token mixers too (`lawcat_jax.convert --to=transformers`
or `--to=delta`).
"""
_ROWS = {row.name: row for row in PROJECTIONS}
_NEUTRAL = {"use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None}


def lora_shapes(model: ModelConfig, attention: AttentionConfig | None, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter arrays by path, stacked over the linearised layers."""
    count = len(linearised_layers(model, attention))
    shapes = {}
    for target in lora.targets:
        inputs, outputs = _ROWS[target].sizes(model)
        shapes[f"lora/{target}/a"] = (count, inputs, lora.rank)
        shapes[f"lora/{target}/b"] = (count, lora.rank, outputs)
    return shapes


def write_adapter(
    target: str | os.PathLike,
    *,
    model: ModelConfig,
    attention: AttentionConfig | None,
    lora: LoraConfig,
    params: Mapping[str, Any],
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``params['lora']`` so that ``peft.PeftModel.from_pretrained`` loads it on the HF base model.

    Args:
      target: the directory to create; it appears whole or not at all.
      model: architecture of the base.
      attention: tells which layers are linearised and so carry adapters.
      lora: rank, alpha and targets.
      params: nested dict with ``lora``.
      base_model: path or hub id written as ``base_model_name_or_path``.

    Raises:
      UserError: no adapters in ``params``, wrong shapes, or the target exists.
    """
    _check_names(model, f"cannot write {target}")
    leaves = {f"lora/{path}": leaf for path, leaf in flatten(params.get("lora", {}))}
    if not leaves:
        raise UserError(f"cannot write {target}: the model has no LoRA adapters")
    check_leaves(leaves, lora_shapes(model, attention, lora), f"cannot write {target}")
    layers = linearised_layers(model, attention)
    entries = []
    for row, layer in enumerate(layers):
        for projection in lora.targets:
            for part in "ab":
                leaf = np.asarray(leaves[f"lora/{projection}/{part}"][row])
                entries.append(
                    (_tensor_name(projection, part, layer), leaf.dtype, leaf.shape[::-1], lambda x=leaf: x.T)
                )
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        # Only named when some layers keep softmax attention: without it every layer is adapted.
        "layers_to_transform": None if len(layers) == model.num_layers else list(layers),
        "layers_pattern": None if len(layers) == model.num_layers else "layers",
        "init_lora_weights": True,
        "inference_mode": True,
        **_NEUTRAL,
    }
    with new_directory(target, overwrite=overwrite) as directory:
        write_json(directory / CONFIG, values)
        if attention is not None:
            (directory / "README.md").write_text(_README, encoding="utf-8")
        write_tensors(directory / WEIGHTS, entries)


def read_adapter(
    source: str | os.PathLike, *, model: ModelConfig, attention: AttentionConfig | None
) -> tuple[LoraConfig, dict[str, Any]]:
    """Read a PEFT LoRA adapter of the attention projections.

    Returns:
      The LoRA configuration, and the nested dict ``{"lora": ...}`` in the stored dtype.

    Raises:
      UserError: not a plain LoRA adapter, or one for other layers, modules or shapes; names are listed. Adapters of
        other modules are merged into their base model (:func:`lawcat_jax.checkpoints.hf.merge.merge_adapter`).
    """
    source = Path(source)
    _check_names(model, source)
    lora = _lora_config(AdapterConfig(read_json(source / CONFIG), str(source / CONFIG)), model)
    tensors = adapter_tensors(source)
    layers = linearised_layers(model, attention)
    names = {
        _tensor_name(projection, part, layer): (f"lora/{projection}/{part}", row)
        for projection in lora.targets
        for row, layer in enumerate(layers)
        for part in "ab"
    }
    shapes = lora_shapes(model, attention, lora)
    check_leaves(tensors, {name: shapes[path][:0:-1] for name, (path, _) in names.items()}, str(source))
    leaves: dict[str, np.ndarray] = {}
    for name, (path, row) in names.items():
        tensor = tensors[name]
        if tensor.dtype is None:
            raise UserError(f"{source}: {name} is {tensor.code}, which is not supported")
        if path not in leaves:
            leaves[path] = np.empty(shapes[path], tensor.dtype)
        leaves[path][row] = tensor.rows(0, tensor.shape[0]).T
    return lora, unflatten(leaves)


def _tensor_name(projection: str, part: str, layer: int) -> str:
    return _NAME.format(module=f"model.layers.{layer}.{_ROWS[projection].hf}", part=part.upper())


def _check_names(model: ModelConfig, where: str | os.PathLike) -> None:
    fused = [
        path for path in families.find(model.family).renamed if path in {row.path for row in PROJECTIONS if row.lora}
    ]
    if fused:
        raise UserError(
            f"{where}: {model.family} keeps {', '.join(fused)} in one matrix, for which PEFT has other adapters; merge them "
            "into the model instead"
        )


def _lora_config(config: AdapterConfig, model: ModelConfig) -> LoraConfig:
    """The adapter as the student's own kind: one rank, one scale and the same projections in every layer."""
    wanted = config.values["target_modules"]
    modules = [f"model.layers.{layer}.{row.hf}" for layer in range(model.num_layers) for row in PROJECTIONS]
    others = [] if isinstance(wanted, str) else [name for name in wanted if name.rpartition(".")[2] not in LORA_TARGETS]
    found = config.targets(modules) if not others else []
    names = {module.rpartition(".")[2] for module in found}
    unknown = sorted({*others, *names} - set(LORA_TARGETS))
    if unknown:
        raise UserError(
            f"{config.where}: target_modules has {', '.join(unknown)}; supported: {', '.join(LORA_TARGETS)}; or merge the "
            "adapter into its base model with convert --adapter"
        )
    forms = {(config.rank(module), config.alpha(module)) for module in found}
    if len(forms) > 1:
        raise UserError(
            f"{config.where}: rank_pattern or alpha_pattern give the modules different ranks or scales, which a student's "
            "adapters cannot have; merge the adapter into its base model with convert --adapter"
        )
    ((rank, alpha),) = forms
    ordered: tuple[Projection, ...] = tuple(cast(Projection, name) for name in LORA_TARGETS if name in names)
    return LoraConfig(rank=rank, alpha=alpha, dropout=config.dropout, targets=ordered)
