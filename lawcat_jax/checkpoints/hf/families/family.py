"""What a model family states, and helpers for options that several families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lawcat_jax.checkpoints.hf.fields import Fields
from lawcat_jax.config import ModelConfig

ATTENTION_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_BIASES = ("gate_proj", "up_proj", "down_proj")


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family of Hugging Face.

    ``read`` gives the fields of :class:`ModelConfig` that differ from its defaults and that not every family has;
    ``write`` the entries of ``config.json`` that state them. ``options`` are entries that change what a model computes,
    are refused in other families, and are understood by ``read``.

    ``renamed``: Hugging Face's name of a module within a layer, by our path, where it is not the one in
    :mod:`lawcat_jax.projections`. Modules of one name are a single matrix there, whose rows are theirs one after another
    in the order of the table. ``rope_types``: rope types, by the family's own names for them.
    """

    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], dict[str, Any]] = _nothing
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing
    options: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rope_types: Mapping[str, str] = dataclasses.field(default_factory=dict)


def biases_from_hf(fields: Fields) -> tuple[str, ...]:
    """Projections with a bias where ``attention_bias`` and ``mlp_bias`` say so."""
    attention = ATTENTION_BIASES if fields.get("attention_bias") else ()
    return attention + (MLP_BIASES if fields.get("mlp_bias") else ())


def window_from_hf(fields: Fields, slides: Callable[[int], bool]) -> dict[str, Any]:
    """``sliding_window`` and ``full_attention_layers`` where ``use_sliding_window`` switches them on; layers are named by
    ``layer_types``, or else by ``slides``.
    """
    if not fields.get("use_sliding_window") or not fields.states("sliding_window"):
        return {}
    layers = range(fields.number("num_hidden_layers"))
    kinds = fields.per_layer("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if slides(layer) else "full_attention" for layer in layers]
    unknown = [str(kind) for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if unknown:
        fields.fail(f"layer_types: {unknown[0]!r} is not supported; supported: full_attention, sliding_attention")
    full = tuple(layer for layer in layers if kinds[layer] == "full_attention")
    if len(full) == len(layers):
        return {}
    return {"sliding_window": fields.number("sliding_window"), "full_attention_layers": full}


def window_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`window_from_hf`."""
    sliding = [config.window(layer) is not None for layer in range(config.num_layers)]
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": config.sliding_window if any(sliding) else None,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
    }
