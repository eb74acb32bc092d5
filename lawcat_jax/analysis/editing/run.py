"""An edited student: from a checkpoint to a model directory, and what the edit changes on a text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.analysis.editing import gate_ranks
from lawcat_jax.analysis.inspection.rows import compared_shape, read_rows
from lawcat_jax.checkpoints.model_dir import ModelBundle, in_run, load_model, open_checkpoint, save_model
from lawcat_jax.data.batch import Batch
from lawcat_jax.data.tokenize import fit_embedding
from lawcat_jax.errors import UserError
from lawcat_jax.files import check_target
from lawcat_jax.inference.loading import find_checkpoint
from lawcat_jax.models import abstract, bind, num_linear
from lawcat_jax.training.divergence import Teacher
from lawcat_jax.training.finetune import chunked_token_sums

_HEAD_CHUNK = 256  # tokens whose logits exist at once


def edit_checkpoint(
    checkpoint: str,
    target: str,
    *,
    gate_parameters: int | None = None,
    softmax_layers: Sequence[int] = (),
    text: str | None = None,
    text_key: str = "text",
    samples: int = 4,
    length: int | None = None,
    revision: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an edited student as a model directory; print and return what it is.

    Args:
      checkpoint: a student.
      target: directory to create.
      gate_parameters: budget of the gates' two matrices over all linearised layers, see
        :mod:`lawcat_jax.analysis.editing.gate_ranks`; None leaves the gates alone.
      softmax_layers: layers that get softmax attention back; their mixers and adapters are dropped.
      text, text_key, samples, length: what gates are measured on, and student and edited student compared; as in
        :func:`lawcat_jax.analysis.inspection.run.inspect_checkpoint`.
      revision, base: see :func:`lawcat_jax.checkpoints.model_dir.open_checkpoint`.
      overwrite: replace an existing model directory.

    Raises:
      UserError: no student, nothing to do, layers that it does not have, gates without a rank, a target that exists.
    """
    if not target:
        raise UserError("--target is missing: the directory to create")
    if gate_parameters is None and not softmax_layers:
        raise UserError("nothing to do: give --gate_parameters or --softmax_layers")
    found = find_checkpoint(checkpoint, revision=revision, base=base)
    opened = open_checkpoint(found.source, revision, base)
    check_target(target, overwrite=overwrite, sources=[opened.directory, in_run(checkpoint)[0]])
    if opened.attention is None or not num_linear(opened.model, opened.attention):
        raise UserError(f"{checkpoint} has no linearised layers to edit; name a student that a run has made")
    tokenizer = fit_embedding(found.tokenizer, opened.model.vocab_size, checkpoint)
    shape = compared_shape(opened.model.max_position_embeddings, samples, length)
    (read,) = read_rows(tokenizer, text, text_key, [shape])
    student = load_model(found.source, revision=revision, base=base, dtype="keep")
    edited = with_softmax_layers(student, softmax_layers, checkpoint)
    facts: dict[str, Any] = {}
    if gate_parameters is not None:
        edited, facts = with_gate_budget(edited, gate_parameters, read, checkpoint)
    facts["kl"] = divergence(student, edited, read)
    save_model(
        target,
        model=edited.model,
        attention=edited.attention,
        lora=edited.lora,
        params=edited.params,
        tokenizer_source=edited.tokenizer_path,
        extra=edited.extra,
        overwrite=overwrite,
    )
    for line in _described(facts, softmax_layers):
        print(line)
    print(f"wrote {target}")
    return facts


def with_softmax_layers(student: ModelBundle, layers: Sequence[int], where: str) -> ModelBundle:
    """The hybrid of a student in which ``layers`` have the teacher's attention again.

    Raises:
      UserError: layers that are no linearised ones, or all of them.
    """
    attention = student.attention
    assert attention is not None
    linear = [layer for layer in range(student.model.num_layers) if layer not in attention.softmax_layers]
    if wrong := [layer for layer in layers if layer not in linear]:
        raise UserError(f"--softmax_layers: {where} has no linearised layer {wrong[0]}; it has {_listed(linear)}")
    kept = [number for number, layer in enumerate(linear) if layer not in layers]
    if not kept:
        raise UserError(f"--softmax_layers: no linearised layer would be left, which is the teacher of {where}")
    if not layers:
        return student
    changed = dataclasses.replace(attention, softmax_layers=tuple(sorted({*attention.softmax_layers, *layers})))
    cut = {name: jax.tree.map(lambda x: np.asarray(x)[kept], student.params[name]) for name in _own(student.params)}
    return dataclasses.replace(student, attention=changed, params={**student.params, **cut})


