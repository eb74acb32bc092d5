"""The rows of a sweep: which meshes, and how many tokens each program gets on them. Nothing here asks for a device."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from fractions import Fraction

from jax.sharding import AbstractMesh

from lawcat_jax.config import Config, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding

SIZES = ("batch", "length", "prefill_batch", "prefill_length")
"""What may stand beside the axes of a mesh: sequences per step and tokens of each, in training and in a prefill."""


@dataclasses.dataclass(frozen=True)
class SweepMesh:
    """One mesh as the user wrote it (``text``): devices along each axis, and the sizes that are named for it."""

    text: str
    axes: dict[str, int]
    sizes: dict[str, int]

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return math.prod(self.axes.values())


@dataclasses.dataclass(frozen=True)
class Job:
    """One row: a program ("stage1", "stage2" or "prefill") on a mesh, with ``batch`` sequences of ``length`` tokens per
    call over all devices, and the configuration that says so.
    """

    mesh: SweepMesh
    program: str
    batch: int
    length: int
    config: Config


def parse(text: str) -> list[SweepMesh]:
    """The meshes of ``data=1;fsdp=2,tensor=2;sequence=8,prefill_length=1048576``: axes that are not named have size 1.

    Raises:
      UserError: another form, an unknown name, or a first mesh that is not the smallest, with which others are compared.
    """
    found = []
    for part in text.split(";"):
        values: dict[str, int] = {}
        for item in part.split(","):
            name, _, value = (word.strip() for word in item.partition("="))
            if name not in (*sharding.AXES, *SIZES):
                raise UserError(
                    f"--mesh_sweep: {item.strip()!r} is not one of {', '.join((*sharding.AXES, *SIZES))} with a number, "
                    "as in 'data=1;data=2;fsdp=2,tensor=2'"
                )
            if not re.fullmatch("[0-9]{1,9}", value) or int(value) == 0 or name in values:
                raise UserError(f"--mesh_sweep: {item.strip()!r} must be a whole number of at least 1, once in a mesh")
            values[name] = int(value)
        axes = {axis: values.get(axis, 1) for axis in sharding.AXES}
        found.append(SweepMesh(part.strip(), axes, {name: values[name] for name in SIZES if name in values}))
    if found[0].devices > min(mesh.devices for mesh in found):
        raise UserError(
            f"--mesh_sweep: {found[0].text} stands first and so must be the smallest: others are held against it"
        )
    return found


def jobs(
    meshes: list[SweepMesh], programs: list[str], config: Config, model: ModelConfig, *, batch: int = 0, length: int = 0
) -> list[Job]:
    """All rows, mesh by mesh. Every device gets as many tokens per call as on the first mesh: in training more
    sequences, in a prefill longer ones along ``sequence`` and more of them along the other axes.

    Args:
      meshes: the first is the smallest. Sizes that a mesh names hold for it, and those of the first for all after it.
      programs: of "stage1", "stage2" and "prefill".
      config: what is swept; its own mesh does not count.
      model: the teacher's shape.
      batch, length: of training on the first mesh; 0: the configuration's.

    Raises:
      UserError, ConfigError: sizes that do not split over a mesh, or do not fit each other.
    """
    found = []
    for mesh in meshes:
        for program in programs:
            try:
                job = _job(mesh, meshes[0], program, config, batch, length)
                _check(job, model)
            except UserError as problem:
                raise UserError(f"--mesh_sweep: {mesh.text}: {problem}") from problem
            found.append(job)
    return found


def _job(mesh: SweepMesh, first: SweepMesh, program: str, config: Config, batch: int, length: int) -> Job:
    own = copy.deepcopy(config)
    own.mesh = dataclasses.replace(config.mesh, **mesh.axes)
    more = Fraction(mesh.devices, first.devices)
    if program == "prefill":
        longer = Fraction(mesh.axes["sequence"], first.axes["sequence"])
        length = _scaled("prefill_length", length or config.last_stage()[1].seq_length, longer, mesh, first)
        batch = _scaled("prefill_batch", first.axes["data"] * first.axes["fsdp"], more / longer, mesh, first)
        return Job(mesh, program, batch, length, own)
    stage = getattr(own, program)
    stage.batch_size = _scaled("batch", batch or stage.batch_size, more, mesh, first)
    stage.seq_length = _scaled("length", length or stage.seq_length, Fraction(1), mesh, first)
    return Job(mesh, program, stage.batch_size, stage.seq_length, own)


def _scaled(name: str, default: int, times: Fraction, mesh: SweepMesh, first: SweepMesh) -> int:
    """The size that a mesh names, or that of the first mesh so many times.

    Raises:
      UserError: not a whole number.
    """
    if name in mesh.sizes:
        return mesh.sizes[name]
    base = first.sizes.get(name, default)
    if (base * times).denominator != 1:
        raise UserError(f"{base} of {first.text} become {float(base * times):g} here; give {name}=... in this mesh")
    return int(base * times)


def _check(job: Job, model: ModelConfig) -> None:
    """Refuse what would not run or not split, as the trainer would.

    Raises:
      UserError, ConfigError: what is wrong.
    """
    sizes = AbstractMesh(tuple(job.mesh.axes.values()), tuple(job.mesh.axes))
    sharding.check_mesh(job.config, model, sizes, [job.program])
    if job.program != "prefill":
        return job.config.validate()
    rows, parts = job.mesh.axes["data"] * job.mesh.axes["fsdp"], job.mesh.axes["sequence"]
    if job.batch % rows:
        raise UserError(f"prefill_batch: {job.batch} does not split over data x fsdp = {rows}")
    if job.length % parts:
        raise UserError(f"prefill_length: sequence={parts} does not divide {job.length}")
