"""TPU chips as the reports assume them: memory, peak rates and links of one JAX device."""

from __future__ import annotations

import math
from typing import NamedTuple

from lawcat_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One JAX device. ``ici`` are bytes a second that a ring along one axis of the torus moves, both directions."""

    name: str
    hbm_bytes: float
    flops: float  # bf16 operations a second
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float
    dimensions: int  # of the topology's name
    devices: int = 1  # JAX devices a chip

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
        return (
            f"{self.name}: {self.hbm_bytes / GIB:.0f} GiB of HBM at {self.hbm_bandwidth / 1e12:.2f} TB/s, "
            f"{self.flops / 1e12:.0f} bf16 TFLOP/s, {self.ici_bandwidth / 1e9:.0f} GB/s of ICI along one torus axis"
        )


CHIPS = {
    "v4": Chip("v4", 32 * GIB, 275e12, 1.23e12, 90e9, 3),
    "v5e": Chip("v5e", 16 * GIB, 197e12, 0.82e12, 90e9, 2),
    "v5p": Chip("v5p", 95 * GIB, 459e12, 2.77e12, 180e9, 3),
    "v6e": Chip("v6e", 32 * GIB, 918e12, 1.64e12, 180e9, 2),
    # A chip of this generation is two JAX devices; each has half of its 192 GiB, 2307 TFLOP/s and 7.4 TB/s.
    "tpu7x": Chip("tpu7x (one of two devices a chip)", 96 * GIB, 1153e12, 3.7e12, 180e9, 3, devices=2),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology name such as ``v5e:4x4`` or ``v5p:4x4x4``.

    Raises:
      UserError: an unknown chip, or a shape that it does not come in.
    """
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        raise UserError(f"--topology={topology}: unknown chip {name!r}, known: {', '.join(CHIPS)} (as in v5e:4x4)")
    sizes = shape.split("x")
    if len(sizes) != chip.dimensions or not all(size.isdigit() and int(size) > 0 for size in sizes):
        example = ":2x2" if chip.dimensions == 2 else ":2x2x1"
        raise UserError(
            f"--topology={topology}: {name} slices have {chip.dimensions} dimensions, as in {name}{example}"
        )
    return chip
