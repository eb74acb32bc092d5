"""Compilers for devices that are not there: TPU slices through libtpu, GPUs through jax's CUDA plugin, on a CPU.

Imports no jax before it is asked for devices, so that :func:`prepare_environment` can come first.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from typing import Any

from lawcat_jax.analysis import packages
from lawcat_jax.errors import UserError
from lawcat_jax.runtime.chips import Chip, chip_of, gpu_shape, gpu_target


def prepare_environment() -> None:
    """Let libtpu start on a machine without a TPU and beside other such processes; call before jax is imported."""
    # A lock file would allow one process a machine; nothing is shared when no chip is there.
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}.items():
        os.environ.setdefault(name, value)
    # What libtpu asks the cloud's metadata server for where nothing is set, and then warns about.
    defaults = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_LOG_DIR": "disabled"}
    for name, value in (defaults | {"TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "2"}).items():
        os.environ.setdefault(name, value)


def topology_devices(topology: str) -> list[Any]:
    """Devices of a TPU slice, or GPUs, to compile for.

    Raises:
      UserError: libtpu or the CUDA plugin is not installed, or does not know the topology.
    """
    chip = chip_of(topology)
    if chip.is_gpu:
        return _gpus(topology, chip)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"libtpu, the TPU compiler, is not installed: {compiler_wheels('tpu')} (it needs no TPU)")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as problem:  # whatever libtpu raises
        line = " ".join(str(problem).split())[:200]
        if "topology" in line.lower() or "INVALID_ARGUMENT" in line:
            raise UserError(f"--topology={topology}: libtpu does not know this slice ({line})") from problem
        raise UserError(f"libtpu could not start ({line})") from problem


def _gpus(topology: str, chip: Chip) -> list[Any]:
    if not packages.installed(packages.CUDA_PLUGINS):
        raise UserError(
            f"jax's CUDA plugin, with the GPU compiler, is not installed: {compiler_wheels(cuda_extra())} (it needs no GPU)"
        )
    memory_limit(chip)  # the plugin reads the variable too, but does not say when it is wrong
    from jax.experimental import topologies

    machines, gpus = gpu_shape(topology)
    # One group of machines that the network joins.
    options = {"target_config": gpu_target(chip.name), "topology": f"1x{machines}x{gpus}"}
    try:
        return list(topologies.get_topology_desc(topology, platform="cuda", **options).devices)
    except Exception as problem:  # whatever the plugin raises
        line = " ".join(str(problem).split())[:200]
        raise UserError(f"the GPU compiler could not start ({line}): python -m lawcat_jax.doctor") from problem


def cuda_extra() -> str:
    """The extra of jax that installs the CUDA plugin which is installed: "cuda12" or "cuda13" (also when none is)."""
    return next((name.split("-")[1] for name in packages.installed(packages.CUDA_PLUGINS)), "cuda13")


def compiler_wheels(extra: str) -> str:
    """The command that installs the compiler of "tpu", "cuda12" or "cuda13" for the jax that is installed."""
    return packages.jax_wheels(extra, importlib.metadata.version("jax"))


def memory_limit(chip: Chip) -> float:
    """Bytes that jax may allocate on one device: all of a TPU's memory, and the share of a GPU's that the environment
    variable XLA_CLIENT_MEM_FRACTION says (0.75 by default).

    Raises:
      UserError: that variable is not a number above 0.
    """
    if not chip.is_gpu:
        return chip.hbm_bytes
    name = next((name for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION") if os.getenv(name)), "")
    value = os.environ[name] if name else "0.75"
    if not re.fullmatch(r"\d*\.?\d+|\d+\.", value) or float(value) == 0:
        raise UserError(f"{name}={value}: must be a number above 0, such as 0.9")
    return float(value) * chip.hbm_bytes
