"""A decoder of this project as a model under evaluation."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.data import tokenize
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.inference.generation import generate
from lawcat_jax.models import bind
from lawcat_jax.models.finite import not_finite_error
from lawcat_jax.runtime.sharding import mesh_of
from lawcat_jax.tasks.task import Generate, Model, NllSum

_CHUNK = 512  # tokens whose logits exist at once: T x V in float32 is 8 GB at 16K tokens and a 128K vocabulary


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
    """
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
                generate=greedy(graphdef, params, as_teacher=as_teacher, batch_size=batch_size),
                nll=model_nll(graphdef, params, as_teacher=as_teacher),
                fingerprint=f"{weights}-{role}",
            )
        )
    return models


def greedy(graphdef: Any, params: Any, *, as_teacher: bool, batch_size: int) -> Generate:
    """Greedy continuation by a decoder, in batches of one size, so that a short last batch compiles nothing new.

    It never stops at an end token: scores count tokens.
    """

    def call(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        return generate(
            graphdef,
            params,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_ids=(),
            temperature=0.0,
            seed=0,
            as_teacher=as_teacher,
            batch_size=batch_size,
        )

    return call


def model_nll(graphdef: Any, params: Any, *, as_teacher: bool) -> NllSum:
    """Negative log-likelihood of a batch under a decoder (see :class:`lawcat_jax.models.Decoder`)."""

    @functools.partial(jax.jit, static_argnames="chunk")
    def nll(params, tokens, targets, weights, lengths, chunk):
        model = bind(graphdef, params)
        hidden = model(tokens, lengths=lengths, as_teacher=as_teacher, return_hidden=True)

        def part(args):
            hidden, targets, weights = args
            logits = model.head(hidden).astype(jnp.float32)
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights)

        rows, length = tokens.shape

        def split(x):  # [B, T, ...] -> [chunks, B, chunk, ...]
            return jnp.moveaxis(x.reshape(rows, length // chunk, chunk, *x.shape[2:]), 1, 0)

        return jnp.sum(jax.lax.map(part, (split(hidden), split(targets), split(weights)))), jnp.sum(weights)

    def call(batch: Mapping[str, np.ndarray]) -> tuple[float, float]:
        length = batch["tokens"].shape[1]
        chunk = max(size for size in range(1, min(_CHUNK, length) + 1) if length % size == 0)
        names = ("tokens", "targets", "loss_weights", "lengths")
        with mesh_of(params):
            total, weight = nll(params, *(batch[name] for name in names), chunk=chunk)
        if not math.isfinite(total):
            raise _not_finite(graphdef, params, batch, as_teacher)
        return float(total), float(weight)

    return call


def _not_finite(graphdef: Any, params: Any, batch: Mapping[str, np.ndarray], as_teacher: bool) -> UserError:
    rows = [row[:length] for row, length in zip(batch["tokens"], batch["lengths"], strict=True) if length]
    problems = (not_finite_error(graphdef, params, row, as_teacher=as_teacher) for row in rows)
    problem = next(problems, UserError("the likelihood of the text is not finite"))
    # Other rows are tried only where the first one alone does not show a layer.
    return next((other for other in (problem, *problems) if "the first is" in str(other)), problem)


def _fingerprint(graphdef: Any, params: Any, tokenizer: Tokenizer) -> str:
    """A digest of weights, architecture and tokenizer. The weights are summed up where they lie, as integers, so that
    neither their number nor their sharding matters."""
    model = bind(graphdef, params)
    with mesh_of(params):
        sums = _checksums(params)
    facts = [(jax.tree_util.keystr(path), int(value)) for path, value in jax.tree_util.tree_leaves_with_path(sums)]
    text = repr(
        [facts, model.config, model.attention_config, tokenize.fingerprint(tokenizer), tokenize.bos_rule(tokenizer)]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@jax.jit
def _checksums(params: Any) -> Any:
    return jax.tree.map(_checksum, params)


def _checksum(x: jax.Array) -> jax.Array:
    """uint32: the sum of an array's bits, weighted by position, modulo 2**32. Exact in any order of summation."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.uint32(1)
    for axis in range(x.ndim):
        place = place * jnp.uint32(1_000_003) + 2 * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * place, dtype=jnp.uint32)
