"""The rotary embedding's scaling in a GGUF file, as the ``rope_scaling`` of a ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_jax.checkpoints.gguf.file import GgufFile
from lawcat_jax.errors import UserError

FACTORS = "rope_freqs.weight"
"""The tensor with what llama3 scaling divides each rotary frequency by."""
_KINDS = ("none", "linear", "yarn")
# llama.cpp's converter copies attention_factor, beta_fast and beta_slow of config.json into these, as they are.
_YARN = {
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


def rope_scaling(
    file: GgufFile, get: Callable[..., Any], theta: float, head_dim: int
) -> tuple[dict[str, Any] | None, set[str]]:
    """(``rope_scaling`` or None, entries that were read for it beside type, factor and original length).

    Args:
      file: the opened file.
      get: an entry by its name without the architecture, or a default.
      theta: base of the frequencies.
      head_dim: dimensions that are rotated.

    Raises:
      UserError: a kind that is not supported, two scalings at once, or frequencies that are none of Llama 3's.
    """
    kind = get("rope.scaling.type", "linear")  # a factor without a kind is linear scaling
    if kind not in _KINDS:
        raise UserError(f"{file.path}: rope scaling {kind!r} is not supported in GGUF; supported: {', '.join(_KINDS)}")
    # rope.scale_linear is the name in old files; llama.cpp takes zero for "no scaling".
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 1.0
    scaling = {"rope_type": kind, "factor": factor}
    read = set()
    if kind == "yarn":
        read = set(_YARN.values())
        stated = {ours: get(theirs) for ours, theirs in _YARN.items()}
        # llama.cpp takes a negative number for "not set".
        scaling |= {name: n for name, n in stated.items() if isinstance(n, int | float) and n >= 0}
    # Without interpolation YaRN still scales cosines and sines, where the file says by how much.
    plain = kind == "none" or (factor == 1.0 and scaling.get("attention_factor", 1.0) == 1.0)
    if original := get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = original
    if FACTORS not in file.tensors:
        return (None if plain else scaling), read
    tensor = file.tensors[FACTORS]
    if tensor.shape != (head_dim // 2,):
        raise UserError(f"{file.path}: {FACTORS} is {list(tensor.shape)}, should be {[head_dim // 2]}")
    divided = _llama3(file.path, tensor.rows(0, head_dim // 2).astype(np.float64), theta)
    if divided is not None and not plain:
        raise UserError(f"{file.path}: {FACTORS} beside {kind} scaling by {factor} is not supported")
    return (divided or (None if plain else scaling)), read


def _llama3(path: Path, divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The parameters of llama3 scaling, which GGUF replaces by the numbers that the frequencies are divided by.

    Frequencies with wavelengths below ``original / high`` stay, those above ``original / low`` are divided by
    ``factor``, in between the factor is blended. Llama 3.1 to 3.3 all have low 1, high 4 and original 8192.

    Raises:
      UserError: no such parameters give these numbers.
    """
    if np.all(divisors == 1):
        return None
    wavelength = 2 * math.pi * theta ** (np.arange(divisors.size) / divisors.size)
    for original in (8192, 4096, 16384, 32768, 2048, 65536, 131072, 1024, 512, 256, 128, 64):
        for factor in {float(divisors.max()), 8.0, 32.0, 16.0, 4.0, 2.0}:
            blend = np.clip((original / wavelength - 1) / (4 - 1), 0, 1)
            if np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }
    raise UserError(
        f"{path}: {FACTORS} is not the scaling of Llama 3.1 to 3.3 (low 1, high 4); convert the original checkpoint"
    )
