"""A whole study: plan, run what is not finished, write results. Run again, it goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lawcat_jax.analysis.study import report
from lawcat_jax.analysis.study.execute import EXIT_INTERRUPTED, Outcome, Stop, alone, execute, make_slots
from lawcat_jax.analysis.study.ledger import FINISHED, Ledger
from lawcat_jax.analysis.study.plan import Job, Plan, make_plan
from lawcat_jax.analysis.study.results import collect
from lawcat_jax.analysis.study.table import load_study
from lawcat_jax.errors import UserError
from lawcat_jax.files import atomic_file, read_json

RESULTS = "results.json"
EXIT_FAILED = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    ``only`` names rows, or runs such as ``no_conv_seed1``; none is all. ``devices`` are numbers of CUDA devices, none is
    one job at a time on what jax finds. ``minutes`` ends the command in time for children to save; None is no limit.
    ``workers`` are the threads, and the processes, of each run's data; None shares the cores among the runs.
    """

    config: str
    output: Path
    only: Sequence[str] = ()
    devices: Sequence[str] = ()
    runs_per_device: int = 1
    minutes: float | None = None
    workers: int | None = None


def run_study(options: Options, started: float) -> int:
    """Run the jobs that are left and write the results; returns the exit code: 0 all done, 75 work is left, 2 a job failed.

    ``started`` is when the command began, on the clock of ``time.monotonic``; ``minutes`` count from there.

    Raises:
      UserError: a study or a folder that cannot be used.
    """
    slots = make_slots(options.devices, options.runs_per_device)
    plan = _plan(options, len(slots))
    jobs = plan.needed(options.only)
    seconds = None if options.minutes is None else 60 * options.minutes
    with Stop(started, seconds) as stop, alone(options.output) as held:
        ledger = Ledger(options.output)
        outcome = execute(jobs, ledger, slots, output=options.output, stop=stop, held=held)
        write_results(plan, options.output)
    print(_in_words(outcome, len(jobs)), flush=True)
    print(f"results: {options.output / 'results.md'}", flush=True)
    if outcome.left:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if outcome.failed or outcome.blocked else 0


def list_study(options: Options) -> int:
    """Print every job with its status and what it waits for; returns 0."""
    plan = _plan(options, len(make_slots(options.devices, options.runs_per_device)))
    ledger = Ledger(options.output)
    jobs = plan.needed(options.only)
    left = {job.name for job in ledger.left(jobs)}
    for job in jobs:
        after = f"  after {', '.join(job.after)}" if job.after else ""
        steps = f"  {job.steps:,} steps" if job.steps else ""
        print(f"{_status(ledger, job, job.name in left):<12} {job.name}{steps}{after}")
    return 0


def report_study(options: Options, page: str | None) -> int:
    """Write the results of what is finished; returns 0.

    With ``page``, a Markdown file that has the lines ``<!-- study:begin results/<study>.json -->`` and ``<!-- study:end -->``, also put
    the tables between them, and the JSON and pictures into the folder ``results`` beside it.

    Raises:
      UserError: the page lacks these lines, or a file cannot be written.
    """
    plan = _plan(options, 1)
    results = write_results(plan, options.output)
    print(f"results: {options.output / 'results.md'}")
    if page is not None:
        _publish(results, Path(page))
        print(f"published in {page}")
    return 0


def write_results(plan: Plan, output: Path) -> dict[str, Any]:
    """Write ``results.json``, ``results.md`` and the pictures from what is finished; returns the results. What finished with
    other settings than the study's file has now, and what was measured on it, is left out, and said in one line.

    Raises:
      UserError: a report cannot be read, or a file not be written.
    """
    ledger = Ledger(output)
    changed: set[str] = set()
    for job in plan.jobs:  # what a job waits for stands before it
        if job.name in ledger.jobs and (ledger.changed(job) or changed.intersection(job.after)):
            changed.add(job.name)
    if changed:
        names = [job.name for job in plan.jobs if job.name in changed and ledger.status(job) == FINISHED]
        print(
            f"left out, as the study's file has other settings than they finished with, or than what they measure did: "
            f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}",
            flush=True,
        )
    results = collect(plan, {name: job for name, job in ledger.jobs.items() if name not in changed}, output)
    _write_json(output / RESULTS, results)
    report.write(results, output)
    return results


def page_text(results: dict[str, Any]) -> str:
    """What stands in a page whose folder ``results`` has the pictures."""
    return f"\n{report.markdown(results, 'results/')}\n"


def published(page: Path) -> list[tuple[str, str, str]]:
    """(path of the results, text that stands in the page, text that they make) of each block of a page."""
    return [
        (name, text, page_text(read_json(page.parent / name)))
        for name, text in report.blocks(page.read_text(encoding="utf-8"))
    ]


def _publish(results: dict[str, Any], page: Path) -> None:
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as problem:
        raise UserError(f"cannot read {page}: {problem.strerror or problem}") from problem
    name = f"results/{results['study']}.json"
    new = report.filled(text, name, page_text(results))  # refuses before anything is written
    for old in (page.parent / "results").glob(f"{results['study']}_*.png"):
        old.unlink()
    report.draw(results, page.parent / "results")
    _write_json(page.parent / name, results)
    with atomic_file(page) as out:
        out.write(new)


def _write_json(path: Path, results: dict[str, Any]) -> None:
    """One line for each cell: a file of numbers that can be read, and compared line by line."""
    with atomic_file(path) as out:
        out.write(_lines(results, "") + "\n")


def _lines(value: Any, indent: str) -> str:
    if isinstance(value, dict) and any(isinstance(item, dict | list) and item for item in value.values()):
        items = [f"{indent} {json.dumps(name)}: {_lines(item, indent + ' ')}" for name, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f"{indent} {_lines(item, indent + ' ')}" for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def _plan(options: Options, slots: int) -> Plan:
    study, get_config = load_study(options.config)
    workers = options.workers
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) // slots)
    return make_plan(study, get_config, config=options.config, output=options.output, workers=workers)


def _status(ledger: Ledger, job: Job, left: bool) -> str:
    status = ledger.status(job) or "to do"
    return "to do again" if left and status == FINISHED else status


def _in_words(outcome: Outcome, count: int) -> str:
    text = f"{time.strftime('%H:%M:%S')} {len(outcome.finished)} of {count} jobs are finished"
    for what, names in (("failed", outcome.failed), ("waiting for these", outcome.blocked), ("left", outcome.left)):
        if names:
            text += f"; {len(names)} {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
    return text + ("; run the same command again to go on" if outcome.left else "")
