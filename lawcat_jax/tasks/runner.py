"""Run evaluation tasks on models, keep what is finished, and report."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lawcat_jax.config import EvalConfig
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import distributed
from lawcat_jax.tasks.ahead import Ahead
from lawcat_jax.tasks.cells import Cells
from lawcat_jax.tasks.progress import ProgressLine
from lawcat_jax.tasks.registry import task_named
from lawcat_jax.tasks.report import Measured, write_families, write_report
from lawcat_jax.tasks.results import Likelihood
from lawcat_jax.tasks.task import Model, Task

Results = dict[str, dict[str, dict[int, Any]]]
"""{task: {label of a model: {length: result}}}."""


def run_evaluation(
    settings: EvalConfig,
    models: Iterable[Model],
    *,
    output: str | Path,
    training_length: int | None = None,
    write: bool = True,
    replace: bool = True,
    echo: Callable[[str], None] = print,
) -> Results:
    """Measure every task on every model at every length, and report on all models of a task together.

    Each finished length is kept in ``<output>/unfinished/`` until the reports are written. The same evaluation, run
    again after an interruption, takes it from there and ends with the same numbers.

    Args:
      settings: tasks, lengths, samples, batch size, wording, seed, text.
      models: with different labels. They may be loaded as they are asked for: one is let go before the next.
      output: folder of the reports, created when missing; see :mod:`lawcat_jax.tasks.report` for what lies there.
      training_length: in tokens, marked in the figures.
      write: False computes only (processes other than the first).
      replace: False keeps a report of other settings that lies in ``output`` (see ``write_report``).
      echo: receives the tables.

    Returns:
      All results; in a process that does not write, without those that the first process took from an earlier run.

    Raises:
      UserError: an unknown task, lengths that do not fit, a missing text, one that changes while it is measured, two models of
        one label, or an output that cannot be written.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output {str(output)!r} exists and is not a directory")
    tasks = [task_named(name) for name in settings.task_names]
    cells = Cells(output, enabled=write)
    measured: dict[str, list[Measured]] = {task.name: [] for task in tasks}
    models = iter(models)
    identities: dict[str, dict[str, Any]] = {}  # as the first model found them: all models of a table read the same
    checked: Tokenizer = None
    vocabularies: set[int] = set()
    while (model := next(models, None)) is not None:
        if any(model.label == other.label for done in measured.values() for other in done):
            raise UserError(f"two models are named {model.label!r}; name them differently")
        if model.tokenizer is not checked:
            checked = model.tokenizer
            check_settings(settings, checked)
        if write and not any(measured.values()):
            _make(output)  # a place that cannot be written shows before the first length is measured
        for task in tasks:
            if task.name not in identities:
                identities[task.name] = task.identity(settings)
            results = measure(task, model, settings, identity=identities[task.name], cells=cells, show=write)
            measured[task.name].append(Measured(model.label, model.name, model.role, results, model.fingerprint))
        vocabularies.add(len(model.tokenizer))
        del model  # its weights make room for the next one's
    if write:
        endings = []
        for task in tasks:
            if measured[task.name]:
                options = {"training_length": training_length, "replace": replace, "echo": echo}
                endings.append(write_report(task, settings, measured[task.name], output, **options))
        if endings:
            write_families(settings, measured, output, ending=max(endings, key=len), echo=echo)
        cells.clear()
        if len(vocabularies) > 1 and any(issubclass(task.result, Likelihood) for task in tasks):
            sizes = " and ".join(f"{size:,}" for size in sorted(vocabularies))
            echo(f"these models have tokenizers of {sizes} tokens: numbers per token do not compare them")
    return {name: {model.label: dict(model.results) for model in done} for name, done in measured.items()}


