"""The pictures of an evaluation: one curve a model against length, and heat maps of depth against length. All PNG."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lawcat_jax.files import atomic_file
from lawcat_jax.tasks.task import Task

TEACHER_SUFFIX = " (teacher)"

# Told apart without colour by the marker as well; the colours are chosen for colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_FIXED = {"student": 0, "teacher": 1}  # the labels of an evaluation of a single checkpoint
_INK, _GRID, _EMPTY = "#555555", "#DDDDDD", "#EEEEEE"


def looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Label -> colour, marker and line style.

    A label has its look by its name, so that it is the same in every figure, whatever the order; only where two names
    of one figure fall on the same colour, the later in the alphabet moves on. "<name> (teacher)" has the colour of
    "<name>", dashed and with hollow markers.
    """
    labels = list(labels)
    slots: dict[str, int] = {}
    names = sorted(
        {label.removesuffix(TEACHER_SUFFIX) for label in labels}, key=lambda name: (name not in _FIXED, name)
    )
    for name in names:
        slot = _FIXED.get(name, zlib.crc32(name.encode()) % len(_COLOURS))
        while slot in slots.values() and len(slots) < len(_COLOURS):
            slot = (slot + 1) % len(_COLOURS)
        slots[name] = slot
    found = {}
    for label in labels:
        slot = slots[label.removesuffix(TEACHER_SUFFIX)]
        dashed = label == "teacher" or label.endswith(TEACHER_SUFFIX)
        found[label] = {"color": _COLOURS[slot], "marker": _MARKERS[slot], "linestyle": "--" if dashed else "-"}
        if dashed:
            found[label]["markerfacecolor"] = "white"
    return found


