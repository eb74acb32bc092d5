"""An inspection of one student from its checkpoint to the report."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lawcat_jax.analysis.inspection import passes, weights
from lawcat_jax.analysis.inspection.figure import draw
from lawcat_jax.analysis.inspection.report import as_markdown
from lawcat_jax.analysis.inspection.rows import compared_shape, read_rows
from lawcat_jax.checkpoints.model_dir import in_run, open_checkpoint
from lawcat_jax.config import Bos, to_dict
from lawcat_jax.data.batch import Batch
from lawcat_jax.errors import UserError
from lawcat_jax.files import atomic_file, write_json
from lawcat_jax.inference.loading import LoadedModel, load_for_inference
from lawcat_jax.models import bind, num_linear
from lawcat_jax.models.mixers.diagnostics import QUANTILES

CHUNK = 512
"""[tokens] Distance of the positions at which states are looked at."""
HYBRIDS = (1, 2, 4)
"""Numbers of softmax layers that a report names the best choice for."""


def inspect_checkpoint(
    checkpoint: str,
    *,
    text: str | None = None,
    text_key: str = "text",
    samples: int = 4,
    length: int | None = None,
    max_length: int = 65_536,
    output: str | None = None,
    revision: str | None = None,
    base: str | None = None,
    dtype: str = "auto",
    tokenizer: str | None = None,
    add_bos: Bos | None = None,
) -> dict[str, Any]:
    """Inspect a student and write ``inspection.json``, ``.md`` and ``.png``; returns what the JSON file holds.

    Args:
      checkpoint: a student: model directory, folder of a run, small file.
      text, text_key: what it reads (see :mod:`lawcat_jax.data.text`); None for passkey prompts of the evaluation.
      samples, length: rows and tokens of the comparison with the teacher; see
        :func:`lawcat_jax.analysis.inspection.rows.compared_shape`.
      max_length: tokens of the one row over which states are followed.
      output: folder; default ``inspect/`` in the folder of a run, ``./inspect_<name>/`` for any other model.
      revision, base, dtype, tokenizer, add_bos: see :func:`lawcat_jax.inference.loading.load_for_inference`.

    Raises:
      UserError: no student, too little text, a length that the teacher does not have, results that are no numbers, an
        output that cannot be written.
    """
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"--output={output} exists and is not a directory")
    if checkpoint:
        _check_student(checkpoint, revision, base)
    options: dict[str, Any] = {"revision": revision, "base": base, "tokenizer": tokenizer, "add_bos": add_bos}
    model = load_for_inference(checkpoint, dtype=dtype, **options)
    positions = bind(model.graphdef, model.params).config.max_position_embeddings
    shape = compared_shape(positions, samples, length)
    compared, followed = read_rows(model.tokenizer, text, text_key, [shape, (1, max_length)])
    found = {
        "checkpoint": checkpoint,
        "text": text or "passkey prompts (landmark)",
        "samples": samples,
        "length": shape[1],
        "training_length": model.extra.get("training_length"),
        "device": jax.devices()[0].device_kind,
        **measure(model, compared, followed),
    }
    folder = Path(output) if output else _default_output(checkpoint, model)
    markdown = as_markdown(found)
    draw(folder / "inspection.png", found)
    write_json(folder / "inspection.json", found)
    with atomic_file(folder / "inspection.md") as out:
        out.write(markdown)
    print(markdown)
    print(f"wrote {folder}/inspection.json, .md and .png")
    return found


def measure(model: LoadedModel, compared: Batch, followed: Batch) -> dict[str, Any]:
    """Everything that is known about a student, as JSON values.

    Args:
      model: the student.
      compared: rows on which its layers are compared with the teacher's.
      followed: one row over which its states are followed.

    Raises:
      UserError: results that are no numbers.
    """
    graphdef, params = model.graphdef, model.params
    decoder = bind(graphdef, params)
    attention = decoder.attention_config
    assert attention is not None  # a student
    layers = passes.linear_layers(decoder)
    mixers = jax.device_get(params["mixers"])
    _say("layer by layer")
    statistics = jax.device_get(passes.statistics(params, compared, graphdef=graphdef))
    errors = jax.device_get(passes.relative_errors(params, compared, graphdef=graphdef))
    passes.check_finite(graphdef, params, compared, errors, statistics)
    _say(f"each of {len(layers)} layers alone in the teacher")
    costs = passes.replacement_costs(graphdef, params, compared)
    passes.check_finite(graphdef, params, compared, costs)
    singular, drift = weights.gate_singular_values(mixers), weights.tap_drift(mixers, attention)
    ranks = None if singular is None else weights.effective_rank(singular)
    rows: list[dict[str, Any]] = []
    for number, layer in enumerate(layers):
        row: dict[str, Any] = {"layer": layer, "relative_mse": float(errors[number]), "kl": float(costs[number])}
        if singular is not None and ranks is not None:
            row |= {"gate_rank": singular.shape[-1], "effective_gate_rank": float(ranks[number])}
        row |= {name: np.asarray(value[number], np.float64).tolist() for name, value in statistics.items()}
        row |= {f"{name}_drift": value[number].tolist() for name, value in drift.items()}
        rows.append(row)
    rankings = {cost: rank(layers, [row[cost] for row in rows]) for cost in ("kl", "relative_mse")}
    return {
        "attention": to_dict(attention),
        "half_life_quantiles": list(QUANTILES),
        "layers": rows,
        "state_norm": _state_norm(graphdef, params, followed, layers),
        "rankings": rankings,
        "hybrids": {cost: hybrids(ranked, attention.softmax_layers) for cost, ranked in rankings.items()},
    }


def _state_norm(graphdef: Any, params: dict[str, Any], followed: Batch, layers: Sequence[int]) -> dict[str, Any] | None:
    """Positions, and the norm of each head's S there by layer; None for a mixer whose state has no S."""
    if "S" not in jax.eval_shape(lambda: bind(graphdef, params).init_recurrent(1))["linear"]:
        return None
    length = int(followed["lengths"][0])
    tokens, chunk = followed["tokens"][:, :length], min(CHUNK, length)
    positions, norms = passes.state_norms(graphdef, params, tokens, chunk, _Clock(length).tell)
    passes.check_finite(graphdef, params, followed, norms)
    by_layer = {str(layer): norms[:, number].tolist() for number, layer in enumerate(layers)}
    return {"positions": positions, "layers": by_layer}


