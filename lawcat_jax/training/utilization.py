"""Model FLOPs utilisation: the operations that the model needs, as a share of what the devices can do at their peak."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax

from lawcat_jax.config import Config, ModelConfig
from lawcat_jax.models.flops import model_flops
from lawcat_jax.runtime.chips import CHIPS

# Dense bf16 operations per second by the first words of jax's device kind; the first that matches counts, so longer
# names stand before their beginnings. Other cards of a name (NVL, PCIe) have other clocks.
# Sources: the vendors' data sheets (without sparsity).
_PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v5 lite", CHIPS["v5e"].flops),
    ("TPU v5e", CHIPS["v5e"].flops),
    ("TPU v5p", CHIPS["v5p"].flops),
    ("TPU v5", CHIPS["v5p"].flops),
    ("TPU v6e", CHIPS["v6e"].flops),
    ("TPU v6 lite", CHIPS["v6e"].flops),
    ("TPU7x", CHIPS["tpu7x"].flops),
    ("TPU v4 lite", 138e12),
    ("TPU v4", CHIPS["v4"].flops),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200 NVL", 835.5e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L40", 181e12),
    ("NVIDIA L4", 121e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 operations per second of one device; None when unknown (a CPU, a card of another name, a part of one)."""
    if "MIG" in device_kind:
        return None
    return next((peak for name, peak in _PEAKS if re.match(rf"{re.escape(name)}(?![0-9A-Za-z])", device_kind)), None)


def utilization(
    stage: str,
    config: Config,
    model: ModelConfig,
    devices: list[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # a variable to pyright
) -> Callable[[float], float | None]:
    """A function from tokens per second (over all ``devices``) to the model FLOPs utilisation of a stage, in [0, 1], or
    to None where the devices' peak is unknown.

    Only valid tokens count, by the operations of :func:`lawcat_jax.models.flops.model_flops`: padding and recomputation
    are time lost.
    """
    devices = jax.devices() if devices is None else devices
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return lambda speed: None
    share = model_flops(stage, config, model, getattr(config, stage).seq_length) / (peak * len(devices))
    return lambda speed: speed * share
