"""Tasks of lm-evaluation-harness by name, and what it measures of a model at one of them."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from lawcat_jax.config.tree import nearest
from lawcat_jax.errors import UserError

VERSION = importlib.metadata.version("lm_eval")
SEED = DEFAULT_OTHER_SEED
"""Of few-shot examples and draws; the harness' default."""


@functools.cache
def _manager(directory: str, everything: bool) -> TaskManager:
    """The task files of a directory, with ``everything`` also those of the package: 14,000, which takes a while."""
    return TaskManager(include_path=directory or None, include_defaults=everything)


def load(name: str, directory: str, fewshot: int | None = None) -> dict[str, Any]:
    """A task, or all tasks of a group, with their data, as the harness takes it.

    Args:
      name: of a task, group or tag.
      directory: with task files of the user's, or "".
      fewshot: examples before each question; None leaves it to the task. A task that says 0 keeps it.

    Raises:
      UserError: there is no such task, or its file or its data cannot be read.
    """
    if directory and not Path(directory).is_dir():
        raise UserError(f"lm_eval_tasks_dir {directory!r}: no such directory")
    known = bool(directory) and name in _manager(directory, False).all_tasks
    manager = _manager(directory, not known)
    if name not in manager.all_tasks:
        raise UserError(
            f"lm_eval:{name}: lm-evaluation-harness {VERSION} has no such task{nearest(name, manager.all_tasks)}; those "
            "of your own are read from --lm_eval_tasks_dir"
        )
    try:
        loaded: Any = manager.load([name])
    except Exception as problem:  # the harness, its YAML and datasets raise all kinds
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        raise UserError(f"lm_eval:{name}: its task file or data cannot be read: {reason}") from problem
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def measure(loaded: dict[str, Any], model: LM, *, limit: int | None, chat: bool) -> dict[str, Any]:
    """What the harness returns for loaded tasks, with its own seeds and defaults.

    Raises:
      UserError: the task runs code that comes out of a model, or is for models of images.
    """
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"lm_eval:{name} runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"lm_eval:{name} shows images, which these models do not see")
    with _seeded():
        found = evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,  # of conversations
        )
    assert found is not None  # it is None on other ranks than the first, and there is one
    return dict(found)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The harness' seeds; and no processes of its own for error bars, which would be forks of one with jax threads."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    before = os.environ.get("DISABLE_MULTIPROC")
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        if before is None:
            os.environ.pop("DISABLE_MULTIPROC")
        else:
            os.environ["DISABLE_MULTIPROC"] = before
