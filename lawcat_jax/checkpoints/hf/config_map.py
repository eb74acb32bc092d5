"""``config.json`` of Hugging Face <-> :class:`~lawcat_jax.config.ModelConfig`.

What all families share is here; what one family has of its own is in its file in
:mod:`lawcat_jax.checkpoints.hf.families`, the rotary embedding in :mod:`lawcat_jax.checkpoints.hf.rope_map`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lawcat_jax.checkpoints.hf import families
from lawcat_jax.checkpoints.hf.fields import Fields
from lawcat_jax.checkpoints.hf.rope_map import rope_from_hf, rope_to_hf
from lawcat_jax.config import Family, ModelConfig, model_problems, type_problems
from lawcat_jax.errors import UserError

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_config_from_hf(
    values: dict[str, Any], where: str = "config.json", generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The architecture that a Hugging Face configuration describes.

    Args:
      values: the parsed ``config.json``.
      where: named in error messages.
      generation: token ids of ``generation_config.json`` (:func:`generation_ids`), which take precedence.

    Raises:
      UserError: unsupported architecture or option, or fields that are missing, of the wrong type or out
        of range; all problems in one message.
    """
    name = _family(values, where)
    family = families.find(name)
    fields = Fields(values, family.defaults, where)
    problems = [f"{name} is missing" for name in _REQUIRED if values.get(name) is None]
    problems += [
        f"{name}: {values[name]!r} is not a int"
        for name in _REQUIRED
        if values.get(name) is not None and (not isinstance(values[name], int) or isinstance(values[name], bool))
    ]
    problems += _unsupported(values, family)
    if problems:
        fields.fail("; ".join(problems))
    heads, hidden, head_dim = values["num_attention_heads"], values["hidden_size"], fields.get("head_dim")
    if head_dim is None and heads > 0 and hidden > 0:
        if hidden % heads:
            fields.fail(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    kv_heads = fields.get("num_key_value_heads")
    theta, scaling = rope_from_hf(fields, family.rope_types)
    config = ModelConfig(
        family=name,
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=cast(int, head_dim),  # None only beside sizes that are refused below
        mlp_size=values["intermediate_size"],
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=fields.get("max_position_embeddings"),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        **token_ids({name: fields.get(name) for name in TOKEN_IDS} | dict(generation or {})),
        **family.read(fields),
    )
    problems = type_problems(config, "")
    problems = [problem.removeprefix(".") for problem in problems or model_problems(config, "")]
    if problems:
        fields.fail("; ".join(problems))
    return config


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A ``config.json`` that transformers 4 and 5 both load to the same architecture.

    Args:
      config: the architecture.
      dtype: of the weights, e.g. ``bfloat16``.
    """
    family = families.find(config.family)
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        **rope_to_hf(config),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        **token_ids_to_hf(config),
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        **family.write(config),
    }


def token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """Special token ids as fields of :class:`ModelConfig`; only those that ``values`` has."""
    fields = {name: values[name] for name in ("bos_token_id", "pad_token_id") if name in values}
    if "eos_token_id" in values:
        eos = values["eos_token_id"]
        fields["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return fields


def token_ids_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`token_ids`, with null for those that the model does not have."""
    eos = list(config.eos_token_ids)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "pad_token_id": config.pad_token_id,
    }


def generation_ids(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The special token ids that a ``generation_config.json`` states: what generation goes by, whatever config.json says
    (chat models often name their end of turn here alone).

    Raises:
      UserError: an id that is no whole number, or for ``eos_token_id`` a list of them.
    """
    found = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
    for name, value in found.items():
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in ids):
            raise UserError(
                f"{where}: {name} {value!r} should be a token id; correct it, or remove it to use config.json"
            )
    return found


def _family(values: dict[str, Any], where: str) -> Family:
    known = {family.architecture: name for name, family in families.table().items()}
    supported = ", ".join(known)
    architectures = values.get("architectures") or []
    name = values.get("model_type")
    if not isinstance(architectures, list) or len(architectures) > 1:
        raise UserError(f"{where}: architectures {architectures!r} is not one name; supported: {supported}")
    if architectures:
        named = known.get(str(architectures[0]))
        if named is None or name not in (None, named):
            raise UserError(
                f"{where}: architecture {architectures[0]!r} (model_type {name!r}) is not supported; "
                f"supported: {supported}"
            )
        return cast(Family, named)
    if name not in known.values():
        raise UserError(f"{where}: model_type {name!r} is not supported; supported: {supported}")
    return cast(Family, name)


def _unsupported(values: dict[str, Any], family: families.Family) -> list[str]:
    problems = []
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name) and name not in family.options:
            problems.append(f"{name} true is not supported (these projections have no bias in {family.architecture})")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act {values['hidden_act']!r} is not supported (supported: 'silu')")
    if values.get("is_causal") is not None and not values["is_causal"]:
        problems.append("is_causal false is not supported (every token here sees the earlier ones only)")
    if values.get("quantization_config"):
        problems.append("quantized weights (quantization_config) are not supported; convert the original checkpoint")
    if values.get("transformers_weights") not in (None, "model.safetensors", "model.safetensors.index.json"):
        problems.append(
            f"transformers_weights {values['transformers_weights']!r} is not supported; name that file model.safetensors"
        )
    for share in [values, *(values.get(name) for name in ("rope_scaling", "rope_parameters"))]:
        part = share.get("partial_rotary_factor") if isinstance(share, dict) else None
        if part not in (None, 1, 1.0) and "partial_rotary_factor" not in family.options:
            problems.append(f"partial_rotary_factor {part!r} is not supported")
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and len({str(kind) for kind in kinds}) > 1 and "layer_types" not in family.options:
        problems.append("layer_types that differ between layers are not supported")
    return problems
