"""The one table between Hugging Face tensor names and our parameter paths, used in both directions.

Ours stack the layers on axis 0 and keep kernels as [in, out]; Hugging Face has one [out, in] matrix a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lawcat_jax.config import AttentionConfig, ModelConfig


class Rule(NamedTuple):
    """One row: our path, the HF name (``{layer}`` when stacked), transposed or not, our per-layer axes."""

    path: str
    hf: str
    transpose: bool
    axes: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf


_BLOCK = "model.layers.{layer}."
# Axes: V vocabulary, D width, Q = H*d, N = Hkv*d, F MLP width.
TABLE = (
    Rule("embed/embedding", "model.embed_tokens.weight", False, ("V", "D")),
    Rule("layers/input_norm/scale", _BLOCK + "input_layernorm.weight", False, ("D",)),
    Rule("layers/attention/q_proj/kernel", _BLOCK + "self_attn.q_proj.weight", True, ("D", "Q")),
    Rule("layers/attention/k_proj/kernel", _BLOCK + "self_attn.k_proj.weight", True, ("D", "N")),
    Rule("layers/attention/v_proj/kernel", _BLOCK + "self_attn.v_proj.weight", True, ("D", "N")),
    Rule("layers/attention/o_proj/kernel", _BLOCK + "self_attn.o_proj.weight", True, ("Q", "D")),
    Rule("layers/post_attention_norm/scale", _BLOCK + "post_attention_layernorm.weight", False, ("D",)),
    Rule("layers/mlp/gate_proj/kernel", _BLOCK + "mlp.gate_proj.weight", True, ("D", "F")),
    Rule("layers/mlp/up_proj/kernel", _BLOCK + "mlp.up_proj.weight", True, ("D", "F")),
    Rule("layers/mlp/down_proj/kernel", _BLOCK + "mlp.down_proj.weight", True, ("F", "D")),
    Rule("final_norm/scale", "model.norm.weight", False, ("D",)),
    Rule("lm_head/kernel", "lm_head.weight", True, ("D", "V")),
)
# Buffers that old checkpoints carry and that are computed here.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


class Slot(NamedTuple):
    """Where one HF tensor belongs."""

    path: str
    layer: int | None
    transpose: bool
    hf_shape: tuple[int, ...]


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The rows that apply: without ``lm_head`` when embeddings are tied."""
    return tuple(rule for rule in TABLE if not (config.tie_embeddings and rule.path == "lm_head/kernel"))


def _shape(config: ModelConfig, rule: Rule) -> tuple[int, ...]:
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "Q": config.num_heads * config.head_dim,
        "N": config.num_kv_heads * config.head_dim,
        "F": config.mlp_size,
    }
    return tuple(sizes[axis] for axis in rule.axes)


def base_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the pretrained part by '/'-joined path; stacked parameters have the layer axis first."""
    return {rule.path: ((config.num_layers,) if rule.stacked else ()) + _shape(config, rule) for rule in rules(config)}


def hf_slots(config: ModelConfig) -> dict[str, Slot]:
    """Every HF tensor name of the architecture, in checkpoint order, and where it belongs."""
    slots: dict[str, Slot] = {}
    chosen = rules(config)
    first = next(index for index, rule in enumerate(chosen) if rule.stacked)
    last = max(index for index, rule in enumerate(chosen) if rule.stacked)
    order: list[tuple[Rule, int | None]] = [(rule, None) for rule in chosen[:first]]
    order += [(rule, layer) for layer in range(config.num_layers) for rule in chosen[first : last + 1]]
    order += [(rule, None) for rule in chosen[last + 1 :]]
    for rule, layer in order:
        shape = _shape(config, rule)
        slots[rule.hf.format(layer=layer)] = Slot(
            rule.path, layer, rule.transpose, shape[::-1] if rule.transpose else shape
        )
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