def rank(layers: Sequence[int], costs: Sequence[float]) -> list[int]:
    """The layers, those whose replacement costs most first; of equal ones the lower first."""
    return [layer for _, layer in sorted(zip(costs, layers, strict=True), key=lambda pair: (-pair[0], pair[1]))]


def hybrids(ranked: Sequence[int], kept: Sequence[int]) -> dict[str, str]:
    """Number of further softmax layers -> override of a training config that keeps those at the head of a ranking.

    ``kept`` are layers that are softmax layers already. A hybrid has at least one linearised layer.
    """
    chosen = {n: sorted([*kept, *ranked[:n]]) for n in HYBRIDS if n < len(ranked)}
    return {str(n): f"--config.attention.softmax_layers={','.join(map(str, layers))}" for n, layers in chosen.items()}


def _check_student(checkpoint: str, revision: str | None, base: str | None) -> None:
    opened = open_checkpoint(in_run(checkpoint)[0], revision, base)
    if opened.attention is None or not num_linear(opened.model, opened.attention):
        raise UserError(f"{checkpoint} has no linearised layers to inspect; name a student that a run has made")


def _default_output(checkpoint: str, model: LoadedModel) -> Path:
    if model.directory is not None:
        return model.directory / "inspect"
    return Path("inspect_" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(checkpoint).stem).strip("-"))


def _say(text: str) -> None:
    print(f"inspect: {text}", file=sys.stderr, flush=True)


class _Clock:
    """Says how far the pass over a long text is, every ten seconds and at its end."""

    def __init__(self, length: int):
        self._length, self._last = length, time.monotonic()

    def tell(self, position: int) -> None:
        now = time.monotonic()
        if now - self._last >= 10 or position == self._length:
            self._last = now
            _say(f"states at {position} of {self._length} tokens")
