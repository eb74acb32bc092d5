"""Perplexity of text: mean negative log-likelihood per token, in nats, and its exponential."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.config import DataConfig
from lawcat_jax.data.pipeline import make_dataset
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError

_CHUNK = 512  # tokens whose logits exist at once: T x V in float32 is 8 GB at 16K tokens and a 128K vocabulary


@dataclasses.dataclass(frozen=True)
class TextResult:
    """``nats`` per predicted token, over ``n`` tokens; ``perplexity`` = exp(nats)."""

    nats: float
    n: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats, 700.0))


NllSum = Callable[[dict[str, np.ndarray]], tuple[float, float]]
"""A batch -> (weighted sum of negative log-likelihoods in nats, sum of weights)."""


def model_nll(graphdef, params, *, as_teacher: bool) -> NllSum:
    """Negative log-likelihood of a batch under a decoder (see :class:`lawcat_jax.models.Decoder`)."""
    from lawcat_jax.models import bind
    from lawcat_jax.runtime.sharding import mesh_of

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

    def call(batch: dict[str, np.ndarray]) -> tuple[float, float]:
        length = batch["tokens"].shape[1]
        chunk = max(size for size in range(1, min(_CHUNK, length) + 1) if length % size == 0)
        names = ("tokens", "targets", "loss_weights", "lengths")
        with mesh_of(params):
            total, weight = nll(params, *(batch[name] for name in names), chunk=chunk)
        return float(total), float(weight)

    return call


def evaluate_perplexity(
    nll: NllSum,
    tokenizer: Tokenizer,
    *,
    source: str,
    length: int,
    samples: int = 50,
    batch_size: int = 10,
    text_key: str = "text",
    add_bos: bool = True,
    progress: Callable[[int, int, int], None] | None = None,
) -> TextResult:
    """Perplexity of the first ``samples`` sequences of ``length`` tokens of a text source.

    ``progress(length, samples done, samples)`` is called after each batch.

    Raises:
      UserError: when the source cannot be read, or is shorter than one sequence.
    """
    if not source:
        raise UserError("perplexity: name a text (--text=tfds:..., hf:..., or a path)")
    data = DataConfig(
        kind="text",
        source=source,
        validation_source=source,
        validation_samples=samples,
        text_key=text_key,
        add_bos=add_bos,
    )
    batches = make_dataset(
        data, tokenizer, seq_length=length, batch_size=batch_size, seed=0, split="validation", repeat=False
    )
    total = weight = 0.0
    for number, batch in enumerate(batches, 1):
        batch_total, batch_weight = nll(batch)
        total, weight = total + batch_total, weight + batch_weight
        if progress is not None:
            progress(length, min(number * batch_size, samples), samples)
    return TextResult(total / weight, round(weight))
