"""Run the evaluations of a model and write what they report: ``<task>.json``, a table, and a plot."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from lawcat_jax.config import EvalConfig
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.tasks import report
from lawcat_jax.tasks.passkey import Generate, evaluate_passkey
from lawcat_jax.tasks.perplexity import NllSum, evaluate_perplexity, model_nll

FORMS = {"landmark": "evaluation wording", "train": "training wording"}


class ProgressLine:
    """Samples done and remaining time of one task on one model.

    The estimate goes by tokens, since a long length takes most of the time. On a terminal one line is rewritten;
    elsewhere one line is printed for each length.
    """

    def __init__(self, label: str, lengths: tuple[int, ...], samples: int, stream: TextIO | None = None):
        self._label, self._stream = label, stream or sys.stderr
        self._work = {length: length * samples for length in sorted(set(lengths))}
        self._start = time.monotonic()

    def __call__(self, length: int, done: int, samples: int, hits: int | None = None) -> None:
        before = sum(work for other, work in self._work.items() if other < length)
        share = (before + self._work[length] * done / samples) / sum(self._work.values())
        elapsed = time.monotonic() - self._start
        text = f"{self._label}: {length} tokens, {done}/{samples} samples"
        if hits is not None:
            text += f", {100 * hits / done:.0f} % correct"
        text += f", {_clock(elapsed)} elapsed, {_clock(elapsed * (1 - share) / share)} left"
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[K{text}" + ("\n" if share >= 1 else ""))
        elif done == samples:
            self._stream.write(text + "\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def greedy(graphdef: Any, params: Any, *, as_teacher: bool, batch_size: int) -> Generate:
    """Greedy continuation by a decoder, in batches of one size, so that a short last batch compiles nothing new.

    It never stops at an eos: scoring counts tokens.
    """
    from lawcat_jax.inference.generation import generate

    def call(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        return generate(
            graphdef,
            params,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_ids=(),
            temperature=0.0,
            seed=0,
            as_teacher=as_teacher,
            batch_size=batch_size,
        )

    return call


def run_evaluation(
    settings: EvalConfig,
    tokenizer: Tokenizer,
    *,
    model: str,
    output: str | Path,
    generators: Mapping[str, Generate],
    nlls: Mapping[str, NllSum] | None = None,
    training_length: int | None = None,
    write: bool = True,
    echo: Callable[[str], None] = print,
) -> dict[str, dict[str, dict[int, Any]]]:
    """Evaluate one or two forms of a model and report on all of them together.

    Args:
      settings: tasks, lengths, samples, batch size, passkey form, seed, text.
      tokenizer: of the model.
      model: its name in the reports.
      output: directory of the reports, created when missing.
      generators: role ("student", "teacher") -> greedy continuation; the first is the main one and writes
        ``passkey.json``, another ``passkey_<role>.json``.
      nlls: role -> negative log-likelihood, for the perplexity task.
      training_length: in tokens, marked in the plot.
      write: False computes only (processes other than the first).
      echo: receives the tables.

    Returns:
      {task: {role: {length: result}}}.

    Raises:
      UserError: for lengths that do not fit, a missing text, or an output that cannot be written.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output {str(output)!r} exists and is not a directory")
    results: dict[str, dict[str, dict[int, Any]]] = {}
    for task in settings.tasks:
        if task == "passkey":
            results[task] = {
                role: evaluate_passkey(
                    generate,
                    tokenizer,
                    lengths=settings.lengths,
                    samples=settings.samples,
                    batch_size=settings.batch_size,
                    form=settings.passkey_form,
                    seed=settings.seed,
                    progress=ProgressLine(f"passkey {role}", settings.lengths, settings.samples) if write else None,
                )
                for role, generate in generators.items()
            }
        elif task == "perplexity":
            results[task] = {
                role: _perplexity(nll, tokenizer, settings, role, write) for role, nll in (nlls or {}).items()
            }
        else:
            raise UserError(f"task {task!r} is not one of passkey, perplexity")
        if write:
            _report(task, results[task], settings, model, output, training_length, echo)
    return results


def _perplexity(nll: NllSum, tokenizer: Tokenizer, settings: EvalConfig, role: str, show: bool) -> dict[int, Any]:
    progress = ProgressLine(f"perplexity {role}", settings.lengths, settings.samples) if show else None
    return {
        length: evaluate_perplexity(
            nll,
            tokenizer,
            source=settings.text,
            length=length,
            samples=settings.samples,
            batch_size=settings.batch_size,
            text_key=settings.text_key,
            progress=progress,
        )
        for length in sorted(set(settings.lengths))
    }


def _report(task, by_role, settings: EvalConfig, model: str, output: Path, training_length, echo) -> None:
    write = report.write_passkey_json if task == "passkey" else report.write_perplexity_json
    for number, (role, rows) in enumerate(by_role.items()):
        suffix = "" if number == 0 else f"_{role}"
        write(output / f"{task}{suffix}.json", model if number == 0 else f"{model} ({role})", rows)
    if task == "passkey":
        title = f"Passkey retrieval ({FORMS[settings.passkey_form]})"
        echo(report.table(f"{title}, {model}", by_role, report.passkey_cell))
        plot = output / "passkey.png"
        report.plot_passkey(plot, by_role, title=title, training_length=training_length)
        echo(f"wrote {output / 'passkey.json'} and {plot}")
    else:
        echo(report.table(f"Perplexity of {settings.text}, {model}", by_role, report.perplexity_cell))
        echo(f"wrote {output / 'perplexity.json'}")


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
) -> dict[str, dict[str, dict[int, Any]]]:
    """:func:`run_evaluation` of a decoder: the student and, with ``settings.teacher``, its teacher.

    ``is_student`` False evaluates a plain softmax model, under the role "teacher".
    """
    roles = (["student"] if is_student else []) + (["teacher"] if settings.teacher or not is_student else [])
    return run_evaluation(
        settings,
        tokenizer,
        model=model,
        output=output,
        generators={
            role: greedy(graphdef, params, as_teacher=role == "teacher", batch_size=settings.batch_size)
            for role in roles
        },
        nlls={role: model_nll(graphdef, params, as_teacher=role == "teacher") for role in roles},
        training_length=training_length,
        write=write,
    )
