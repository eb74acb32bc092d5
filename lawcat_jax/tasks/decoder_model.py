"""A decoder of this project as a model under evaluation."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.data import tokenize
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.inference.generation import bucket, default_chunk, empty_cache, generate, needs_room
from lawcat_jax.inference.likelihood import Row, log_likelihoods, token_nll
from lawcat_jax.inference.sampling import Sampling
from lawcat_jax.models import bind
from lawcat_jax.models.finite import not_finite_error
from lawcat_jax.runtime.array_hash import array_hash
from lawcat_jax.runtime.distributed import on_host
from lawcat_jax.runtime.sharding import batch_shards, mesh_of
from lawcat_jax.tasks.task import Generate, Model, NllSum, PositionNll, Progress


def decoder_models(
    graphdef: Any,
    params: Any,
    tokenizer: Tokenizer,
    *,
    name: str,
    label: str = "",
    is_student: bool,
    teacher: bool,
    batch_size: int,
    prefill_chunk: int = 0,
) -> list[Model]:
    """The student and, with ``teacher``, its teacher, which has the same weights with softmax attention.

    Args:
      graphdef, params: as from ``lawcat_jax.models.abstract``, and its parameters.
      tokenizer: the model's.
      name: in JSON reports; the teacher of a student is "<name> (teacher)" there.
      label: in tables and figures, instead of "student" and "teacher"; for comparing several checkpoints.
      is_student: False is a plain softmax model, of the role "teacher".
      teacher: evaluate the teacher of a student as well.
      batch_size: prompts generated together.
      prefill_chunk: prompt tokens read at a time, see :func:`lawcat_jax.inference.generation.generate`.
    """
    options = {
        "batch_size": batch_size,
        "prefill_chunk": prefill_chunk,
        "eos_ids": _eos_ids(graphdef, params, tokenizer),
    }
    roles = [*(["student"] if is_student else []), *(["teacher"] if teacher or not is_student else [])]
    weights = _fingerprint(graphdef, params, tokenizer)
    models = []
    for number, role in enumerate(roles):
        as_teacher, suffix = role == "teacher", f" ({role})" if number else ""
        models.append(
            Model(
                label=label + suffix if label else role,
                name=name + suffix,
                role=role,
                tokenizer=tokenizer,
                generate=greedy(graphdef, params, as_teacher=as_teacher, **options),
                nll=model_nll(graphdef, params, as_teacher=as_teacher),
                position_nll=position_nll(graphdef, params, as_teacher=as_teacher, chunk=prefill_chunk),
                devices=batch_shards(params),
                eos_ids=options["eos_ids"],
                positions=bind(graphdef, params).config.max_position_embeddings if as_teacher else None,
                **_free(graphdef, params, as_teacher=as_teacher, batch_size=batch_size, prefill_chunk=prefill_chunk),
                fingerprint=f"{weights}-{role}",
            )
        )
    return models


def _eos_ids(graphdef: Any, params: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """End tokens of the model, or else the tokenizer's."""
    own, end = bind(graphdef, params).config.eos_token_ids, tokenizer.eos_token_id
    return tuple(own) or (() if end is None else (end,))


def greedy(
    graphdef: Any,
    params: Any,
    *,
    as_teacher: bool,
    batch_size: int,
    prefill_chunk: int = 0,
    eos_ids: Sequence[int] = (),
) -> Generate:
    """Greedy continuation by a decoder, in batches of one size, so that a short last batch compiles nothing new.

    On several devices a batch is as many rows as it is given, up to a multiple of the devices.

    It stops at an end token (one of ``eos_ids``) where it is asked to, and else gives every token that it is asked for.
    """

    devices = batch_shards(params)

    def call(prompts: list[list[int]], max_new_tokens: int, ends: bool) -> list[list[int]]:
        rows = batch_size if devices == 1 else -(-len(prompts) // devices) * devices
        return generate(
            graphdef,
            params,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_ids=tuple(eos_ids) if ends else (),
            as_teacher=as_teacher,
            batch_size=rows,
            prefill_chunk=prefill_chunk,
        )

    return call


def _free(graphdef: Any, params: Any, *, as_teacher: bool, batch_size: int, prefill_chunk: int) -> dict[str, Any]:
    """``likelihoods`` and ``sample`` of a :class:`Model`, in batches of one size."""
    devices = batch_shards(params)
    options = {
        "as_teacher": as_teacher,
        "batch_size": batch_size * devices,
        "prefill_chunk": prefill_chunk,
    }

    def likelihoods(rows: Sequence[Row], progress: Progress | None = None) -> list[tuple[float, bool]]:
        told = None if progress is None else functools.partial(progress, 0)
        return log_likelihoods(graphdef, params, rows, progress=told, **options)

    def sample(
        prompts: list[list[int]],
        max_new_tokens: int,
        eos_ids: Sequence[int],
        sampling: Sampling,
        stop: Callable[[int, Sequence[int]], bool] | None,
    ) -> list[list[int]]:
        chosen = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, "sampling": sampling, "stop": stop}
        return generate(graphdef, params, prompts, **chosen, **options)

    return {"likelihoods": likelihoods, "sample": sample}


