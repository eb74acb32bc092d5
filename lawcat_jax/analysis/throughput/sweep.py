"""One program after the other on one mesh after the other, and what ``aot`` predicts for each.

Every measurement is a process of its own: an allocator's peak cannot be reset, a mesh of some of the devices must not find
the memory that one before it left taken, and when XLA or NCCL aborts, which no exception tells, one row is lost.
Predictions come last, when nothing is measured any more: they keep the host's cores busy, and can be made elsewhere.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lawcat_jax.analysis import installation, packages
from lawcat_jax.analysis.throughput import meshes, prediction, records, run, sweep_report
from lawcat_jax.analysis.throughput.meshes import Job
from lawcat_jax.analysis.throughput.sweep_report import Row
from lawcat_jax.config import Config, to_dict
from lawcat_jax.errors import UserError
from lawcat_jax.files import atomic_file, read_json, write_json
from lawcat_jax.runtime import chips

PREDICTIONS = ("auto", "none", *chips.CHIPS)


def sweep(config: Config, options: run.Options, text: str, predict: str) -> int:
    """Measure all meshes of ``text`` (see :func:`lawcat_jax.analysis.throughput.meshes.parse`) that the machine has the
    devices for; write ``mesh_sweep.json`` and ``mesh_sweep.md`` after every row, and print the table.

    Args:
      config: what is measured; its mesh does not count.
      options: of the command line.
      text: the meshes.
      predict: a chip that ``aot`` knows, "auto" for that of the machine, or "none".

    Returns:
      0, or 1 when a row for which there are devices was not or only partly measured, or there was no such row.

    Raises:
      UserError, ConfigError: before anything is compiled: flags, meshes or sizes that cannot be.
    """
    options.stages = options.stages or [*run.enabled(config), "prefill"]
    run.check(options, config, ("prefill",))
    if predict not in PREDICTIONS:
        raise UserError(f"--predict={predict}: choose one of {', '.join(PREDICTIONS)}")
    found = meshes.parse(text)
    model = run.architecture(config)
    config.teacher.architecture = model
    jobs = meshes.jobs(found, options.stages, config, model, batch=options.batch, length=options.length)
    machine = installation.run_probe()
    if error := machine.get("error"):
        raise UserError(f"{error}; python -m lawcat_jax.doctor says more")
    return Sweep(config, options, jobs, machine["devices"], predict).run()


class Sweep:
    """One run of the command, with ``devices`` of the machine as :func:`lawcat_jax.analysis.probe.probe` lists them."""

    def __init__(self, config: Config, options: run.Options, jobs: list[Job], devices: list[dict], predict: str):
        self._config, self._options, self._jobs = config, options, jobs
        self._kind, self._count = devices[0]["kind"], len(devices)
        self._chip = prediction.chip_name(self._kind) if predict == "auto" else predict
        self._why_not = "not asked for" if predict == "none" else f"aot has no figures of {self._kind}"
        self._out = Path(options.out)
        self._deadline = time.time() + options.seconds if options.seconds else None
        self._rows = [Row(job.mesh.text, job.mesh.axes, job.program, job.batch, job.length) for job in jobs]

    def run(self) -> int:
        """Measure, predict, write and print; the exit code of :func:`sweep`."""
        for row in self._rows:
            row.problem = "not run: the sweep has not come to it"
            row.prediction_problem = "not made: the sweep has not come to it"
        self._write()
        for job, row in zip(self._jobs, self._rows, strict=True):
            row.problem = self._measure(job, row)
            self._write()
            print(sweep_report.line(row), flush=True)
        for job, row in zip(self._jobs, self._rows, strict=True):
            row.prediction_problem = self._predict(job, row)
            self._write()
        print(sweep_report.table(self._rows))
        print(f"wrote {self._out / 'mesh_sweep.json'} and {self._out / 'mesh_sweep.md'}", flush=True)
        possible = [row for row in self._rows if row.devices <= self._count]
        return 0 if possible and all(row.measured and not row.problem for row in possible) else 1

    def _measure(self, job: Job, row: Row) -> str:
        """Enter the measurement of a row; why there is none or only a part of it, or an empty string."""
        if row.devices > self._count:
            return f"not run: {row.devices} devices, this machine has {self._count}"
        request = self._request(job)
        if request.left() <= 0:
            return f"not run: no time left of --seconds={self._options.seconds:g}"
        try:
            problem = run.run_child("jax_side", self._out / "request.json", request)
        except UserError as refused:
            return f"not measured: {refused}"
        _, measurements = records.read_results(request.results)
        Path(request.results).unlink(missing_ok=True)
        for entry in measurements:
            problem = entry.problem or problem
            if entry.ms:
                row.measured = entry
                if entry.repeats < request.repeats:
                    problem = problem or f"no time left of --seconds={self._options.seconds:g}"
                return f"{entry.repeats} of {request.repeats} repeats: {problem}" if problem else ""
        return f"not measured: {problem or 'it stopped without a word'}"

    def _predict(self, job: Job, row: Row) -> str:
        """Enter the prediction for a row; why there is none, or an empty string."""
        if self._chip in (None, "none"):
            return self._why_not
        request = self._request(job)
        if request.left() <= 0:
            return "no time left"
        print(f"{job.mesh.text}, {job.program}: compiling for {self._chip}", file=sys.stderr, flush=True)
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        problem = run.run_child("prediction", self._out / "request.json", request, environment)
        found = read_json(request.results) if Path(request.results).is_file() else {}
        Path(request.results).unlink(missing_ok=True)
        if "reports" not in found:
            return found.get("problem") or problem or "it stopped without a word"
        (row.predicted,) = found["reports"]
        row.comparable = prediction.chip_name(self._kind) == self._chip
        return found["reports"][0]["problem"]

    def _request(self, job: Job) -> records.Request:
        options, results = self._options, self._out / "row.json"
        results.unlink(missing_ok=True)
        return records.Request(
            config=to_dict(job.config),
            stages=[job.program],
            steps=options.steps,
            repeats=options.repeats,
            warmup=options.warmup,
            deadline=self._deadline,
            results=str(results),
            devices=job.mesh.devices,
            batch={job.program: job.batch},
            length={job.program: job.length},
            chip=self._chip or "",
        )

    def _write(self) -> None:
        sweep_report.add_efficiency(self._rows)
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "command": self._options.command,
            "settings": {name: getattr(self._options, name) for name in ("steps", "repeats", "warmup", "seconds")},
            "machine": {"devices": self._count, "kind": self._kind},
            "versions": packages.installed(records.PACKAGES),
            "config": to_dict(self._config),
        }
        write_json(self._out / "mesh_sweep.json", sweep_report.as_json(self._rows, about))
        with atomic_file(self._out / "mesh_sweep.md") as out:
            versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
            out.write(f"{self._count} x {self._kind}, {about['date']}, {versions}\n\n")
            out.write(f"    {self._options.command}\n\n{sweep_report.table(self._rows)}\n")
