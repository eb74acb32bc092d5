"""What an evaluation leaves behind: JSON and Markdown files, a table on the terminal, pictures. All writes are atomic.

Of a task, with one or more models in one table and one figure::

    <task>.json           the first model of a single checkpoint; <task>_teacher.json is its teacher
    <task>_<label>.json   each model, where several checkpoints are compared
    <task>.md             the table, with what was measured and how
    <task>.png            the value against length, where there are lengths
    <task>_depth.png      the mean score by depth and length, where samples have a depth

Of the tasks of one family together, such as BABILong's, where several were measured::

    <family>.md, .png     accuracy by task and length; a part of the family is named, as in babilong_qa1-qa2.md
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lawcat_jax import __version__
from lawcat_jax.config import EvalConfig
from lawcat_jax.errors import UserError
from lawcat_jax.files import atomic_file, read_json
from lawcat_jax.tasks.figures import TEACHER_SUFFIX, plot_depths, plot_family, plot_lengths, short_heading
from lawcat_jax.tasks.registry import task_named, tasks
from lawcat_jax.tasks.task import Task

_PACKAGES = ("jax", "flax", "numpy", "transformers", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Results of one model at one task, by position on the x axis."""

    label: str
    name: str
    role: str
    results: Mapping[int, Any]
    weights: str = ""
    """A fingerprint of the model; "" where it is unknown."""


def rows(results: Mapping[str, Mapping[str, Mapping[int, Any]]]) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """{task: {label: {length: result}}} with each result as its row in JSON."""
    return {
        name: {
            label: {x: task_named(name).row(result) for x, result in by_length.items()}
            for label, by_length in by_label.items()
        }
        for name, by_label in results.items()
    }


def write_report(
    task: Task,
    settings: EvalConfig,
    measured: Sequence[Measured],
    output: str | os.PathLike,
    *,
    training_length: int | None = None,
    replace: bool = True,
    echo: Callable[[str], None] = print,
) -> str:
    """Write every file of one task and print its table.

    Args:
      task, settings: what was measured.
      measured: of each model; all share the table and the figures.
      output: folder, created when missing.
      training_length: in tokens, marked in the figure.
      replace: False keeps a report of another wording, seed, number of samples or lengths that is there already: the
        new files then carry these in their names, e.g. ``passkey_train_seed7_n50_256-1024.json``. A report of another
        model (of other weights under the same name) is kept as well; the new files end in a part of its fingerprint.
      echo: receives the table, then the files' names.

    Returns:
      What the files' names say beyond the task and the model: "" but where a report was kept.

    Raises:
      UserError: a file cannot be written.
    """
    output = Path(output)
    labels = [model.label for model in measured]
    documents = [_document(task, settings, model, labels) for model in measured]
    several = len({_base(model.label) for model in measured} - {"student", "teacher"}) > 0
    names = [_suffix(model.label) if several or number else "" for number, model in enumerate(measured)]
    stem = task.stem

    def taken(stem: str) -> bool:
        pairs = zip(names, documents, strict=True)
        return any(_differs(output / f"{stem}{name}.json", new) for name, new in pairs)

    if not replace and (taken(stem) or (several and (output / f"{stem}.json").exists())):
        stem += task.ending(settings, sorted({x for model in measured for x in model.results}))
        if taken(stem):
            stem += f"_{hashlib.sha256(repr([model.weights for model in measured]).encode()).hexdigest()[:8]}"
    by_label = {model.label: model.results for model in measured}
    title = task.title(settings)
    heading = title if several else f"{title}, {measured[0].name}"
    fewer = _fewer(task, settings, by_label)
    echo(
        table(heading, by_label, task.cell, task.axis) + (f"\n{fewer}" if fewer else "")
    )  # first: what was measured is not lost to a folder that cannot be written
    for name, document in zip(names, documents, strict=True):
        write_document(output / f"{stem}{name}.json", document)
    pictures = []
    if task.plotted:
        plot_lengths(output / f"{stem}.png", task, by_label, title=title, training_length=training_length)
        pictures.append(f"{stem}.png")
    if task.plotted and plot_depths(output / f"{stem}_depth.png", task, by_label, title=title):
        pictures.append(f"{stem}_depth.png")
    with atomic_file(output / f"{stem}.md") as out:
        out.write(_markdown(task, settings, heading, by_label, pictures, documents[0]))
    files = [*(f"{stem}{name}.json" for name in names), f"{stem}.md", *pictures]
    *first, last = [str(output / file) for file in files]
    echo(f"wrote {', '.join(first)} and {last}")
    return stem.removeprefix(task.stem)


