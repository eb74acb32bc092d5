"""``study.json``: what was run, with which code, where and for how long. Written whole or not at all, after each change."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lawcat_jax.analysis.study.plan import Job
from lawcat_jax.config import Config, ModelConfig, to_dict
from lawcat_jax.errors import UserError
from lawcat_jax.files import read_json, write_json
from lawcat_jax.tasks.cells import file_stamp
from lawcat_jax.training.identity import differences
from lawcat_jax.training.metrics import git_revision

FINISHED, FAILED, INTERRUPTED, RUNNING = "finished", "failed", "interrupted", "running"
_PACKAGES = ("jax", "flax")


class Ledger:
    """The file of that name in a study's folder. An entry, by the job's name, has:

    ``kind``, ``row``, ``seed``, ``command``; ``facts`` (what it computes); ``files`` (names and digests of those of the texts that
    it reads); ``status``; ``commit`` ("unknown" outside of a
    repository) and ``versions`` it last began with; ``devices``, ``steps`` and ``tokens`` (of training); ``started``
    (first time, UTC), ``finished``, ``starts``, and ``minutes`` of all starts together.

    Raises:
      UserError: the file is there and cannot be read.
    """

    def __init__(self, output: Path):
        self._path = output / "study.json"
        self.jobs: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            jobs = read_json(self._path).get("jobs")
            if not isinstance(jobs, dict) or not all(isinstance(entry, dict) for entry in jobs.values()):
                raise UserError(f"{self._path} is damaged (no jobs in it); move it away, or name another --output")
            self.jobs = jobs

    def status(self, job: Job) -> str:
        """``finished``, ``failed``, ``interrupted``, or "" where it has never begun. One that was running when the study
        was killed is interrupted."""
        found = self.jobs.get(job.name, {}).get("status", "")
        return INTERRUPTED if found == RUNNING else found

    def left(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs that have to be run. A model whose files are gone is made again only where an unfinished job reads
        it: ``study.json`` and ``eval`` are enough to go on elsewhere."""
        found: list[Job] = []
        for job in reversed(jobs):  # those that read a model stand after the one that makes it
            gone = not all(path.exists() for path in job.products)
            needed = job.does == "evaluate" or any(job.name in other.after for other in found)
            if self.status(job) != FINISHED or (gone and needed):
                found.insert(0, job)
        return found

    def changed(self, job: Job) -> list[str]:
        """What is different now from what a begun job computes, one entry a field or text. A text that is not here, as where
        results alone were brought, is taken to be the same."""
        old = self.jobs.get(job.name, {}).get("facts")
        if not isinstance(old, dict):
            return []
        files = [
            f"the files of {source}"
            for source, before in self.jobs[job.name].get("files", {}).items()
            if (now := _stamp(source)) is not None and now != before
        ]
        defaults: dict[str, Any] = {}
        if job.does in ("train", "stage1"):
            defaults = json.loads(json.dumps(to_dict(Config())))
            defaults["teacher"]["architecture"] = json.loads(json.dumps(to_dict(ModelConfig())))
        return [*differences(old, dict(job.facts), defaults, "config" if defaults else job.does), *files]

    def begin(self, job: Job) -> None:
        """Note that a job starts, or starts again."""
        old = self.jobs.get(job.name, {})
        self.jobs[job.name] = {
            "kind": job.does,
            "row": job.row,
            "seed": job.seed,
            "command": job.text,
            "status": RUNNING,
            "commit": git_revision() or "unknown",
            "versions": _versions(),
            "devices": old.get("devices", []),
            "steps": job.steps,
            "tokens": job.tokens,
            "started": old.get("started") or _now(),
            "finished": None,
            "starts": old.get("starts", 0) + 1,
            "minutes": old.get("minutes", 0.0),
            "facts": job.facts,
            "files": {source: stamp for source in job.sources if (stamp := _stamp(source)) is not None},
        }
        self._write()

    def end(self, job: Job, status: str, minutes: float) -> None:
        """Note how a job that began ended, after so many minutes."""
        entry = self.jobs[job.name]
        entry["status"] = status
        entry["minutes"] = round(entry["minutes"] + minutes, 3)
        entry["finished"] = _now() if status == FINISHED else None
        if job.workdir is not None and (job.workdir / "manifest.json").is_file():
            manifest = read_json(job.workdir / "manifest.json")
            entry["devices"] = manifest.get("devices", [])
            done = manifest.get("stages", {})
            entry["stages"] = {name: {"steps": stage.get("steps")} for name, stage in done.items()}
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"jobs": self.jobs})


def _stamp(source: str) -> list[list[str]] | None:
    try:
        return file_stamp(source)
    except UserError:  # the job's own command says what is wrong with it
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
