"""Every evaluation task by name."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from lawcat_jax.errors import UserError
from lawcat_jax.tasks.lm_eval import PREFIX, LmEval
from lawcat_jax.tasks.task import Task


@functools.cache
def tasks() -> Mapping[str, Task]:
    """Name -> task: the ``TASKS`` of every file in this folder that has some, sorted by name.

    Raises:
      ValueError: two tasks of one name.
    """
    found: dict[str, Task] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        for task in getattr(importlib.import_module(f"lawcat_jax.tasks.{module.name}"), "TASKS", ()):
            if task.name in found:
                raise ValueError(f"two evaluation tasks are named {task.name!r}")
            found[task.name] = task
    return dict(sorted(found.items()))


def task_named(name: str) -> Task:
    """The task of that name; ``lm_eval:<name>`` is one of lm-evaluation-harness.

    Raises:
      UserError: there is none.
    """
    if name.startswith(PREFIX):
        return LmEval(name.removeprefix(PREFIX))
    if name not in tasks():
        raise UserError(f"task {name!r} is not one of {', '.join(tasks())}")
    return tasks()[name]
