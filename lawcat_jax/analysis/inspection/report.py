"""An inspection as a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lawcat_jax.models.mixers.diagnostics import QUANTILES

Cell = Callable[[Mapping[str, Any]], str]

_TAPS = ("conv_q_drift", "conv_k_drift", "conv_q2_drift", "conv_k2_drift")
# (heading, name that a layer must have, its cell)
_COLUMNS: tuple[tuple[str, str, Cell], ...] = (
    ("half-life: median", "half_life", lambda layer: f"{np.median(half_lives(layer, 0.5)):.3g}"),
    ("longest tenth from", "half_life", lambda layer: f"{np.median(half_lives(layer, 0.9)):.3g}"),
    ("gates > 0.999", "saturated", lambda layer: f"{100 * np.mean(layer['saturated']):.1f} %"),
    ("effective gate rank", "effective_gate_rank", lambda layer: f"{layer['effective_gate_rank']:.1f}"),
    ("smallest denominator", "denominator", lambda layer: f"{np.min(layer['denominator']):.1e}"),
    ("entropy of q features", "entropy_q", lambda layer: f"{np.mean(layer['entropy_q']):.2f}"),
    *((f"drift of {name.removesuffix('_drift')}", name, lambda layer, name=name: _mean(layer[name])) for name in _TAPS),
    ("window share", "window_share", lambda layer: f"{np.mean(layer['window_share']):.3f}"),
    ("relative MSE", "relative_mse", lambda layer: f"{layer['relative_mse']:.4f}"),
    ("KL if replaced", "kl", lambda layer: f"{layer['kl']:.2e}"),
)
_RANKINGS = {
    "kl": "By the KL divergence of the teacher's output with that one layer replaced",
    "relative_mse": "By the relative MSE of the layer",
}


def half_lives(layer: Mapping[str, Any], level: float) -> list[float]:
    """A quantile of the half-lives of each key-value head of a layer, tokens; ``level`` is one of ``QUANTILES``."""
    return [quantiles[QUANTILES.index(level)] for quantiles in layer["half_life"]]


def as_markdown(found: Mapping[str, Any]) -> str:
    """The page of what :func:`lawcat_jax.analysis.inspection.run.inspect_checkpoint` found."""
    layers = found["layers"]
    columns = [column for column in _COLUMNS if column[1] in layers[0]]
    rows = [["layer", *(heading for heading, _, _ in columns)], ["---"] * (len(columns) + 1)]
    rows += [[str(layer["layer"]), *(cell(layer) for _, _, cell in columns)] for layer in layers]
    rank = f" The gates' rank is {layers[0]['gate_rank']}." if "gate_rank" in layers[0] else ""
    lines = [
        f"# {found['checkpoint']}",
        "",
        f"{found['samples']} rows of {found['length']} tokens: {found['text']}. Half-lives in tokens, medians "
        "over the heads; entropies in nats; drift is the distance of a head's convolution taps from their initial "
        "values, the mean of the heads; relative MSE is |student - teacher|² / |teacher|² of the heads on the teacher's "
        f"hidden states, without adapters; KL in nats a token, with the layer's adapters.{rank}",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(_states(found["state_norm"]) if found["state_norm"] else []),
        "## Which layers to keep as softmax attention",
    ]
    for cost, ranked in found["rankings"].items():
        lines += ["", f"{_RANKINGS[cost]}, dearest first: {', '.join(map(str, ranked))}."]
        for count, override in found["hybrids"][cost].items():
            lines += ["", f"    {override}    # {count} more"]
    return "\n".join(lines) + "\n"


def _states(states: Mapping[str, Any]) -> list[str]:
    positions, last = states["positions"], len(states["positions"]) - 1
    shown = [i for i, position in enumerate(positions) if i == last or (position & (position - 1)) == 0]
    rows = [["layer", *(str(positions[i]) for i in shown)], ["---"] * (len(shown) + 1)]
    rows += [[layer, *(f"{np.mean(norms[i]):.3g}" for i in shown)] for layer, norms in states["layers"].items()]
    intro = "Frobenius norm of the state S, mean of a layer's heads, in one pass over one row."
    return ["## States", "", intro, "", *("| " + " | ".join(row) + " |" for row in rows), ""]


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3f}"
