"""What a run writes about itself: metrics (a JSONL file, TensorBoard, Weights & Biases), a progress bar, its manifest."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lawcat_jax.config import Config, LogConfig, to_dict
from lawcat_jax.errors import UserError
from lawcat_jax.training.identity import refuse_other_config

EVALUATION = "eval"
"""The stage that results of an evaluation stand under."""


def _plain(value: Any) -> Any:
    """JSON value of a scalar or array; non-finite numbers become strings, since JSON has none."""
    array = np.asarray(value)
    if array.ndim:
        return [_plain(item) for item in array.tolist()]
    item = array.item()
    return repr(item) if isinstance(item, float) and not math.isfinite(item) else item


def _place(line: str) -> tuple[str, float] | None:
    """(stage, step) of a line of metrics; None for what is none, such as the last line of a killed process."""
    try:
        record = json.loads(line)
        stage, step = record["stage"], record["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sound = isinstance(stage, str) and isinstance(step, int | float) and not isinstance(step, bool)
    return (stage, step) if sound else None


class MetricsWriter:
    """Appends numbers to ``<workdir>/metrics.jsonl``, and to TensorBoard and Weights & Biases where ``config`` asks for
    them. Does nothing unless ``primary``.

    ``run_config`` is shown by Weights & Biases; ``written()`` is called after every line of the file.

    Raises:
      UserError: a writer that is asked for is not installed.
    """

    def __init__(
        self,
        workdir: Path,
        config: LogConfig,
        *,
        primary: bool = True,
        run_config: dict | None = None,
        written: Callable[[], None] = lambda: None,
    ):
        self._written = written
        self._file = self._tensorboard = self._wandb = None
        self._path = workdir / "metrics.jsonl"
        if not primary:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        if config.tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as problem:
                raise UserError("config.log.tensorboard: pip install tensorboardX, or set it to False") from problem
            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), flush_secs=30)
        if config.wandb:
            try:
                import wandb  # pyright: ignore[reportMissingImports]  # optional
            except ImportError as problem:
                raise UserError("config.log.wandb: pip install wandb, or set it to False") from problem
            self._wandb = wandb.init(dir=str(workdir), name=workdir.name, config=run_config, resume="allow")

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line ``{"stage": ..., "step": ..., "time": ..., **values}``. An array becomes a list in the file, and one
        curve ``name/index`` for each entry in the other writers.
        """
        if self._file is None:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"stage": stage, "step": step, "time": now, **plain}) + "\n")
        self._file.flush()
        self._written()
        if self._tensorboard is None and self._wandb is None:
            return
        curves: dict[str, float] = {}
        for name, value in plain.items():
            if isinstance(value, list):
                curves |= {f"{stage}/{name}/{i}": v for i, v in enumerate(value) if isinstance(v, int | float)}
            elif isinstance(value, int | float):
                curves[f"{stage}/{name}"] = value
        if self._tensorboard is not None:
            for name, value in curves.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(curves | {f"{stage}/step": step})

    def write_results(self, results: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]) -> None:
        """Write an evaluation's numbers, {task: {model: {tokens: values}}}, as those of a stage ``eval`` whose steps are tokens;
        earlier ones are dropped.
        """
        self.rewind(EVALUATION, -1)
        lengths = sorted({length for models in results.values() for found in models.values() for length in found})
        for length in lengths:
            values = {
                f"{task}/{model}/{name}": value
                for task, models in results.items()
                for model, found in models.items()
                for name, value in found.get(length, {}).items()
            }
            self.write(EVALUATION, length, values)

    def rewind(self, stage: str, step: int) -> None:
        """Drop the lines of ``stage`` after ``step``, which a resumed run writes again, and a last line cut short."""
        if self._file is None:
            return
        self._file.close()
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").split("\n"):
            place = _place(line)
            if place is not None and not (place[0] == stage and place[1] > step):
                kept.append(line + "\n")
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Flush and close everything."""
        for writer in (self._file, self._tensorboard):
            if writer is not None:
                writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._tensorboard = self._wandb = None


class Progress:
    """Progress of a stage on stderr. ``mode`` is ``bar``, ``lines`` (one every ``every`` steps), ``off``, or ``auto``: a bar on
    a terminal and lines elsewhere. Shows nothing unless ``primary``.
    """

    def __init__(self, stage: str, total: int, initial: int, mode: str, *, primary: bool = True, every: int = 10):
        self._stage, self._total, self._every = stage, total, every
        self._bar = None
        self._first: tuple[float, int] | None = None
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self._lines = primary and mode == "lines"
        if primary and mode == "bar":
            import tqdm

            self._bar = tqdm.tqdm(total=total, initial=initial, desc=stage, unit="step", dynamic_ncols=True)

    def update(self, step: int, numbers: Mapping[str, str]) -> None:
        """Show that ``step`` steps are done, with some numbers beside."""
        if self._first is None:  # the first step compiles: the estimate starts after it
            self._first = (time.monotonic(), step)
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._lines and (step % self._every == 0 or step == self._total):
            rate = (time.monotonic() - self._first[0]) / max(step - self._first[1], 1)
            eta = datetime.timedelta(seconds=round(rate * (self._total - step)))
            text = " ".join(f"{name} {value}" for name, value in numbers.items())
            self.say(f"{self._stage} {step}/{self._total} eta {eta} {text}")

    def say(self, text: str) -> None:
        """Print one line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._lines:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "libtpu")


