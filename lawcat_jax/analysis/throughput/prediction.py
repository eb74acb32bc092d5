"""What ``aot`` says about a program: ``python -m lawcat_jax.analysis.throughput.prediction REQUEST`` (a child of a sweep).

The compiler runs on the CPU, for devices of the kind ``Request.chip``; those of the machine are left alone.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from lawcat_jax.analysis import topology as topologies
from lawcat_jax.analysis.throughput import records
from lawcat_jax.errors import UserError
from lawcat_jax.files import write_json
from lawcat_jax.runtime import chips

_TPUS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_name(device_kind: str) -> str | None:
    """The name in ``lawcat_jax.runtime.chips`` of jax's device kind; None for one that ``aot`` has no figures of."""
    gpus = {gpu.kind: name for name, gpu in chips.GPUS.items()}
    return (_TPUS | gpus).get(device_kind)


def topology_of(name: str, devices: int) -> str:
    """The topology that has so many devices of one kind: ``h200:4``, ``h200:2x8``, ``v5e:2x4``, ``v5p:2x2x1``. TPUs come
    at least four together, so that for fewer it has more.

    Raises:
      UserError: TPUs whose number is no power of two, or GPUs that do not fill their machines.
    """
    chip = chips.CHIPS[name]
    if chip.is_gpu:
        machines = -(-devices // chips.NODE)
        if devices % machines:
            raise UserError(f"{devices} GPUs do not fill {machines} machines")
        return f"{name}:{devices}" if machines == 1 else f"{name}:{machines}x{devices // machines}"
    count, rest = divmod(max(devices, 4 * chip.devices), chip.devices)
    power = count.bit_length() - 1
    if rest or count != 2**power:
        raise UserError(f"no {name} slice has {devices} devices")
    share, rest = divmod(power, chip.dimensions)
    larger = [share + 1] * rest + [share] * (chip.dimensions - rest)
    powers = sorted(larger) if chip.dimensions == 2 else larger  # as slices are named: v5e:2x4, but v5p:2x2x1
    return f"{name}:{'x'.join(str(2**each) for each in powers)}"


def main(path: str) -> int:
    """Compile the programs of the request for its chip and mesh, and write the ``reports`` of ``aot``, or the
    ``problem`` that there is.
    """
    topologies.prepare_environment()
    os.environ["JAX_PLATFORMS"] = "cpu"
    request = records.read_request(path)
    try:
        found: dict[str, Any] = {"reports": _reports(request)}
    except UserError as problem:
        found = {"problem": records.one_line(problem)}
    write_json(request.results, found)
    return 0


def _reports(request: records.Request) -> list[dict[str, Any]]:
    from lawcat_jax.analysis import compile_report  # imports jax: after the environment is prepared
    from lawcat_jax.runtime import sharding

    config = request.settings()
    model = config.teacher.architecture
    assert model is not None  # the request states it
    topology = topology_of(request.chip, request.devices)
    devices = topologies.topology_devices(topology)
    chip = chips.chip_of(topology).as_devices(len(devices), topology)
    mesh = sharding.make_mesh(config.mesh, devices[: request.devices])
    found = []
    for name in request.stages:
        options = compile_report.Options(padded=False)
        if name == "prefill":
            options.prefill_batch, options.prefill_length = request.batch[name], request.length[name]
        report = compile_report.compile_program(name, config, model, mesh, chip, options)
        found.append({"topology": topology, **dataclasses.asdict(report)})
    return found


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]))))
