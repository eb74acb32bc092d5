"""Which of a GGUF file's ``<architecture>.*`` entries are understood; one that is not, and matters, is refused by name.

Every entry is read, without a part in the logits, neutral (it says "not used"), or refused. llama.cpp has one namespace
for all architectures and may obey an entry that its converter never writes for this one, so an entry that is unknown here
is taken for one that changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lawcat_jax.errors import UserError

_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
"""Width in tokens; and for each layer whether it has the window (a number n: all but every n-th layer)."""
_INERT = {
    "vocab_size",  # the embedding has so many rows
    "tensor_data_layout",  # what llama.cpp's first converter called the only layout there is
    "rope.scaling.finetuned",  # whether the model was trained with the scaling
    "pooling_type",  # how llama.cpp makes an embedding of the hidden states
    "attention.layer_norm_epsilon",  # of LayerNorm, which none of these families has
}
_SCALES = {"logit_scale", "residual_scale", "embedding_scale", "attention.output_scale", "rope.scaling.attn_factor"}
_NEUTRAL: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    # llama.cpp takes a scale of zero for "no scale".
    **{name: lambda value, _: value == 1 for name in _SCALES},
    "attention.causal": lambda value, _: value is True,
    "attention.scale": lambda value, values: abs(value * values["head_dim"] ** 0.5 - 1) < 1e-5,
    "rope.freq_base_swa": lambda value, values: value == values["rope_theta"],
    # How much of YaRN there is: all of it, or (below zero) what the kind of scaling says.
    "rope.scaling.yarn_ext_factor": lambda value, _: value == 1 or value < 0,
}


def check_keys(path: Path, metadata: Mapping[str, Any], values: Mapping[str, Any], understood: Collection[str]) -> None:
    """Refuse entries that change what the model computes and have no counterpart here.

    Args:
      path: of the file, for the message.
      metadata: all entries of the file.
      values: the configuration that was made of them: ``head_dim``, ``rope_theta``.
      understood: entries, without the architecture's name, that this file's architecture has read beside those that every
        architecture has.

    Raises:
      UserError: naming each such entry and its value.
    """
    prefix = f"{metadata['general.architecture']}."
    found = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    known = _READ | _INERT | set(understood)
    odd = [
        f"{prefix}{name} = {str(value)[:60]}"
        for name, value in found.items()
        if name not in known and not _is_neutral(name, value, values)
    ]
    if odd:
        raise UserError(f"{path}: not supported, and it changes the result: {', '.join(odd)}")


def _is_neutral(name: str, value: Any, values: Mapping[str, Any]) -> bool:
    if isinstance(value, list):
        return all(_is_neutral(name, entry, values) for entry in value)
    if name == "attention.causal":
        return value is True
    if value in (0, "", "none"):  # also False and 0.0
        return True
    if name not in _NEUTRAL or not isinstance(value, int | float):
        return False
    return _NEUTRAL[name](value, values)
