"""What an evaluation leaves behind: JSON files, a table on the terminal, a PNG plot. All writes are atomic."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence

from lawcat_jax.files import atomic_file
from lawcat_jax.tasks.passkey import LengthResult
from lawcat_jax.tasks.perplexity import TextResult

# one look a curve, told apart without colour as well; the colours are safe for colour-blind readers
_LOOKS = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
)


def write_passkey_json(path: str | os.PathLike, model: str, results: Mapping[int, LengthResult]) -> None:
    """``{"task": "passkey", "model": ..., "results": {"<length>": {"accuracy": x, "n": n}}}``."""
    rows = {str(length): {"accuracy": r.accuracy, "n": r.n} for length, r in sorted(results.items())}
    _write_json(path, {"task": "passkey", "model": model, "results": rows})


def write_perplexity_json(path: str | os.PathLike, model: str, results: Mapping[int, TextResult]) -> None:
    """``{"task": "perplexity", "model": ..., "results": {"<length>": {"perplexity": x, "nats": x, "n": tokens}}}``."""
    rows = {
        str(length): {"perplexity": r.perplexity, "nats": r.nats, "n": r.n} for length, r in sorted(results.items())
    }
    _write_json(path, {"task": "perplexity", "model": model, "results": rows})


def _write_json(path: str | os.PathLike, value: dict) -> None:
    with atomic_file(path) as out:
        json.dump(value, out, indent=2)
        out.write("\n")


def table(title: str, results: Mapping[str, Mapping[int, object]], cell: Callable[[object], str]) -> str:
    """A text table: one row a length, one column a model (``results[model][length]``)."""
    lengths = sorted({length for by_length in results.values() for length in by_length})
    rows = [["tokens", *results]]
    for length in lengths:
        rows.append([str(length), *(cell(by[length]) if length in by else "-" for by in results.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, *lines])


def passkey_cell(result: LengthResult) -> str:
    """Accuracy in percent and the number of samples."""
    return f"{100 * result.accuracy:.1f} % (n={result.n})"


def perplexity_cell(result: TextResult) -> str:
    """Perplexity and nats per token."""
    return f"{result.perplexity:.3f} ({result.nats:.4f} nats)"


def plot_passkey(
    path: str | os.PathLike,
    results: Mapping[str, Mapping[int, LengthResult]],
    *,
    title: str = "Passkey retrieval",
    training_length: int | None = None,
) -> None:
    """PNG of accuracy (percent) against context length (tokens, log2 axis), one curve a model.

    ``training_length`` is marked with a vertical line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it keeps global state
    from matplotlib.figure import Figure

    lengths = sorted({length for by_length in results.values() for length in by_length})
    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    for number, (name, by_length) in enumerate(results.items()):
        xs = sorted(by_length)
        ys = [100 * by_length[x].accuracy for x in xs]
        axes.plot(xs, ys, label=name, linewidth=2, markersize=6, **_LOOKS[number % len(_LOOKS)], clip_on=False)
    if training_length:
        axes.axvline(training_length, color="#555555", linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"training length {_short(training_length)}",
            (training_length, 0.5),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="center",
            fontsize=9,
            color="#555555",
        )
    ticks = _spread(lengths)
    axes.set_xticks(ticks, [_short(length) for length in ticks])
    axes.minorticks_off()
    shown = [*lengths, *([training_length] if training_length else [])]
    axes.set_xlim(min(shown) / 1.3, max(shown) * 1.15)  # room for the label left of the line
    axes.set_ylim(0, 102)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title)
    axes.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=True)
    with atomic_file(path, "wb") as out:
        figure.savefig(out, format="png")


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _spread(lengths: Sequence[int]) -> list[int]:
    """Lengths whose labels do not run into each other on a log axis."""
    kept: list[int] = []
    for length in lengths:
        if not kept or length >= kept[-1] * max(1.15, (lengths[-1] / lengths[0]) ** (1 / 14)):
            kept.append(length)
    return kept
