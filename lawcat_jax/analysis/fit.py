"""Whether a configuration fits on devices that are not there: compile, print, and say so. The work of ``lawcat_jax.aot``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from lawcat_jax.analysis import topology as topologies
from lawcat_jax.config import Config
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import chips


def print_fit(
    config: Config, *, topology: str, programs: Sequence[str] | None, sizes: Mapping[str, int], as_json: bool
) -> int:
    """Compile programs of ``config`` and print what each needs; returns 0 when everything fits, 1 when something does
    not. Call it before jax is imported.

    Args:
      topology: devices to compile for, such as ``v5e:4x4`` or ``h200:8``.
      programs: which to compile; None for all that ``config`` has (enabled stages, prefill, decode).
      sizes: ``prefill_length``, ``prefill_batch`` and ``decode_batch``, 0 for the default.
      as_json: one JSON object instead of text.

    Raises:
      UserError: an unknown topology or program, sizes that cannot be, no teacher to read, or no compiler.
    """
    topologies.prepare_environment()
    from lawcat_jax.analysis import compile_report, compile_report_text
    from lawcat_jax.runtime import sharding
    from lawcat_jax.training import inputs

    chip = chips.chip_of(topology)
    names = _chosen(programs, compile_report.programs(config))
    for name, value in sizes.items():
        if value < 0:
            raise UserError(f"--{name}={value}: must be at least 1, or 0 for the default")
    options = compile_report.Options(sizes["prefill_length"], sizes["prefill_batch"], sizes["decode_batch"])
    model = inputs.architecture(config)
    devices = topologies.topology_devices(topology)
    chip = chip.as_devices(len(devices), topology)
    mesh = sharding.make_mesh(config.mesh, devices, rows=sharding.common_rows(config))
    sharding.check_mesh(config, model, mesh, names)
    length, parts = options.prefill_length or config.last_stage()[1].seq_length, mesh.shape["sequence"]
    if "prefill" in names and length % parts:
        raise UserError(f"--prefill_length={length}: config.mesh.sequence={parts} does not divide it")
    if not as_json:
        print(compile_report_text.heading(topology, chip, mesh, config), flush=True)
    reports = []
    for name in names:
        reports.append(compile_report.compile_program(name, config, model, mesh, chip, options))
        if not as_json:
            print(compile_report_text.text(reports[-1]), flush=True)
    if as_json:
        print(json.dumps(compile_report_text.as_json(topology, chip, mesh, reports), indent=1))
    failed = [report for report in reports if not report.fits]
    for report in failed:
        print(f"error: {report.problem}", file=sys.stderr, flush=True)
    return 1 if failed else 0


def _chosen(programs: Sequence[str] | None, available: list[str]) -> list[str]:
    for name in programs or ():
        if name not in available:
            raise UserError(f"--stages: {name!r} is not one of this configuration's programs, {', '.join(available)}")
    return available if programs is None else list(programs)
