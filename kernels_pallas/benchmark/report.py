"""Tables and plots of benchmark records."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table(records: list[dict[str, Any]]) -> str:
    """Text with one line for each shape and one column for each implementation, in milliseconds, and the bandwidth floor."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    labels: list[str] = []
    for r in records:
        if "ms" not in r:
            continue
        row = rows.setdefault((r["model"], r["operation"], r["batch"], r["length"]), {"floor": r["floor_ms"]})
        row[r["label"]] = r["ms"]["median"]
        if r["label"] not in labels:
            labels.append(r["label"])
    lines = ["model operation batch length floor " + " | ".join(labels)]
    for key, row in rows.items():
        cells = [f"{row[label]:.3f}" if label in row else "-" for label in labels]
        lines.append(" ".join(map(str, key)) + f" {row['floor']:.3f} " + " | ".join(cells))
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