def _make(output: Path) -> None:
    """Make the folder of the reports.

    Raises:
      UserError: it cannot be made or written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as problem:
        raise UserError(f"output {str(output)!r} cannot be written ({problem.strerror or problem})") from problem


def check_settings(settings: EvalConfig, tokenizer: Tokenizer) -> None:
    """Find mistakes in the settings before a model is there: what every task's ``check`` finds with this tokenizer.

    Raises:
      UserError: an unknown task, lengths that do not fit, a missing source, too little text.
    """
    for name in settings.task_names:
        task_named(name).check(settings, tokenizer)


def measure(
    task: Task,
    model: Model,
    settings: EvalConfig,
    *,
    identity: dict[str, Any] | None = None,
    cells: Cells | None = None,
    show: bool = False,
) -> dict[int, Any]:
    """One task on one model: length -> result.

    Args:
      task, model, settings: what is measured; the settings should have been checked (``task.check``).
      identity: what the task reads (``task.identity``) when the whole evaluation began; None: as it is now.
      cells: where finished lengths are kept and found.
      show: print progress to stderr.

    Raises:
      UserError: a result that is no number, or files that changed since the evaluation began.
    """
    identity = task.identity(settings) if identity is None else identity
    lengths, results, missing = task.lengths(settings), {}, []
    outdated = cells.outdated if cells is not None else 0
    for length in lengths:
        found = cells.load(task, identity, model, length) if cells is not None else None
        if distributed.agree(found is not None):  # all processes take part in a computation, or none
            results.update(found or {})
        else:
            missing.append(length)
    if show and results:
        kept = f"{len(lengths) - len(missing)} of {len(lengths)} lengths"
        print(f"{task.name} {model.label}: {kept} were measured before and are kept", file=sys.stderr, flush=True)
    if show and cells is not None and (outdated := cells.outdated - outdated):
        print(
            f"{task.name} {model.label}: {outdated} of {len(lengths)} lengths were measured by another version of this program, "
            "which may give other numbers; they are measured again",
            file=sys.stderr,
            flush=True,
        )
    progress = ProgressLine(f"{task.name} {model.label}", missing, settings.samples, tokens=task.axis == "tokens")
    if not show:
        progress = None
    with contextlib.ExitStack() as threads:

        def prepare(length: int | None) -> Ahead | None:
            prepared = None if length is None else task.prepare(model.tokenizer, length, settings)
            return prepared and threads.enter_context(prepared)

        prepared = prepare(next(iter(missing), None))
        for length, following in itertools.zip_longest(missing, missing[1:]):
            now, prepared = prepared, prepare(following)  # the next length's inputs are made during this one
            rows = task.measure(model, length, settings, progress, now)
            _refuse_not_finite(task, model, rows)
            _refuse_changed(task, settings, identity)
            if cells is not None:
                cells.save(task, identity, model, length, rows)
            results.update(rows)
    return dict(sorted(results.items()))


def _refuse_changed(task: Task, settings: EvalConfig, identity: dict[str, Any]) -> None:
    """What was read before and after a file changed is no one table, and is kept as neither."""
    if task.identity(settings) != identity:
        raise UserError(
            f"{task.name}: files that it reads changed while it was measured; run it again when they are written (lengths that were "
            "finished before are kept where the files are as they were)"
        )


def _refuse_not_finite(task: Task, model: Model, rows: Mapping[int, Any]) -> None:
    for x, result in rows.items():
        odd = {k: v for k, v in task.row(result).items() if isinstance(v, float) and not math.isfinite(v)}
        if odd:
            raise UserError(
                f"{task.name} of {model.label}, {task.axis} {x}, is no number ({odd}); no report is written"
            )


def evaluate_model(
    graphdef: Any,
    params: Any,
    tokenizer: Tokenizer,
    settings: EvalConfig,
    *,
    model: str,
    output: str | Path,
    is_student: bool,
    training_length: int | None = None,
    write: bool = True,
    replace: bool = True,
) -> Results:
    """:func:`run_evaluation` of one decoder: the student and, with ``settings.teacher``, its teacher.

    ``is_student`` False evaluates a plain softmax model, under the label "teacher"; ``model`` is its name in JSON.
    """
    from lawcat_jax.tasks.decoder_model import decoder_models

    return run_evaluation(
        settings,
        decoder_models(
            graphdef,
            params,
            tokenizer,
            name=model,
            is_student=is_student,
            teacher=settings.teacher,
            batch_size=min(settings.batch_size, settings.samples),
            prefill_chunk=settings.prefill_chunk,
        ),
        output=output,
        training_length=training_length,
        write=write,
        replace=replace,
    )