class Manifest:
    """``<workdir>/manifest.json``: what a run is (config, teacher, git revision, versions, devices), how far it has come
    and what became of each stage.

    The file is written by :meth:`begin`, once a run has done something that is worth keeping: a start that fails leaves
    the folder free for the mended command.
    """

    def __init__(self, path: Path, values: dict[str, Any], *, primary: bool = True):
        self._path, self.values, self._primary = path, values, primary
        self._begun = False
        self.counts_rows = True
        """Whether a pass over text has the sequences that there are; in runs begun by earlier versions it has ``num_samples``."""

    @classmethod
    def open(cls, workdir: Path, config: Config, *, primary: bool = True) -> Manifest:
        """The manifest of a new run, or that of the run in ``workdir``, which is resumed.

        Raises:
          UserError: ``workdir`` holds a run with another configuration (the differing fields are named), or its
            manifest cannot be read.
        """
        import jax

        path = workdir / "manifest.json"
        new = {
            "status": "running",
            "config": json.loads(json.dumps(to_dict(config))),
            "git": git_revision(),
            "versions": _versions(),
            "devices": sorted({device.device_kind for device in jax.devices()}),
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
            "argv": sys.argv,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if os.path.lexists(path):  # a link that leads nowhere would be replaced
            try:
                old = json.loads(path.read_text(encoding="utf-8"))
                old_config = old["config"]
                if not isinstance(old_config, dict):
                    raise TypeError("its config is no object")
                resumed = [*old.get("resumed", [])]
                old["stages"] = dict(old.get("stages", {}))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
                reason = " ".join(str(problem).split())[:200] or type(problem).__name__
                raise UserError(f"{path} is damaged ({reason}); move it away, or use another workdir") from problem
            _adopt_old_bos(old_config, new["config"], config)
            refuse_other_config(old_config, new["config"], str(workdir))
            new["started"] = old.get("started", new["started"])
            new["resumed"] = [*resumed, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")]
            new |= {
                name: old[name] for name in ("teacher", "data", "notes", "stages", "results", "steps") if name in old
            }
            manifest = cls(path, old if old.get("status") == "finished" else new, primary=primary)
            manifest.counts_rows = "steps" in old
            return manifest
        return cls(path, new, primary=primary)

    @property
    def finished(self) -> bool:
        """Whether the run has been completed."""
        return self.values.get("status") == "finished"

    def begin(self) -> None:
        """Write the file, if this has not been done since :meth:`open`."""
        if not self._begun:
            self.update()

    def update(self, **values: Any) -> None:
        """Set fields and write the file (whole or not at all)."""
        self.values |= values
        self._begun = True
        if self._primary:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(".manifest.json.tmp")
            temporary.write_text(json.dumps(self.values, indent=1), encoding="utf-8")
            os.replace(temporary, self._path)


def _adopt_old_bos(old: Any, new: dict[str, Any], config: Config) -> None:
    """A run of an earlier version, whose ``add_bos`` was true or false, goes on with the tokens that it began with, and
    its manifest with what it said."""
    for name in ("pretrain", "stage1", "stage2"):
        try:
            before = old[name]["data"]["add_bos"]
        except (KeyError, TypeError):
            continue
        data, rule = getattr(config, name).data, "always" if before else "never"
        if isinstance(before, bool) and data.add_bos in ("auto", rule):
            data.add_bos = rule
            new[name]["data"]["add_bos"] = before


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> str:
    """Commit of the source tree, with ``-dirty`` when it has changes; empty outside of a repository."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
