"""Hugging Face tensor names and our parameter paths: one list of rules for both directions.

Ours stack the layers on axis 0 and keep kernels as [in, out]; Hugging Face has one [out, in] matrix per layer. The
modules of a layer are those of :mod:`lawcat_jax.projections`; the families say which of them go by another name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lawcat_jax import projections
from lawcat_jax.checkpoints.hf import families
from lawcat_jax.config import AttentionConfig, ModelConfig


class Rule(NamedTuple):
    """One row: our path, the HF name (``{layer}`` when stacked), transposed or not, the letters of our sizes per layer
    (see :mod:`lawcat_jax.projections`).
    """

    path: str
    hf: str
    transpose: bool
    axes: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf


_BLOCK = "model.layers.{layer}."
# Buffers that old checkpoints carry and that are computed here.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


class Slot(NamedTuple):
    """Where one HF tensor belongs: its rows are those of ``parts``, (path, number of rows) each, one after another."""

    parts: tuple[tuple[str, int], ...]
    layer: int | None
    transpose: bool
    hf_shape: tuple[int, ...]


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The rows for one architecture, in the order of a checkpoint; several may share an HF name (a fused matrix)."""
    top = [Rule("embed/embedding", "model.embed_tokens.weight", False, ("V", "D"))]
    end = [Rule("final_norm/scale", "model.norm.weight", False, ("D",))]
    if not config.tie_embeddings:
        end.append(Rule("lm_head/kernel", "lm_head.weight", True, ("D", "V")))
    return (*top, *_layer_rules(config), *end)


def _layer_rules(config: ModelConfig) -> list[Rule]:
    renamed = families.find(config.family).renamed
    modules: dict[str, list[Rule]] = {}
    for path, (size, hf) in projections.norms(config).items():
        modules[path] = [Rule(f"layers/{path}/scale", f"{_BLOCK}{renamed.get(path, hf)}.weight", False, (size,))]
    for row in projections.PROJECTIONS:
        path, hf = f"layers/{row.path}", _BLOCK + renamed.get(row.path, row.hf)
        modules[row.path] = [Rule(f"{path}/kernel", f"{hf}.weight", True, (row.inputs, row.outputs))]
        if row.has_bias(config):
            modules[row.path].append(Rule(f"{path}/bias", f"{hf}.bias", False, (row.outputs,)))
    attention, mlp = ([row.path for row in rows] for rows in (projections.ATTENTION, projections.MLP))
    order = ["input_norm", *attention, "attention/q_norm", "attention/k_norm", "attention_output_norm"]
    order += ["post_attention_norm", *mlp, "mlp_output_norm"]
    return [rule for path in order for rule in modules.get(path, [])]


def _shape(config: ModelConfig, rule: Rule) -> tuple[int, ...]:
    sizes = projections.axis_sizes(config)
    return tuple(sizes[axis] for axis in rule.axes)


def base_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the pretrained part by '/'-joined path; stacked parameters have the layer axis first."""
    return {rule.path: ((config.num_layers,) if rule.stacked else ()) + _shape(config, rule) for rule in rules(config)}


def hf_slots(config: ModelConfig) -> dict[str, Slot]:
    """Every HF tensor name of the architecture, in checkpoint order, and where it belongs."""
    chosen = rules(config)
    first = next(index for index, rule in enumerate(chosen) if rule.stacked)
    last = max(index for index, rule in enumerate(chosen) if rule.stacked)
    order: list[tuple[Rule, int | None]] = [(rule, None) for rule in chosen[:first]]
    order += [(rule, layer) for layer in range(config.num_layers) for rule in chosen[first : last + 1]]
    order += [(rule, None) for rule in chosen[last + 1 :]]
    slots: dict[str, Slot] = {}
    for rule, layer in order:
        shape = _shape(config, rule)
        rows, *columns = shape[::-1] if rule.transpose else shape
        name = rule.hf.format(layer=layer)
        before = slots[name] if name in slots else Slot((), layer, rule.transpose, (0,))
        parts = (*before.parts, (rule.path, rows))
        slots[name] = Slot(parts, layer, rule.transpose, (before.hf_shape[0] + rows, *columns))
    return slots


def ignored(name: str, config: ModelConfig) -> bool:
    """True for tensors that may be present and carry no information of their own."""
    return bool(_IGNORED.search(name)) or (config.tie_embeddings and name == "lm_head.weight")


def linearised_layers(config: ModelConfig, attention: AttentionConfig | None) -> tuple[int, ...]:
    """Layer indices whose attention is replaced, in the order of the stacked mixer and LoRA arrays.

    Without ``attention`` every layer counts, so that LoRA on a plain teacher covers all layers.
    """
    keep = set(attention.softmax_layers) if attention is not None else set()
    keep = {layer % config.num_layers if layer < 0 else layer for layer in keep}
    return tuple(layer for layer in range(config.num_layers) if layer not in keep)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('/'-joined path, leaf) of a nested dict."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree
