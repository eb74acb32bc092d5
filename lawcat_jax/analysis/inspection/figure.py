"""An inspection as one page of plots."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lawcat_jax.analysis.inspection.report import half_lives
from lawcat_jax.tasks.figures import new_figure, save_figure, short

_COLUMNS = 3


def draw(path: str | os.PathLike, found: Mapping[str, Any]) -> None:
    """PNG of what :func:`lawcat_jax.analysis.inspection.run.inspect_checkpoint` found, a panel for each thing that the
    student has.

    Raises:
      UserError: the file cannot be written.
    """
    layers = found["layers"]
    panels: list[Callable[[Any], None]] = []
    if "half_life" in layers[0]:
        panels.append(lambda axes: _half_lives(axes, layers))
    if "effective_gate_rank" in layers[0]:
        panels.append(lambda axes: _ranks(axes, layers))
    if "denominator" in layers[0]:
        panels.append(lambda axes: _curves(axes, layers, {"denominator": np.min}, "smallest denominator", log=True))
    if drifts := [name for name in layers[0] if name.endswith("_drift")]:
        panels.append(lambda axes: _curves(axes, layers, dict.fromkeys(drifts, np.mean), "drift of convolution taps"))
    if "half_life" not in layers[0]:
        names = [name for name in ("entropy_q", "entropy_k") if name in layers[0]]
        panels.append(lambda axes: _curves(axes, layers, dict.fromkeys(names, np.mean), "entropy of features (nats)"))
    if "window_share" in layers[0]:
        panels.append(lambda axes: _curves(axes, layers, {"window_share": np.mean}, "weight of the window"))
    panels += [
        lambda axes: _curves(axes, layers, {"relative_mse": np.mean}, "relative MSE against the teacher's attention"),
        lambda axes: _curves(axes, layers, {"kl": np.mean}, "KL with this layer alone replaced (nats)", log=True),
    ]
    if found["state_norm"]:
        panels.append(lambda axes: _states(axes, found["state_norm"], found["training_length"]))
    lines = math.ceil(len(panels) / _COLUMNS)
    figure = new_figure(13, 3.6 * lines)
    grid = list(figure.subplots(lines, _COLUMNS, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(
        f"{found['checkpoint']}: {found['samples']} x {found['length']} tokens, {found['text']}", fontsize=10
    )
    save_figure(figure, path)


def _half_lives(axes: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    lives = np.asarray([half_lives(layer, 0.5) for layer in layers]).T
    image = axes.imshow(np.log2(lives), cmap="cividis", aspect="auto", origin="lower")
    axes.set_yticks(range(len(lives)))
    axes.set_ylabel("key-value head")
    _layer_ticks(axes, layers)
    bar = axes.figure.colorbar(image, ax=axes)
    ticks = np.unique(np.round(np.linspace(np.log2(lives).min(), np.log2(lives).max(), 5), 1))
    bar.set_ticks(ticks, labels=[f"{2**tick:.3g}" for tick in ticks])
    axes.set_title("median half-life (tokens)", fontsize=10)


def _ranks(axes: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    _curves(axes, layers, {"effective_gate_rank": np.mean}, "effective rank of the gates")
    axes.axhline(layers[0]["gate_rank"], color="#555555", linestyle="--", linewidth=1, label="rank")
    axes.legend(fontsize=8)
    axes.set_ylim(bottom=0)


def _curves(
    axes: Any,
    layers: Sequence[Mapping[str, Any]],
    series: Mapping[str, Callable[[Any], Any]],
    title: str,
    *,
    log: bool = False,
) -> None:
    """Curves over layers, each of what a function makes of a layer's values."""
    for name, function in series.items():
        values = [function(layer[name]) for layer in layers]
        axes.plot(range(len(layers)), values, marker="o", markersize=3, label=name)
    if log and all(line.get_ydata().min() > 0 for line in axes.get_lines()):
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(fontsize=8)
    _layer_ticks(axes, layers)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)


def _layer_ticks(axes: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    step = max(1, len(layers) // 10)
    axes.set_xticks(range(0, len(layers), step), [str(layer["layer"]) for layer in layers[::step]])
    axes.set_xlabel("layer")


def _states(axes: Any, states: Mapping[str, Any], training_length: int | None) -> None:
    from matplotlib import colormaps

    positions, curves = states["positions"], states["layers"]
    for number, (layer, norms) in enumerate(curves.items()):
        label = layer if number in (0, len(curves) - 1) else None
        colour = colormaps["viridis"](number / max(1, len(curves) - 1))
        axes.plot(positions, np.mean(norms, axis=1), color=colour, linewidth=1, label=label)
    if training_length:
        axes.axvline(training_length, color="#555555", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [position for position in positions if position & (position - 1) == 0] or [positions[-1]]
    axes.set_xticks(ticks, [short(tick) for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.legend(title="layer", fontsize=8)
    axes.grid(alpha=0.3)
    axes.set_xlabel("position (tokens)")
    axes.set_title("norm of the state, mean of a layer's heads", fontsize=10)