def plot_lengths(
    path: str | os.PathLike,
    task: Task,
    results: Mapping[str, Mapping[int, Any]],
    *,
    title: str,
    training_length: int | None = None,
) -> None:
    """PNG of the results (``results[label][length]``) against length in tokens (log2 axis), one curve a model, with
    95 % intervals as bars where the task has some.

    ``training_length`` is marked with a vertical line. The length 0 stands half as far as the shortest other.

    Raises:
      UserError: the file cannot be written.
    """
    lengths = sorted({length for by_length in results.values() for length in by_length})
    places = {length: length or min((x for x in lengths if x), default=2) / 2 for length in lengths}
    figure = new_figure(7.2, 4.5)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    scale = 100 if task.percent else 1
    styles = looks(results)
    values = []
    for number, (label, by_length) in enumerate(results.items()):
        shift = 2 ** (0.035 * (number - (len(results) - 1) / 2))  # so that bars do not cover one another
        points = [tuple(scale * value for value in task.point(by_length[x])) for x in sorted(by_length)]
        values += [value for point in points for value in point]
        axes.errorbar(
            [places[x] * shift for x in sorted(by_length)],
            [middle for middle, _, _ in points],
            yerr=[
                [max(0.0, middle - low) for middle, low, _ in points],
                [max(0.0, high - middle) for middle, _, high in points],
            ],
            label=label,
            linewidth=2,
            markersize=6,
            elinewidth=1.2,
            capsize=3 if any(low < high for _, low, high in points) else 0,
            clip_on=False,
            **styles[label],
        )
    if training_length:
        axes.axvline(training_length, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(  # above the frame, where it hides no curve
            f"training length {short(training_length)}",
            (training_length, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=_INK,
        )
    ticks = _spread(lengths)
    axes.set_xticks([places[length] for length in ticks], [short(length) for length in ticks])
    axes.minorticks_off()
    shown = [*places.values(), *([training_length] if training_length else [])]
    axes.set_xlim(min(shown) / 1.15, max(shown) * 1.15)
    if task.percent:
        axes.set_ylim(0, 102)
    elif min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel(task.x_label)
    axes.set_ylabel(task.y_label)
    axes.set_title(title, wrap=True, pad=20 if training_length else None)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=True)
    save_figure(figure, path)


def plot_depths(path: str | os.PathLike, task: Task, results: Mapping[str, Mapping[int, Any]], *, title: str) -> bool:
    """PNG of the mean score by depth (from the top: start of the context) and length, one panel a model.

    Returns:
      False, and writes nothing, where no sample has a depth.

    Raises:
      UserError: the file cannot be written.
    """
    records = {
        label: {x: [r for r in task.records(result) if r[0] is not None] for x, result in by_length.items()}
        for label, by_length in results.items()
    }
    most = max((len(found) for by_length in records.values() for found in by_length.values()), default=0)
    if not most:
        return False
    bins = 10 if most >= 50 else 5
    lengths = sorted({length for by_length in records.values() for length in by_length})
    rows = [f"{100 * b // bins}-{100 * (b + 1) // bins}" for b in range(bins)]
    panels = {
        label: [[_mean(by_length.get(x, []), row, bins) for x in lengths] for row in range(bins)]
        for label, by_length in records.items()
    }
    names = {"title": title, "x_label": task.x_label, "y_label": "depth of the answer (%)"}
    _heat_maps(path, panels, rows, lengths, **names, scale=f"{task.y_label}, mean of a cell")
    return True


def plot_family(
    path: str | os.PathLike,
    tasks: Sequence[Task],
    results: Mapping[str, Mapping[str, Mapping[int, Any]]],
    *,
    title: str,
) -> None:
    """PNG of accuracy by task (from the top) and length, one panel a model; ``results[task][label][length]``.

    Raises:
      UserError: the file cannot be written.
    """
    labels = list(dict.fromkeys(label for by_label in results.values() for label in by_label))
    found = {task.name: results[task.name] for task in tasks}
    lengths = sorted({x for by_label in found.values() for by_length in by_label.values() for x in by_length})

    def mean(task: Task, label: str, x: int) -> float | None:
        result = found[task.name].get(label, {}).get(x)
        return None if result is None else task.point(result)[0]

    panels = {label: [[mean(task, label, x) for x in lengths] for task in tasks] for label in labels}
    rows = [short_heading(task) for task in tasks]
    names = {"title": title, "x_label": tasks[0].x_label, "y_label": tasks[0].family}
    _heat_maps(path, panels, rows, lengths, **names, scale=tasks[0].y_label)


def plot_rows(path: str | os.PathLike, task: Task, results: Mapping[str, Mapping[int, Any]], *, title: str) -> None:
    """PNG of accuracy by model (from the top) and length, ``results[label][length]``: for more models than curves can be
    told apart.

    Raises:
      UserError: the file cannot be written.
    """
    lengths = sorted({x for by_length in results.values() for x in by_length})
    means = [
        [task.point(by_length[x])[0] if x in by_length else None for x in lengths] for by_length in results.values()
    ]
    names = {"title": title, "x_label": task.x_label, "y_label": ""}
    _heat_maps(path, {"": means}, list(results), lengths, **names, scale=task.y_label)


def _heat_maps(
    path: str | os.PathLike,
    panels: Mapping[str, Sequence[Sequence[float | None]]],
    rows: Sequence[str],
    lengths: Sequence[int],
    *,
    title: str,
    x_label: str,
    y_label: str,
    scale: str,
) -> None:
    """One panel a model: ``panels[label][row][column]`` is a share in [0, 1], or None where nothing was measured."""
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    margin = max(1.6, 0.8 + 0.09 * max(map(len, rows)))
    figure = new_figure(margin + columns * max(2.6, 0.62 * len(lengths)), 0.9 + lines * (1.2 + 0.27 * len(rows)))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for number, (label, means) in enumerate(panels.items()):
        axes = grid[number // columns][number % columns]
        image = axes.imshow(
            [[math.nan if mean is None else 100 * mean for mean in row] for row in means],
            vmin=0,
            vmax=100,
            cmap="cividis",
            aspect="auto",
        )
        axes.set_facecolor(_EMPTY)
        for row, line in enumerate(means):
            for column, mean in enumerate(line):
                if mean is not None:
                    ink = "black" if mean > 0.5 else "white"
                    axes.text(column, row, f"{100 * mean:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(label, fontsize=10)
        if number + columns >= len(panels):
            axes.set_xlabel(x_label)
            axes.tick_params(labelbottom=True)
        if number % columns == 0:
            axes.set_ylabel(y_label)
    for number in range(len(panels), lines * columns):
        grid[number // columns][number % columns].set_visible(False)
    figure.colorbar(image, ax=grid, label=scale, shrink=0.9)
    figure.suptitle(title, fontsize=11, wrap=True)
    save_figure(figure, path)


def short_heading(task: Task) -> str:
    """A task's heading without that of its family: "QA1" of BABILong."""
    return task.heading.removeprefix(task.family).lstrip(" -")


def short(tokens: int) -> str:
    """A length as a label: 2048 is "2K"."""
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _mean(records: Sequence[tuple[float | None, float]], row: int, bins: int) -> float | None:
    scores = [score for depth, score in records if min(bins - 1, int((depth or 0.0) * bins)) == row]
    return sum(scores) / len(scores) if scores else None


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it keeps global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure of :func:`new_figure` as PNG.

    Raises:
      UserError: the file cannot be written.
    """
    with atomic_file(path, "wb") as out:
        figure.savefig(out, format="png")


def _spread(lengths: Sequence[int]) -> list[int]:
    """Lengths whose labels do not run into each other on a log axis."""
    kept: list[int] = []
    least = next((length for length in lengths if length), 1)
    for length in lengths:
        if not kept or length >= kept[-1] * max(1.15, (lengths[-1] / least) ** (1 / 14)):
            kept.append(length)
    return kept
