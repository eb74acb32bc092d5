"""Finished cells of a table that is not finished: what lets an interrupted evaluation go on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lawcat_jax import __version__
from lawcat_jax.data.source_files import digests, files_here
from lawcat_jax.errors import UserError
from lawcat_jax.files import read_json, write_json
from lawcat_jax.tasks.task import Model, Task

FOLDER = "unfinished"
RESULTS_VERSION = 3
"""Raised by every change of the program after which a model answers otherwise or answers are scored otherwise: results of
other versions are not mixed with those of this one. (Version 1, which cells do not state: prompts of a model whose rotary
scaling depends on the length were rotated by the frequencies of their pieces. Version 2: all line ends of text files were read
as LF, and stop strings of lm_eval were not found in special tokens.)"""


def file_stamp(source: str) -> list[list[str]]:
    """Name and digest of each file on this machine of a text source, which make a changed source another one; [] of a remote
    source."""
    files = files_here(source)
    return [[file.name, digest] for file, digest in zip(files, digests(files), strict=True)]


class Cells:
    """One small file for each finished (task, what it reads, model, length), in ``unfinished/`` of the output folder. What a task
    reads is its ``identity``, as it was when the evaluation began.

    Args:
      output: the folder of the reports.
      enabled: False keeps nothing and finds nothing (processes that do not write).

    Attributes:
      outdated: how many cells were found that another version of the program computed, and so not loaded.
    """

    def __init__(self, output: Path, *, enabled: bool = True):
        self._folder, self._enabled = output / FOLDER, enabled
        self._used: set[Path] = set()
        self.outdated = 0

    def load(self, task: Task, identity: Mapping[str, Any], model: Model, length: int) -> dict[int, Any] | None:
        """The result of a cell that was finished before by this version, else None; a damaged file counts as none."""
        path = self._path(task, identity, model, length)
        if path is None or not path.is_file():
            return None
        self._used.add(path)
        try:
            values = read_json(path)
            if values.get("results_version", 1) != RESULTS_VERSION:
                self.outdated += 1
                return None
            rows = values["results"]
            return {task.position(x): task.result(**row) for x, row in rows.items()}
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            return None

    def save(self, task: Task, identity: Mapping[str, Any], model: Model, length: int, results: dict[int, Any]) -> None:
        """Keep a finished cell.

        Raises:
          UserError: the output folder cannot be written.
        """
        path = self._path(task, identity, model, length)
        if path is not None:
            self._used.add(path)
            rows = {str(x): dataclasses.asdict(result) for x, result in results.items()}
            facts = {"task": task.name, "model": model.name, "length": length, "results_version": RESULTS_VERSION}
            write_json(path, {**facts, "results": rows})

    def clear(self) -> None:
        """Remove the cells that were loaded or saved here; those of another evaluation stay."""
        for path in self._used:
            path.unlink(missing_ok=True)
            for partial in self._folder.glob(f".{path.name}.*"):  # left by a process that was killed while it wrote
                partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or never made
            self._folder.rmdir()

    def _path(self, task: Task, identity: Mapping[str, Any], model: Model, length: int) -> Path | None:
        if not self._enabled or not model.fingerprint:
            return None
        facts = [__version__, task.name, identity, model.fingerprint, length]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return self._folder / f"{task.stem}_{length}_{digest[:16]}.json"
