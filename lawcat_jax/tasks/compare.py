"""Evaluate one checkpoint, or compare several, as the command line does it."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lawcat_jax.checkpoints.model_dir import is_remote, open_checkpoint, takes_base
from lawcat_jax.config import Bos, ConfigError, EvalConfig, TaskName, from_dict, type_problems
from lawcat_jax.errors import UserError
from lawcat_jax.inference.loading import FoundCheckpoint, find_checkpoint, load_for_inference
from lawcat_jax.tasks.lm_eval import PREFIX
from lawcat_jax.tasks.registry import task_named
from lawcat_jax.tasks.runner import Results, check_settings, run_evaluation
from lawcat_jax.tasks.task import Model


def named_checkpoints(items: Sequence[str]) -> dict[str, str]:
    """Name -> checkpoint, of items like ``name=path`` or ``path`` (which is named by its last part).

    Raises:
      UserError: none at all, or two of one name.
    """
    found: dict[str, str] = {}
    for item in (part.strip() for text in items for part in text.split(",")):
        name, equals, checkpoint = item.partition("=")
        if not equals or "/" in name or Path(item).expanduser().exists():  # a path may hold "=" as well
            name, checkpoint = _short_name(item), item
        if not checkpoint or not name:
            continue
        if name in found:
            raise UserError(f"--checkpoint: two models are named {name!r}; name them, as in --checkpoint=name=path")
        found[name] = checkpoint
    if not found:
        raise UserError(
            "--checkpoint is missing: a model directory, a Hugging Face directory or hub id, or asset:<name>"
        )
    return found


def split_tasks(items: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tasks of this program, tasks of lm-evaluation-harness) of ``--tasks``: what follows an ``lm_eval:<name>`` and is
    no task of this program is one of the harness."""
    own, harness = [], []
    for item in (item.strip() for item in items):
        if item.startswith(PREFIX):
            harness.append(item.removeprefix(PREFIX))
        elif item:
            (harness if harness and item not in typing.get_args(TaskName) else own).append(item)
    return tuple(own), tuple(harness)


def chosen_settings(stored: Mapping[str, Any], given: Mapping[str, Any]) -> EvalConfig:
    """``given`` settings (those that are not None) over those ``stored`` with a checkpoint over the defaults. The
    teacher of a student is evaluated only where ``given`` says so.

    Raises:
      UserError: values that cannot run; names are those of the flags.
    """
    known = {field.name for field in dataclasses.fields(EvalConfig)}
    stored_in = "the evaluation settings stored with the checkpoint (extra.eval of model.json)"
    try:
        settings = from_dict(EvalConfig, {name: value for name, value in stored.items() if name in known}, "eval")
        wrong = type_problems(settings, "eval")
    except (ConfigError, TypeError, ValueError) as problem:
        wrong = [" ".join(str(problem).split())]
    if wrong:
        raise UserError(f"{stored_in}: {'; '.join(wrong)}")
    wrong = settings.problems("eval")
    settings = dataclasses.replace(
        settings,
        teacher=False,
        **{name: value for name, value in given.items() if value is not None and name != "teacher"},
    )
    settings.teacher = bool(given.get("teacher"))
    problems = settings.problems("--")
    if problems and wrong:
        raise UserError(f"{stored_in}: {'; '.join(wrong)}; the flags of evaluate override them")
    if problems:
        raise UserError("; ".join(problem.replace("--.", "--") for problem in problems))
    return settings


def evaluate_checkpoints(
    checkpoints: Sequence[str],
    given: Mapping[str, Any],
    *,
    output: str | None = None,
    revision: str | None = None,
    base: str | None = None,
    dtype: str = "auto",
    tokenizer: str | None = None,
    add_bos: Bos | None = None,
    training_length: int | None = None,
) -> Results:
    """Evaluate checkpoints one after the other and report on them in one table and one figure.

    Every checkpoint is looked up, and every setting checked against its tokenizer, before the first weights are read.

    Args:
      checkpoints: see :func:`named_checkpoints`.
      given: fields of ``EvalConfig``; those that are missing or None are the first checkpoint's, else the defaults.
      output: folder of the reports. Default: ``eval/`` in the folder of a run, ``./eval_<name>/`` for anything else,
        so that nothing is written into a source. A report of other settings that lies there is kept.
      base: the model that those checkpoints belong to that are a student's small file or a PEFT adapter.
      revision, dtype, tokenizer, add_bos: see :func:`lawcat_jax.inference.loading.load_for_inference`.
      training_length: in tokens, marked in the figure; default: the first checkpoint's.

    Raises:
      UserError: a checkpoint that is missing or damaged, settings that do not fit, an output that cannot be written.
    """
    named = named_checkpoints(checkpoints)
    chosen_settings({}, given)  # mistakes in the flags show before anything is looked up
    opening = _opening(named, base, revision)
    options: dict[str, Any] = {"tokenizer": tokenizer, "add_bos": add_bos}
    found = {name: find_checkpoint(path, **each, **options) for name, (path, each) in opening.items()}
    first = next(iter(found.values()))
    settings = chosen_settings(first.extra.get("eval") or {}, given)
    _refuse_unread(settings, given)
    if settings.teacher and not any(open_checkpoint(path, **each).attention for path, each in opening.values()):
        raise UserError("--teacher evaluates the teacher of a student beside it, and no --checkpoint is a student")
    for checkpoint in found.values():
        check_settings(settings, checkpoint.tokenizer)
    return run_evaluation(
        settings,
        _models(opening, settings, {**options, "dtype": dtype}),
        output=output or default_output(found),
        training_length=training_length or first.extra.get("training_length"),
        replace=False,
    )


