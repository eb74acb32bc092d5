"""Tables and plots of benchmark records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS = "pallas"
"""Label of this project's default."""


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["model"], record["operation"], record["batch"], record["length"]


def table(records: list[dict[str, Any]]) -> str:
    """Text with one line for each shape and one column for each implementation, in milliseconds, the bandwidth floor, and which
    of this project's implementations served the call."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    labels: list[str] = []
    for r in records:
        if "ms" not in r:
            continue
        row = rows.setdefault(_key(r), {"floor": r["floor_ms"], "served": "-"})
        row[r["label"]] = r["ms"]["median"]
        if r["label"] == OURS:
            row["served"] = r.get("served", "-")
        if r["label"] not in labels:
            labels.append(r["label"])
    lines = ["model operation batch length served floor " + " | ".join(labels)]
    for key, row in rows.items():
        cells = [f"{row[label]:.3f}" if label in row else "-" for label in labels]
        lines.append(" ".join(map(str, key)) + f" {row['served']} {row['floor']:.3f} " + " | ".join(cells))
    return "\n".join(lines)


def best(records: list[dict[str, Any]]) -> str:
    """Text with one line for each operation and shape: this project's default against the fastest peer of each kind.

    Milliseconds; the ratio is the peer's time over this project's, above 1 where this project is faster. "-": no peer of that
    kind was measured."""
    ours = {_key(r): r for r in records if "ms" in r and r["label"] == OURS}
    lines = ["against the best of each kind (milliseconds, peer's time over ours)"]
    lines += ["model | operation | shape | served | ours | fastest linear | ratio | fastest softmax | ratio"]
    for key, mine in ours.items():
        model, operation, batch, length = key
        time = mine["ms"]["median"]
        cells = [model, operation, f"{batch}x{length}", mine.get("served", "-"), f"{time:.3f}"]
        for kind in ("linear", "softmax"):
            rivals = [r for r in records if "ms" in r and _key(r) == key and r.get("kind") == kind]
            first = min(rivals, key=lambda r: r["ms"]["median"], default=None)
            if first is None:
                cells += ["-", "-"]
            else:
                cells += [f"{first['ms']['median']:.3f} {first['label']}", f"{first['ms']['median'] / time:.2f}"]
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def plots(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws time against length at a constant number of tokens, with the floor: one file for each model and operation.

    Returns the files written to ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = []
    timed = [r for r in records if "ms" in r and r["operation"] != "decode" and not r.get("variant")]
    for model, operation in sorted({(r["model"], r["operation"]) for r in timed}):
        chosen = [r for r in timed if (r["model"], r["operation"]) == (model, operation)]
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for label in dict.fromkeys(r["label"] for r in chosen):
            points = sorted((r["length"], r["ms"]["median"]) for r in chosen if r["label"] == label)
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        floor = sorted({(r["length"], r["floor_ms"]) for r in chosen})
        axes.plot(*zip(*floor, strict=True), color="black", linestyle=":", label="memory-bandwidth floor")
        axes.set(xscale="log", yscale="log", xlabel="tokens a sequence", ylabel="milliseconds")
        axes.set_title(f"{operation}, {model}, one {chosen[0]['device']}")
        axes.set_xscale("log", base=2)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
        figure.tight_layout()
        path = folder / f"{operation.replace('+', '_').replace(' ', '_')}_{model}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        files.append(path)
    return files
