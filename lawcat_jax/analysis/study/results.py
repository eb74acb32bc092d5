"""The numbers of a study as one JSON object: finished evaluations, pooled over seeds, verdicts on claims, costs.

``results.json`` has everything that tables and pictures are made of, so that both can be made again without the runs.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lawcat_jax.analysis.study.ledger import FINISHED
from lawcat_jax.analysis.study.plan import Plan, Run, evaluation_folder, steps
from lawcat_jax.analysis.study.table import Cells, Claim, Evaluation
from lawcat_jax.errors import UserError
from lawcat_jax.files import read_json
from lawcat_jax.tasks.registry import task_named
from lawcat_jax.tasks.results import Accuracy, Likelihood, newcombe_interval

CONFIRMED, CONTRADICTED, UNDECIDED, NOT_RUN = "confirmed", "contradicted", "not decided", "not run"

Measures = dict[str, dict[str, Any]]


def collect(plan: Plan, jobs: Mapping[str, Mapping[str, Any]], output: Path) -> dict[str, Any]:
    """The results of a study, as JSON values; rows that were not run have no numbers.

    Args:
      plan: the study and its jobs.
      jobs: the ledger's entries by job.
      output: the study's folder.

    Raises:
      UserError: a report of a finished evaluation cannot be read.
    """
    study = plan.study
    measures: Measures = {}
    for evaluation in study.evaluations:
        for task in evaluation.tasks:
            _measure(measures, evaluation, task)
    for run in plan.runs:
        for evaluation in study.evaluations:
            if jobs.get(f"{run.name}.{evaluation.name}", {}).get("status") == FINISHED:
                _read(measures, run, evaluation, evaluation_folder(output, run.name, evaluation.name))
    for measure in measures.values():
        for row in measure["rows"].values():
            row["pooled"] = pooled(measure["task"], row["seeds"].values())
    rows = []
    lengths = {run.config.stage2.seq_length for run in plan.runs if run.config is not None}
    for row in study.rows:
        mine = [run for run in plan.runs if run.row is row]
        value: dict[str, Any] = {"name": row.name, "title": row.title, "group": row.group, "seeds": list(row.seeds)}
        value |= {"reference": row.reference, "note": row.note, "steps": None}
        if mine[0].config is not None:
            value["steps"] = list(steps(mine[0].config))
        rows.append(value)
    return {
        "study": study.name,
        "title": study.title,
        "date": _last_date(jobs.values()),
        "training_length": max(lengths),
        "rows": rows,
        "measures": measures,
        "claims": [_judged(claim, measures) for claim in study.claims],
        "costs": _costs(plan, jobs),
    }


def _last_date(jobs: Iterable[Mapping[str, Any]]) -> str:
    """Of the last job that finished, so that the same runs give the same file; "" where none did."""
    dates = [str(job["finished"]) for job in jobs if job.get("finished")]
    return datetime.datetime.fromisoformat(max(dates)).date().isoformat() if dates else ""


def _key(task: str, wording: str) -> str:
    return f"{task}: {wording}"


def _measure(measures: Measures, evaluation: Evaluation, task: str) -> dict[str, Any]:
    """The table that a task of an evaluation belongs to."""
    wording = evaluation.wording(task)
    new = {"task": task, "wording": wording, "title": f"{task_named(task).heading}, {wording}", "rows": {}}
    return measures.setdefault(_key(task, wording), new)


def _read(measures: Measures, run: Run, evaluation: Evaluation, folder: Path) -> None:
    for task in evaluation.tasks:
        measure = _measure(measures, evaluation, task)
        report = read_json(folder / f"{task}.json")
        try:
            found = {x: {k: v for k, v in row.items() if k != "records"} for x, row in report["results"].items()}
        except (KeyError, AttributeError, TypeError) as problem:
            raise UserError(f"{folder}/{task}.json is damaged; remove {folder} and run the study again") from problem
        row = measure["rows"].setdefault(run.row.name, {"seeds": {}})
        row["seeds"].setdefault(str(0 if run.seed is None else run.seed), {}).update(found)


def result(task: str, row: Mapping[str, Any]) -> Accuracy | Likelihood:
    """A cell of the results as the object that tables and figures of :mod:`lawcat_jax.tasks` are made of."""
    if task_named(task).percent:
        return Accuracy(row["accuracy"], row["n"], row.get("mean_tokens", 0.0))
    return Likelihood(row["nats"], row["n"], row.get("samples", 0))


def pooled(task: str, seeds: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Length -> the cell of all seeds that have it: their samples together, or the mean likelihood of their tokens."""
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for by_length in seeds:
        for length, cell in by_length.items():
            cells.setdefault(length, []).append(cell)
    found = {}
    for length in sorted(cells, key=int):
        n = sum(cell["n"] for cell in cells[length])
        name = "accuracy" if task_named(task).percent else "nats"
        mean = sum(cell[name] * cell["n"] for cell in cells[length]) / n
        samples = sum(cell.get("samples", 0) for cell in cells[length])
        whole = Accuracy(mean, n, 0.0) if name == "accuracy" else Likelihood(mean, n, samples)
        row = task_named(task).row(whole)
        row.pop("mean_tokens", None)
        found[length] = row | {"seeds": len(cells[length])}
    return found


