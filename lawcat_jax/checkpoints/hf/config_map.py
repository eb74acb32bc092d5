"""``config.json`` of Hugging Face <-> :class:`~lawcat_jax.config.ModelConfig`.

transformers 4 stores ``rope_theta`` and ``rope_scaling``; transformers 5 stores both in ``rope_parameters``.
Both forms are read, and both are written side by side: version 5 lets a non-null ``rope_scaling`` override
``rope_parameters`` and takes ``rope_theta`` from beside it, version 4 ignores ``rope_parameters``.
"""

from __future__ import annotations

from typing import Any

from lawcat_jax.config import ModelConfig, RopeScaling, model_problems, type_problems
from lawcat_jax.errors import UserError

SUPPORTED = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_ROPE_TYPES = ("default", "linear", "llama3")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers assumes for a field that config.json does not state.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def model_config_from_hf(values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture that a Hugging Face configuration describes.

    Args:
      values: the parsed ``config.json``.
      where: named in error messages.

    Raises:
      UserError: unsupported architecture or option, or fields that are missing, of the wrong type or out
        of range; all problems in one message.
    """
    family = _family(values, where)
    problems = [f"{name} is missing" for name in _REQUIRED if values.get(name) is None]
    problems += _unsupported(values)
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")

    def get(name: str, default: Any = None) -> Any:
        return values.get(name, _DEFAULTS[family].get(name, default))

    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    head_dim = values.get("head_dim")
    if head_dim is None and all(isinstance(n, int) and n > 0 for n in (heads, hidden)):
        if hidden % heads:
            raise UserError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        head_dim = hidden // heads
    kv_heads = get("num_key_value_heads")
    eos = get("eos_token_id")
    theta, scaling = _rope_from_hf(values, where)
    config = ModelConfig(
        family=family,
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        mlp_size=values["intermediate_size"],
        rms_norm_eps=get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=get("max_position_embeddings"),
        tie_embeddings=get("tie_word_embeddings", False),
        sliding_window=get("sliding_window") if family == "mistral" else None,
        bos_token_id=get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=values.get("pad_token_id"),
    )
    problems = type_problems(config, "")
    problems = [problem.removeprefix(".") for problem in problems or model_problems(config, "")]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    return config


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A ``config.json`` that transformers 4 and 5 both load to the same architecture.

    Args:
      config: the architecture.
      dtype: of the weights, e.g. ``bfloat16``.
    """
    eos = list(config.eos_token_ids)
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default" if scaling.kind == "none" else scaling.kind}
    if scaling.kind != "none":
        rope["factor"] = scaling.factor
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    values: dict[str, Any] = {
        "architectures": [SUPPORTED[config.family]],
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
        "rope_theta": config.rope_theta,
        # Version 4 reads the older key "type" for linear scaling, and refuses neither.
        "rope_scaling": None if scaling.kind == "none" else {**rope, "type": rope["rope_type"]},
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if config.family == "llama":
        values |= {"attention_bias": False, "mlp_bias": False}
    else:
        values["sliding_window"] = config.sliding_window
    return values


def _family(values: dict[str, Any], where: str) -> str:
    supported = ", ".join(SUPPORTED.values())
    architectures = values.get("architectures") or []
    family = values.get("model_type")
    if not isinstance(architectures, list) or len(architectures) > 1:
        raise UserError(f"{where}: architectures {architectures!r} is not one name; supported: {supported}")
    if architectures:
        named = {name: key for key, name in SUPPORTED.items()}.get(architectures[0])
        if named is None or family not in (None, named):
            raise UserError(
                f"{where}: architecture {architectures[0]!r} (model_type {family!r}) is not supported; "
                f"supported: {supported}"
            )
        return named
    if family not in SUPPORTED:
        raise UserError(f"{where}: model_type {family!r} is not supported; supported: {supported}")
    return family


def _unsupported(values: dict[str, Any]) -> list[str]:
    problems = []
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            problems.append(f"{name} true is not supported (projections here have no bias)")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act {values['hidden_act']!r} is not supported (supported: 'silu')")
    if values.get("quantization_config"):
        problems.append("quantized weights (quantization_config) are not supported; convert the original checkpoint")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor {values['partial_rotary_factor']!r} is not supported")
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and len({str(kind) for kind in kinds}) > 1:
        problems.append("layer_types that differ between layers are not supported")
    return problems


def _rope_from_hf(values: dict[str, Any], where: str) -> tuple[float, RopeScaling]:
    # The precedence of transformers 5: a non-null rope_scaling wins over rope_parameters.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_scaling / rope_parameters should be an object, not {rope!r}")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is None and isinstance(values.get("rope_parameters"), dict):
        theta = values["rope_parameters"].get("rope_theta")
    theta = 10000.0 if theta is None else theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[kind]
    missing = [name for name in needed if rope.get(name) is None]
    if missing:
        raise UserError(f"{where}: rope type {kind!r} needs {', '.join(missing)}")
    scaling = RopeScaling(**({"kind": "none"} if kind == "default" else {"kind": kind, **{n: rope[n] for n in needed}}))
    return theta, scaling
