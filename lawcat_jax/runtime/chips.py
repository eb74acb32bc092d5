"""Memory, peak rates and links of one JAX device, a TPU's or a GPU, as the reports assume them.

For GPUs also what XLA's compiler asks about a card, so that it can compile where there is none.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from lawcat_jax.errors import UserError

GIB = 2**30
NODE = 8
"""GPUs of a machine that NVLink joins all to all."""


class Chip(NamedTuple):
    """One JAX device. ``ici_bandwidth`` is what a ring along one axis of the torus moves in bytes per second, both
    directions together; for a GPU, what it sends over NVLink.
    """

    name: str
    hbm_bytes: float  # for a GPU, what the driver leaves to a process
    flops: float  # bf16 operations per second
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float
    dimensions: int  # of the topology's name
    devices: int = 1  # JAX devices per chip
    network_bandwidth: float = 0.0  # bytes per second that a GPU sends to other machines

    @property
    def is_gpu(self) -> bool:
        """Whether this is an NVIDIA GPU, else a TPU."""
        return self.name in GPUS

    def as_devices(self, count: int, topology: str) -> Chip:
        """The chip as JAX divides it where a slice ``topology`` has ``count`` devices (v4 may show its two cores)."""
        chips = math.prod(int(size) for size in topology.partition(":")[2].split("x"))
        parts = max(1, count // (chips * self.devices))
        if parts == 1:
            return self
        return self._replace(
            name=f"{self.name} (one of {parts} devices a chip)",
            hbm_bytes=self.hbm_bytes / parts,
            flops=self.flops / parts,
            hbm_bandwidth=self.hbm_bandwidth / parts,
            devices=self.devices * parts,
        )

    def assumptions(self) -> str:
        """The figures, in words."""
        links = f"{self.ici_bandwidth / 1e9:.0f} GB/s of ICI along one torus axis"
        if self.is_gpu:
            links = f"{self.ici_bandwidth / 1e9:.0f} GB/s sent over NVLink, {self.network_bandwidth / 1e9:.0f} to other"
            links += " machines"
        return (
            f"{self.name}: {self.hbm_bytes / GIB:.0f} GiB of HBM at {self.hbm_bandwidth / 1e12:.2f} TB/s, "
            f"{self.flops / 1e12:.0f} bf16 TFLOP/s, {links}"
        )


class Gpu(NamedTuple):
    """What XLA's compiler asks about a GPU; SM: streaming multiprocessor."""

    kind: str  # the device's name
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int  # float32 units of an SM
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int  # of an SM; a block may ask for all but 1 KiB of it


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 40 * 2**20, 164 * 2**10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 50 * 2**20, 228 * 2**10),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 60 * 2**20, 228 * 2**10),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 1.965, 126 * 2**20, 228 * 2**10),
}

CHIPS = {
    "v4": Chip("v4", 32 * GIB, 275e12, 1.23e12, 90e9, 3),
    "v5e": Chip("v5e", 16 * GIB, 197e12, 0.82e12, 90e9, 2),
    "v5p": Chip("v5p", 95 * GIB, 459e12, 2.77e12, 180e9, 3),
    "v6e": Chip("v6e", 32 * GIB, 918e12, 1.64e12, 180e9, 2),
    # A chip of this generation is two JAX devices; each has half of its 192 GiB, 2307 TFLOP/s and 7.4 TB/s.
    "tpu7x": Chip("tpu7x (one of two devices a chip)", 96 * GIB, 1153e12, 3.7e12, 180e9, 3, devices=2),
    # SXM cards, dense bf16; the network is one 200 or 400 Gbit/s port per GPU.
    "a100": Chip("a100", 79.1 * GIB, 312e12, 2.04e12, 300e9, 1, network_bandwidth=25e9),
    "h100": Chip("h100", 79.1 * GIB, 989e12, 3.35e12, 450e9, 1, network_bandwidth=50e9),
    "h200": Chip("h200", 139.8 * GIB, 989e12, 4.8e12, 450e9, 1, network_bandwidth=50e9),
    "b200": Chip("b200", 178.3 * GIB, 2250e12, 8e12, 900e9, 1, network_bandwidth=50e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology name such as ``v5e:4x4``, ``v5p:4x4x4``, ``h200:8`` or ``h200:2x8``.

    Raises:
      UserError: an unknown chip, or a shape that it does not come in.
    """
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        known = ", ".join(CHIPS)
        raise UserError(f"--topology={topology}: unknown chip {name!r}, known: {known} (as in v5e:4x4 or h200:8)")
    if chip.is_gpu:
        gpu_shape(topology)
        return chip
    sizes = shape.split("x")
    if len(sizes) != chip.dimensions or not all(re.fullmatch("[0-9]{1,6}", size) and int(size) > 0 for size in sizes):
        example = ":2x2" if chip.dimensions == 2 else ":2x2x1"
        raise UserError(
            f"--topology={topology}: {name} slices have {chip.dimensions} dimensions, as in {name}{example}"
        )
    return chip


def gpu_shape(topology: str) -> tuple[int, int]:
    """(machines, GPUs of each) of a name such as ``h200:8`` or ``h200:2x8``.

    Raises:
      UserError: another form, or more GPUs than a machine has.
    """
    name, _, shape = topology.partition(":")
    sizes = shape.split("x")
    if len(sizes) > 2 or not all(re.fullmatch("[0-9]{1,6}", size) and int(size) > 0 for size in sizes):
        raise UserError(f"--topology={topology}: GPUs, or machines x GPUs of each, as in {name}:8 or {name}:2x8")
    machines, gpus = (int(size) for size in ["1", *sizes][-2:])
    if gpus > NODE:
        machines = -(-machines * gpus // NODE)
        raise UserError(f"--topology={topology}: a machine has {NODE} GPUs at most; more are {name}:{machines}x{NODE}")
    return machines, gpus


def gpu_target(name: str) -> str:
    """The card ``name`` of :data:`GPUS` as text of XLA's ``GpuTargetConfigProto``."""
    chip, gpu = CHIPS[name], GPUS[name]
    major, minor = gpu.capability
    # Of Hopper and later, wgmma, setmaxnreg and the like exist in the variant of the architecture named "a" only.
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    fields = {
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.lanes,
        "clock_rate_ghz": gpu.clock_ghz,
        "memory_bandwidth": round(chip.hbm_bandwidth),
        "device_memory_size": round(chip.hbm_bytes),
        "l2_cache_size": gpu.l2_bytes,
        "shared_memory_per_core": gpu.shared_bytes,
        "shared_memory_per_block_optin": gpu.shared_bytes - 2**10,
        # The same on all of them.
        "shared_memory_per_block": 48 * 2**10,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "threads_per_core_limit": 2048,
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
    }
    lines = [f"  {field}: {value}" for field, value in fields.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}")
    # What XLA may leave to cuDNN depends on its version.
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{gpu.kind}"',
            "",
        ]
    )
