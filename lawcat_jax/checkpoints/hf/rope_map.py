"""``rope_scaling``, ``rope_theta`` and ``rope_parameters`` of a ``config.json`` <-> theta and
:class:`~lawcat_jax.config.RopeScaling`.

transformers 4 stores ``rope_theta`` and ``rope_scaling``; transformers 5 stores both in ``rope_parameters``.
Both forms are read, and both are written side by side: version 5 lets a non-null ``rope_scaling`` override
``rope_parameters`` and takes ``rope_theta`` from beside it, version 4 ignores ``rope_parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from lawcat_jax.checkpoints.hf.fields import Fields
from lawcat_jax.config import ModelConfig, RopeKind, RopeScaling

_ORIGINAL = "original_max_position_embeddings"
# The fields that each type has, and those of them without which it is refused. The others take transformers' defaults.
FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def rope_from_hf(fields: Fields, types: Mapping[str, str]) -> tuple[float, RopeScaling]:
    """(theta, scaling); ``types``: a family's own names of rope types.

    Raises:
      UserError: an unknown type, or a missing or impossible field.
    """
    rope = _rope(fields)
    theta = rope_entry(fields, "rope_theta")
    theta = 10000.0 if theta is None else theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = types.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in FIELDS:
        fields.fail(f"rope type {kind!r} is not supported; supported: {', '.join(FIELDS)}")
    missing = [name for name in _NEEDED[kind] if rope.get(name) is None]
    if missing:
        fields.fail(f"rope type {kind!r} needs {', '.join(missing)}")
    if kind == "default":
        return theta, RopeScaling()
    stated = {name: _checked(fields, name, rope[name]) for name in FIELDS[kind] if rope.get(name) is not None}
    if _ORIGINAL in FIELDS[kind]:
        if fields.states(_ORIGINAL):  # beside the scaling (Phi-3): wins over the one within
            stated[_ORIGINAL] = fields.number(_ORIGINAL)
        stated.setdefault(_ORIGINAL, fields.number("max_position_embeddings"))
        if stated[_ORIGINAL] < 2:
            fields.fail(f"{_ORIGINAL}: {stated[_ORIGINAL]} must be at least 2")
        stated.setdefault("factor", fields.number("max_position_embeddings") / stated[_ORIGINAL])
    if kind == "yarn":
        scales = [_checked(fields, name, rope.get(name) or 0.0) for name in ("mscale", "mscale_all_dim")]
        stated.setdefault("attention_factor", _yarn_attention_factor(stated["factor"], *scales))
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            stated[name] = stated.get(name) or default
    if kind == "longrope":
        stated.setdefault("attention_factor", longrope_attention_factor(stated["factor"], stated[_ORIGINAL]))
    return theta, RopeScaling(kind=cast(RopeKind, kind), **stated)


def rope_entry(fields: Fields, name: str) -> Any:
    """A value that may stand within the rotary embedding's object or beside it; within wins. None if it does in neither.

    Raises:
      UserError: an object that loses to ``rope_scaling`` has another value.
    """
    rope = _rope(fields)
    value = fields.get(name) if rope.get(name) is None else rope[name]
    lost = fields.get("rope_parameters")
    if isinstance(lost, dict) and lost is not rope and lost.get(name) not in (None, value):
        used = "the default" if value is None else repr(value)
        fields.fail(
            f"{name} {lost[name]!r} in rope_parameters would be ignored beside rope_scaling, which wins ({used} is used); "
            f"write {name} into rope_scaling too, or remove one of the two"
        )
    return value


def _rope(fields: Fields) -> dict[str, Any]:
    """What states the rotary embedding: ``rope_scaling``, or else ``rope_parameters``, in transformers' order."""
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        fields.fail(f"rope_scaling / rope_parameters should be an object, not {rope!r}")
    nested = [str(name) for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        fields.fail(f"rotary embeddings by kind of layer ({', '.join(nested)}) are not supported")
    return rope


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and ``rope_parameters``."""
    scaling = config.rope_scaling
    kind = "default" if scaling.kind == "none" else scaling.kind
    rope: dict[str, Any] = {"rope_type": kind}
    for name in FIELDS[kind]:
        value = getattr(scaling, name)
        rope[name] = list(value) if isinstance(value, tuple) else value
    return {
        "rope_theta": config.rope_theta,
        # Version 4 reads the older key "type" for linear scaling, and refuses neither.
        "rope_scaling": None if kind == "default" else {**rope, "type": kind},
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    }


def _checked(fields: Fields, name: str, value: Any) -> Any:
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list) or not all(isinstance(n, int | float) for n in value):
            fields.fail(f"{name} of the rope scaling should be a list of numbers, not {str(value)[:80]}")
        return tuple(float(n) for n in value)
    kinds = {"truncate": bool, _ORIGINAL: int}.get(name, int | float)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        fields.fail(
            f"{name} of the rope scaling should be {'true or false' if kinds is bool else 'a number'}: {value!r}"
        )
    return value


def _yarn_attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def longrope_attention_factor(factor: float, original: int) -> float:
    """What cosines and sines are multiplied by unless stated: ``factor`` is the new length over the ``original`` one."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