def model_nll(graphdef: Any, params: Any, *, as_teacher: bool) -> NllSum:
    """Negative log-likelihood of a batch under a decoder (see :class:`lawcat_jax.models.Decoder`)."""

    @jax.jit
    def nll(params, tokens, targets, weights, lengths):
        model = bind(graphdef, params)
        hidden = model(tokens, lengths=lengths, as_teacher=as_teacher, return_hidden=True)
        lost = token_nll(model, hidden, targets)[0] * weights
        return jnp.sum(jnp.where(weights > 0, lost, 0.0)), jnp.sum(weights)

    def call(batch: Mapping[str, np.ndarray]) -> tuple[float, float]:
        names = ("tokens", "targets", "loss_weights", "lengths")
        with mesh_of(params):
            total, weight = nll(params, *(batch[name] for name in names))
        total = float(total)
        if not math.isfinite(total):
            raise _not_finite(graphdef, params, batch, as_teacher)
        return total, float(weight)

    return call


def position_nll(graphdef: Any, params: Any, *, as_teacher: bool, chunk: int = 0) -> PositionNll:
    """Negative log-likelihood of a batch by position, in chunks of ``chunk`` tokens (0 chooses by the batch) that hand on
    what the model remembers.
    """

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, cache, unread, tokens, targets, weights):
        model = bind(graphdef, params)
        # Padding stands on the right, where nothing that counts sees it.
        hidden, cache = model.prefill(tokens, cache, unread=unread, return_hidden=True, as_teacher=as_teacher)
        return jnp.sum(token_nll(model, hidden, targets)[0] * weights, axis=0), cache

    def call(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        rows, length = batch["tokens"].shape
        size = min(length, chunk or default_chunk(-(-rows // batch_shards(params))))
        room = bucket(length) if needs_room(graphdef, params, as_teacher) else 1
        parts = []
        with mesh_of(params):
            cache, _ = empty_cache(params, graphdef=graphdef, batch=rows, length=room, as_teacher=as_teacher)
            for start in range(0, length, size):
                arrays = [batch[name][:, start : start + size] for name in ("tokens", "targets", "loss_weights")]
                sums, cache = step(params, cache, np.asarray(batch["lengths"]) - start, *arrays)
                parts.append(sums)
        totals = np.concatenate([on_host(part) for part in parts]).astype(np.float64)
        counted = np.asarray(batch["loss_weights"], np.float64).sum(axis=0)
        if not np.isfinite(totals[counted > 0]).all():
            raise _not_finite(graphdef, params, batch, as_teacher)
        return totals, counted

    return call


def _not_finite(graphdef: Any, params: Any, batch: Mapping[str, np.ndarray], as_teacher: bool) -> UserError:
    rows = [row[:length] for row, length in zip(batch["tokens"], batch["lengths"], strict=True) if length]
    problems = (not_finite_error(graphdef, params, row, as_teacher=as_teacher) for row in rows)
    problem = next(problems, UserError("the likelihood of the text is not finite"))
    # Other rows are tried only where the first one alone does not show a layer.
    return next((other for other in (problem, *problems) if "the first is" in str(other)), problem)


def _fingerprint(graphdef: Any, params: Any, tokenizer: Tokenizer) -> str:
    """A digest of weights, architecture and tokenizer. The weights are hashed where they lie, whatever their sharding."""
    model = bind(graphdef, params)
    with mesh_of(params):
        hashes = _hashes(params)
    leaves = jax.tree_util.tree_leaves_with_path(hashes)
    facts = [(jax.tree_util.keystr(path), np.asarray(value).tolist()) for path, value in leaves]
    writes = [tokenize.fingerprint(tokenizer), tokenize.bos_rule(tokenizer), getattr(tokenizer, "chat_template", None)]
    text = repr([facts, model.config, model.attention_config, *writes])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@jax.jit
def _hashes(params: Any) -> Any:
    return jax.tree.map(array_hash, params)
