"""Runs each side in a process of its own, one after the other, within one time budget."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from lawcat_jax.analysis.throughput import records, report
from lawcat_jax.analysis.throughput.records import Measurement, Request
from lawcat_jax.config import Config, ModelConfig, to_dict
from lawcat_jax.errors import UserError
from lawcat_jax.files import write_json

PEERS = ("torch", "none")
GLAS = ("fla", "reference")
NORMALISERS = ("padded", "widened", "second_call")
STAGES = ("stage1", "stage2")
GRACE_SECONDS = 5.0
"""How long after the deadline a side may take to stop by itself."""


@dataclasses.dataclass
class Options:
    """What the command line says beyond the configuration. No ``stages``: all enabled ones; ``batch`` and ``length`` 0:
    the configuration's own; ``seconds`` 0: no limit.
    """

    stages: list[str] = dataclasses.field(default_factory=list)
    batch: int = 0
    length: int = 0
    steps: int = 10
    repeats: int = 5
    warmup: int = 2
    seconds: float = 0.0
    peer: str = "torch"
    gla: str = "fla"
    normalisers: tuple[str, ...] = NORMALISERS[:2]
    out: str = "throughput_results"
    command: str = ""


def benchmark(config: Config, options: Options) -> int:
    """Check the options, enter them into ``config``, and measure; the exit code of :meth:`Benchmark.run`.

    Raises:
      UserError, ConfigError: options that cannot run, naming the flag, or no teacher to read the architecture from.
    """
    options.stages = options.stages or enabled(config)
    check(options, config)
    settle(config, options, architecture(config))
    return Benchmark(config, options).run()


def enabled(config: Config) -> list[str]:
    """Those of :data:`STAGES` that the configuration has."""
    return [name for name, _ in config.stages() if name in STAGES]


def architecture(config: Config) -> ModelConfig:
    """The teacher's shape, as declared or as its checkpoint says.

    Raises:
      UserError: no teacher to read it from.
    """
    if config.teacher.architecture is not None:
        return config.teacher.architecture
    from lawcat_jax.training.inputs import architecture  # imports jax: only where it must

    return architecture(config)


def check(options: Options, config: Config, programs: tuple[str, ...] = ()) -> None:
    """Refuse what cannot run. ``programs`` may be measured beside the enabled stages.

    Raises:
      UserError: naming the flag.
    """
    known = [*enabled(config), *programs] if enabled(config) else []
    if not options.stages or not known:
        raise UserError("--config: it enables neither stage1 nor stage2")
    for name in options.stages:
        if name == "prefill" and name not in programs:
            raise UserError("--stages: prefill is measured by --mesh_sweep only")
        if name not in known:
            raise UserError(f"--stages: {name!r} is not one of this configuration's, {', '.join(known)}")
    for name in ("batch", "length", "steps", "repeats", "warmup", "seconds"):
        least = 1 if name in ("steps", "repeats", "warmup") else 0
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least {least}")
    for name, value, known in (("peer", options.peer, PEERS), ("gla", options.gla, GLAS)):
        if value not in known:
            raise UserError(f"--{name}={value}: choose one of {', '.join(known)}")
    for value in options.normalisers:
        if value not in NORMALISERS:
            raise UserError(f"--normalisers: unknown {value!r}, known: {', '.join(NORMALISERS)}")
    if not options.normalisers:
        raise UserError(f"--normalisers: name at least one of {', '.join(NORMALISERS)}")


def settle(config: Config, options: Options, model: ModelConfig) -> None:
    """Enter sizes and architecture into the configuration, and leave out the stages that are not asked for.

    Raises:
      ConfigError: sizes that do not fit each other.
    """
    config.teacher.architecture = model
    for name, stage in config.stages():
        stage.enabled = name in options.stages
        stage.batch_size = options.batch or stage.batch_size
        stage.seq_length = options.length or stage.seq_length
    config.validate()


class Benchmark:
    """One run of the command. ``config`` is settled (see :func:`settle`)."""

    def __init__(self, config: Config, options: Options):
        self._config, self._options = config, options
        self._out = Path(options.out)
        self._deadline = time.time() + options.seconds if options.seconds else None
        self._versions: dict[str, str] = {}
        self.measurements: list[Measurement] = []

    def run(self) -> int:
        """Measure, print and write ``throughput.json``; 1 when a stage of ours was not measured, else 0.

        Raises:
          UserError: a mesh that does not fit the machine or the configuration.
        """
        try:
            for stage in self._options.stages:  # a process each: an allocator's peak cannot be reset
                self._side("jax", [stage])
            if self._options.peer == "torch":
                self._side("torch", self._options.stages)
        finally:
            if self.measurements:
                self._write()
        date = time.strftime("%Y-%m-%d")
        print(report.text(self.measurements, self._versions, date))
        print(f"wrote {self._out / 'throughput.json'}", flush=True)
        return 0 if all(entry.ms for entry in self.measurements if entry.side == "jax") else 1

    def _side(self, side: str, stages: list[str]) -> None:
        name = side if len(stages) > 1 or side == "torch" else f"{side}_{stages[0]}"
        request = self._request(stages, self._out / f"{name}.json")
        problem = _missing(self._options.gla) if side == "torch" else ""
        if not problem and request.left() <= 0:
            problem = f"no time left of --seconds={self._options.seconds:g}"
        if not problem:
            problem = self._child(side, name, request)
        versions, found = records.read_results(request.results)
        self._versions |= versions
        for stage in stages:
            if not any(entry.stage == stage for entry in found):
                settings = getattr(self._config, stage)
                size = (request.batch.get(stage) or settings.batch_size, settings.seq_length)
                found.append(Measurement(side, stage, "", *size))
        for entry in found:
            if not entry.ms and not entry.problem:
                entry.problem = problem or "it stopped without a word"
            if entry.ms and entry.repeats < self._options.repeats:
                why = problem or f"no time left of --seconds={self._options.seconds:g}"
                entry.notes["unfinished"] = f"{entry.repeats} of {self._options.repeats} repeats: {why}"
            elif entry.ms and problem and side == "torch":
                entry.notes["unfinished"] = f"forms of the peer may be missing: {problem}"
        if problem:
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
        self.measurements += sorted(found, key=lambda entry: stages.index(entry.stage))
        report.add_utilization(self.measurements, self._config)
        self._write()

    def _request(self, stages: list[str], results: Path) -> Request:
        """What to ask of one side. The peer runs on one device and gets the sequences that one device takes of ours."""
        options = self._options
        ours = {entry.stage: entry for entry in self.measurements if entry.side == "jax" and entry.trainable}
        results.unlink(missing_ok=True)  # of an earlier run
        return Request(
            config=to_dict(self._config),
            stages=stages,
            steps=options.steps,
            repeats=options.repeats,
            warmup=options.warmup,
            deadline=self._deadline,
            results=str(results),
            gla=options.gla,
            normalisers=list(options.normalisers),
            batch={stage: max(1, entry.batch // entry.devices) for stage, entry in ours.items()},
            trainable={stage: entry.trainable for stage, entry in ours.items()},
        )

    def _child(self, side: str, name: str, request: Request) -> str:
        """Run one side to its end or to the deadline; what went wrong, or an empty string.

        Raises:
          UserError: the side refused the mesh.
        """
        module = {"jax": "jax_side", "torch": "torch_peer"}[side]
        print(f"{name}: measuring {', '.join(request.stages)}", flush=True)
        return run_child(module, self._out / f"{name}_request.json", request)

    def _write(self) -> None:
        about = {
            "command": self._options.command,
            "settings": {name: getattr(self._options, name) for name in ("steps", "repeats", "warmup", "seconds")},
            "config": to_dict(self._config),
        }
        date = time.strftime("%Y-%m-%d")
        value = report.as_json(self.measurements, self._versions, date, **about)
        write_json(self._out / "throughput.json", value)


def run_child(module: str, path: Path, request: Request, environment: dict[str, str] | None = None) -> str:
    """Run a module of this folder in a process of its own, with the request in the file ``path``, to its end or to the
    deadline; what went wrong, or an empty string.

    Raises:
      UserError: it refused the mesh.
    """
    records.write_request(path, request)
    command = [sys.executable, "-m", f"{__package__}.{module}", str(path)]
    child = subprocess.Popen(command, env=environment)
    limit = None if request.deadline is None else max(1.0, request.left() + GRACE_SECONDS)
    try:
        status = child.wait(limit)
    except subprocess.TimeoutExpired:
        return "no time left: stopped at the deadline"
    finally:  # also when this process is interrupted: nothing may hold the devices on
        if child.poll() is None:
            child.kill()
            child.wait()
        path.unlink()
    if status == records.REFUSED and (reason := records.read_refusal(request.results)):
        Path(request.results).unlink()
        raise UserError(reason)
    return "" if status == 0 else f"its process ended with status {status}"


def _missing(gla: str) -> str:
    """Why the peer cannot start here, or an empty string."""
    needed = {"torch": "torch", "transformers": "transformers"}
    if gla == "fla":
        needed["fla"] = "flash-linear-attention"
    absent = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    return f"{', '.join(absent)} not installed (pip install {' '.join(absent)})" if absent else ""