def _judged(claim: Claim, measures: Measures) -> dict[str, Any]:
    """A claim with the numbers of both sides and a verdict: see :func:`verdict`."""
    value: dict[str, Any] = {"text": claim.text, "source": claim.source, "a": claim.a, "b": claim.b}
    value |= {"expected": claim.expected, "cells": [_in_words(cells) for cells in claim.cells]}
    tables = [_table(cells, (claim.a, claim.b), measures) for cells in claim.cells]
    if None in tables:
        return value | {"verdict": NOT_RUN}
    a, b = (
        _answers(
            [(table["rows"][row]["pooled"], cells) for table, cells in zip(tables, claim.cells, strict=True) if table]
        )
        for row in (claim.a, claim.b)
    )
    low, high = newcombe_interval(*a, *b)
    value |= {"hits_a": a[0], "n_a": a[1], "hits_b": b[0], "n_b": b[1]}
    value |= {"difference": round(a[0] / a[1] - b[0] / b[1], 4), "interval": [round(low, 4), round(high, 4)]}
    return value | {"verdict": verdict(low, high, claim.expected)}


def verdict(low: float, high: float, expected: str) -> str:
    """What an interval of the difference (first row minus second) says about a claim that expects it ``above`` 0, or
    ``below``: decided only if 0 lies outside."""
    if low <= 0 <= high:
        return UNDECIDED
    return CONFIRMED if (low > 0) == (expected == "above") else CONTRADICTED


def _table(cells: Cells, rows: tuple[str, str], measures: Measures) -> dict[str, Any] | None:
    """The first table of the task in which both rows have all these cells: rows of different tables, such as of two
    haystacks, say nothing about each other."""
    wanted = _wording(cells)
    for measure in measures.values():
        if measure["task"] != cells.task or wanted not in (None, measure["wording"]):
            continue
        pooled = [measure["rows"].get(row, {}).get("pooled", {}) for row in rows]
        if all(str(length) in found for found in pooled for length in cells.lengths):
            return measure
    return None


def _answers(found: Iterable[tuple[Mapping[str, Any], Cells]]) -> tuple[float, int]:
    """(right answers, samples) of a row in all cells together."""
    hits, count = 0.0, 0
    for pooled, cells in found:
        for length in cells.lengths:
            cell = pooled[str(length)]
            hits, count = hits + cell["accuracy"] * cell["n"], count + cell["n"]
    return round(hits, 6), count


def _wording(cells: Cells) -> str | None:
    """The wording of a task that has several by its settings; None of one whose wording is its text's."""
    if cells.task != "passkey":
        return None
    settings = Evaluation("cells", ("passkey",), cells.lengths, passkey_form=cells.passkey_form).settings()
    return task_named("passkey").wording(settings)


def _in_words(cells: Cells) -> str:
    form = f" ({cells.passkey_form})" if cells.task == "passkey" else ""
    return f"{cells.task}{form} at {', '.join(f'{length:,}' for length in cells.lengths)} tokens"


def _costs(plan: Plan, jobs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each run that finished, and of each stage 1 that several share: training, and all evaluations together."""
    found = []
    for job in plan.jobs:
        entry = jobs.get(job.name, {})
        if job.does not in ("stage1", "train") or entry.get("status") != FINISHED:
            continue
        measured = [
            jobs.get(other.name, {}).get("minutes", 0.0)
            for other in plan.jobs
            if other.does == "evaluate" and (other.row, other.seed) == (job.row, job.seed) and job.row
        ]
        after = [name for name in job.after if plan.job(name).does == "stage1"]
        value = {"run": job.name, "row": job.row, "seed": job.seed, "after": after}
        value |= {
            name: entry[name] for name in ("minutes", "steps", "tokens", "devices", "commit", "versions", "command")
        }
        found.append(value | {"evaluation_minutes": round(sum(measured), 3), "started": entry["started"]})
    return found