def write_families(
    settings: EvalConfig,
    measured: Mapping[str, Sequence[Measured]],
    output: str | os.PathLike,
    *,
    ending: str = "",
    echo: Callable[[str], None] = print,
) -> None:
    """Write and print a table of tasks and lengths, for each family of which several tasks were measured.

    Args:
      settings: what was measured.
      measured: name of a task -> the models' results.
      output: folder, which is there.
      ending: of the files' names, as :func:`write_report` returned it for the tasks.
      echo: receives the tables, then the files' names.

    Raises:
      UserError: a file cannot be written.
    """
    output = Path(output)
    families: dict[str, list[Task]] = {}
    for name in measured:
        if (task := task_named(name)).family:
            families.setdefault(task.family, []).append(task)
    for family, members in families.items():
        if len(members) < 2:
            continue
        whole = len(members) == sum(task.family == family for task in tasks().values())
        part = "" if whole else "_" + "-".join(short_heading(task).lower() for task in members)
        stem = output / f"{family.lower().replace('-', '')}{part}{ending}"
        results = {task.name: {model.label: model.results for model in measured[task.name]} for task in members}
        lines = [f"# {family}", ""]
        for model in measured[members[0].name]:
            by_task = {short_heading(task): results[task.name].get(model.label, {}) for task in members}
            title = f"{family}, {model.name if model.name.endswith(model.label) else f'{model.label}, {model.name}'}"
            head, *body = _cells(by_task, members[0].cell)
            lines += [title, ""]
            lines += [f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *body)] + [""]
            echo(table(title, by_task, members[0].cell))
        lines += [f"{task.heading}: {task.wording(settings)}, seed {task.seed(settings)}  " for task in members]
        lines += ["", f"{settings.samples} samples of each task and length; in brackets: 95 % interval (Wilson).", ""]
        picture = stem.with_name(f"{stem.name}.png")
        plot_family(picture, members, results, title=family)
        with atomic_file(stem.with_name(f"{stem.name}.md")) as out:
            out.write("\n".join([*lines, f"![{family}]({picture.name})"]) + "\n")
        echo(f"wrote {stem}.md and {picture}")


def write_document(path: str | os.PathLike, document: Mapping[str, Any]) -> None:
    """Write a JSON report: indented, with each row of ``results`` on one line.

    Raises:
      UserError: the file cannot be written.
    """
    lines = [f"    {json.dumps(x)}: {json.dumps(row)}" for x, row in document["results"].items()]
    fields = []
    for key, value in document.items():
        if key == "results":
            text = "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"
        else:
            text = json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        fields.append(f"  {json.dumps(key)}: {text}")
    with atomic_file(path) as out:
        out.write("{\n" + ",\n".join(fields) + "\n}\n")


def table(
    title: str, results: Mapping[str, Mapping[Any, Any]], cell: Callable[[Any], str], axis: str = "tokens"
) -> str:
    """A text table: one row for each length, or whatever ``axis`` says, one column for each model
    (``results[label][length]``)."""
    lines = _cells(results, cell, axis)
    widths = [max(len(row[column]) for row in lines) for column in range(len(lines[0]))]
    text = ["  ".join(item.rjust(width) for item, width in zip(row, widths, strict=True)) for row in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, *text])


def _cells(
    results: Mapping[str, Mapping[Any, Any]], cell: Callable[[Any], str], axis: str = "tokens"
) -> list[list[str]]:
    lengths = sorted({length for by_length in results.values() for length in by_length})
    lines = [[axis, *results]]
    for length in lengths:
        lines.append([str(length), *(cell(by[length]) if length in by else "-" for by in results.values())])
    return lines


def _document(task: Task, settings: EvalConfig, model: Measured, labels: Sequence[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for x, result in sorted(model.results.items()):
        results[str(x)] = task.row(result)
        if records := task.records(result):
            results[str(x)]["records"] = [list(record) for record in records]  # (depth, score) of each sample
    return {
        "task": task.name,
        "model": model.name,
        "role": model.role,
        "weights": model.weights,
        "table": list(labels),  # all models of the table and the figure that this one is in
        "wording": task.wording(settings),
        "seed": task.seed(settings),
        "samples": max(_counts(task, [model.results]), default=0),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(task.packages),
        "results": results,
    }


def _markdown(
    task: Task,
    settings: EvalConfig,
    heading: str,
    results: Mapping[str, Mapping[int, Any]],
    pictures: Sequence[str],
    document: Mapping[str, Any],
) -> str:
    head, *body = _cells(results, task.cell, task.axis)
    asked = "samples" in task.settings
    had = [_fewer(task, settings, results) or f"{settings.samples} samples of each length"] if asked else []
    facts = [*had, *task.facts(settings)]
    lines = [
        f"# {heading}",
        "",
        *(f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *body)),
        "",
        f"{'; '.join(facts)}.",
        f"Measured {document['date']} with {', '.join(f'{k} {v}' for k, v in document['versions'].items())}.",
        "",
        *(f"![{heading}]({picture})" for picture in pictures),
    ]
    return "\n".join(lines) + "\n"


def _counts(task: Task, results: Iterable[Mapping[Any, Any]]) -> set[int]:
    """The numbers of samples that results are of."""
    return {task.samples_of(result) for by_x in results for result in by_x.values()}


def _fewer(task: Task, settings: EvalConfig, results: Mapping[str, Mapping[int, Any]]) -> str:
    """How many samples there were, where these are fewer than were asked for; else nothing."""
    counts = _counts(task, results.values())
    if "samples" not in task.settings or counts <= {settings.samples}:
        return ""
    had = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return f"{had} samples of a length, and not the {settings.samples} that were asked for: there are no more"


def _differs(path: Path, new: Mapping[str, Any]) -> bool:
    """Whether the report at ``path`` is of another evaluation: of other settings, or with models that are not measured
    now. What an old report does not say is taken to be equal."""
    if not path.is_file():
        return False
    try:
        old = read_json(path)
        same = all(old[key] == new[key] for key in ("wording", "seed", "samples", "role") if key in old)
        same = same and (not old.get("weights") or not new["weights"] or old["weights"] == new["weights"])
        same = same and set(old.get("table", ())) <= set(new["table"])
        return not (same and old["results"].keys() == new["results"].keys())
    except (UserError, KeyError, AttributeError):
        return True


def _base(label: str) -> str:
    return label.removesuffix(TEACHER_SUFFIX)


def _suffix(label: str) -> str:
    return "_" + re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-")


def _versions(more: Sequence[str]) -> dict[str, str]:
    versions = {"lawcat_jax": __version__, "python": platform.python_version()}
    for package in (*_PACKAGES, *more):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