def with_gate_budget(student: ModelBundle, budget: int, read: Batch, where: str) -> tuple[ModelBundle, dict[str, Any]]:
    """(a student whose gates have at most ``budget`` parameters in their two matrices, what was chosen).

    Raises:
      UserError: gates that are no product of two matrices.
    """
    mixers, attention = student.params["mixers"], student.attention
    assert attention is not None
    each = gate_ranks.rank_parameters(mixers, where)
    graphdef, _ = abstract(student.model, attention, student.lora)
    statistics = jax.device_get(gate_ranks.moments(student.params, read, graphdef=graphdef))
    found = gate_ranks.components(np.asarray(mixers["gate_up"]["kernel"]), statistics.covariance)
    ranks = gate_ranks.choose_ranks(found.variance, budget // each)
    down, up = gate_ranks.truncated(mixers["gate_down"], mixers["gate_up"], found, statistics.mean, ranks)
    size = down["kernel"].shape[-1]
    channels, lost = (
        found.directions.shape[-1],
        [float(v[n:].sum()) for v, n in zip(found.variance, ranks, strict=True)],
    )
    edited = dataclasses.replace(
        student,
        attention=dataclasses.replace(attention, gate_rank=size),
        params={**student.params, "mixers": {**mixers, "gate_down": down, "gate_up": up}},
    )
    return edited, {
        "ranks": ranks,
        "parameters": sum(ranks) * each,
        "parameters_before": int(found.variance.size) * each,
        "stored": len(ranks) * size * each,
        "logit_error": float(np.sqrt(np.mean(lost) / channels)),
    }


def divergence(student: ModelBundle, edited: ModelBundle, read: Batch) -> float:
    """KL(student || edited) in nats a token, over the tokens of ``read``."""
    hidden = [_hidden(abstract(m.model, m.attention, m.lora)[0], m.params, read) for m in (student, edited)]
    graphdef, _ = abstract(student.model, student.attention, student.lora)
    return float(_divergence(graphdef, student.params, read, *hidden))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graphdef: Any, params: dict[str, Any], read: Batch) -> jax.Array:
    return bind(graphdef, params)(read["tokens"], lengths=read["lengths"], return_hidden=True)


@functools.partial(jax.jit, static_argnums=0)
def _divergence(graphdef: Any, params: dict[str, Any], read: Batch, wanted: jax.Array, hidden: jax.Array) -> jax.Array:
    decoder, weights = bind(graphdef, params), jnp.asarray(read["loss_weights"])
    head = functools.partial(decoder.head, kernel=decoder.head_kernel())
    sums = chunked_token_sums(head, hidden, read["targets"], weights, Teacher(wanted, weights), _HEAD_CHUNK)
    return sums["kl"] / jnp.sum(weights)


def _own(params: dict[str, Any]) -> list[str]:
    return [name for name in ("mixers", "lora") if name in params]


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _described(facts: dict[str, Any], softmax_layers: Sequence[int]) -> list[str]:
    lines = []
    if softmax_layers:
        lines.append(f"softmax attention again in layer {_listed(sorted(set(softmax_layers)))}")
    if "ranks" in facts:
        lines += [
            f"gate ranks by linearised layer: {_listed(facts['ranks'])}",
            f"gate parameters in use: {facts['parameters']:,} of {facts['parameters_before']:,}; the arrays, which have the "
            f"largest rank in every layer, hold {facts['stored']:,}",
            f"error of the gate logits on the text: {facts['logit_error']:.3g} (root mean square)",
        ]
    return [*lines, f"KL(student || edited student) on the text: {facts['kl']:.3g} nats a token"]