_FLAGS = {
    "lengths": "--lengths",
    "samples": "--samples",
    "passkey_form": "--form",
    "seed": "--seed",
    "text": "--text",
    "text_key": "--text_key",
    "position_block": "--position_block",
    "haystack": "--haystack",
    "babi": "--babi",
    "prefill_chunk": "--prefill_chunk",
    **{f"lm_eval_{name}": f"--lm_eval_{name}" for name in ("tasks_dir", "fewshot", "limit", "chat")},
}
"""Field of EvalConfig -> the flag that sets it, of those that not every task reads. ``--seed`` sets ``sample_seed`` too."""


def _refuse_unread(settings: EvalConfig, given: Mapping[str, Any]) -> None:
    """Raises a UserError for a flag that was given and that none of the tasks reads."""
    tasks = [task_named(name) for name in settings.task_names]
    read = {field for task in tasks for field in task.reads(settings)}
    read |= {"seed"} if "sample_seed" in read else set()
    unread = [flag for field, flag in _FLAGS.items() if given.get(field) is not None and field not in read]
    if unread:
        limit = "; --lm_eval_limit limits a task's documents" if "--samples" in unread else ""
        form = f" with --form={settings.passkey_form}" if any(task.name == "passkey" for task in tasks) else ""
        raise UserError(
            f"{', '.join(unread)}: not read by --tasks={','.join(task.name for task in tasks)}{form}; leave it out{limit}"
        )


def default_output(found: Mapping[str, FoundCheckpoint]) -> Path:
    """Folder of the reports on these checkpoints: ``<run>/eval`` for a single one of a run, else ``eval_<names>`` in
    the current folder."""
    (first, *others) = found.values()
    if first.run is not None and not others:
        return first.run / "eval"
    return Path("eval_" + "_".join(re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") for name in found)[:100])


def _opening(
    named: Mapping[str, str], base: str | None, revision: str | None
) -> dict[str, tuple[str, dict[str, str | None]]]:
    """Name -> (checkpoint, ``base`` and ``revision`` to open it with): each flag goes to the checkpoints that it concerns.

    Raises:
      UserError: a flag that concerns none of them.
    """
    joined = {name: takes_base(path) for name, path in named.items()}
    remote = {name: joined[name] or is_remote(path) for name, path in named.items()}
    if base is not None and not any(joined.values()):
        raise UserError("--base goes with a student's small file or an adapter, and no --checkpoint is one")
    if revision is not None and not any(remote.values()):
        raise UserError("--revision goes with a hub repository, and no --checkpoint is one")
    return {
        name: (path, {"base": base if joined[name] else None, "revision": revision if remote[name] else None})
        for name, path in named.items()
    }


def _models(
    opening: Mapping[str, tuple[str, dict[str, str | None]]], settings: EvalConfig, options: Mapping[str, Any]
) -> Iterator[Model]:
    from lawcat_jax.runtime.sharding import spread
    from lawcat_jax.tasks.decoder_model import decoder_models

    for name, (checkpoint, each) in opening.items():
        loaded = load_for_inference(checkpoint, **each, **options)
        single = len(opening) == 1
        models = decoder_models(
            loaded.graphdef,
            spread(loaded.params),
            loaded.tokenizer,
            name=checkpoint if single else name,
            label="" if single else name,
            is_student=loaded.is_student,
            teacher=settings.teacher,
            batch_size=min(settings.batch_size, settings.samples),
            prefill_chunk=settings.prefill_chunk,
        )
        del loaded  # the next one needs the room
        while models:
            yield models.pop(0)


def _short_name(checkpoint: str) -> str:
    path = Path(checkpoint.removeprefix("asset:"))
    parts = [part for part in path.parts if part not in ("/", "..", ".")] or [Path.cwd().name]
    return parts[-2] if len(parts) > 1 and parts[-1] in ("student", "teacher") else parts[-1]
