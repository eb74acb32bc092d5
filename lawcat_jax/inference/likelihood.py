"""Log-likelihoods of tokens after their contexts, in batches, for contexts of any length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.inference.generation import bucket, default_chunk, empty_cache, needs_room, prefill_plan
from lawcat_jax.models import bind
from lawcat_jax.models.finite import not_finite_error
from lawcat_jax.runtime.distributed import on_host
from lawcat_jax.runtime.sharding import batch_shards, mesh_of

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of what follows it, each at least one."""

_CHUNK = 512  # tokens whose logits exist at once: T x V in float32 is 8 GB at 16K tokens and a 128K vocabulary


def token_nll(
    model: Any, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """(negative log-likelihood of each target in nats, float32; whether it is the most likely token) after final-normed
    hidden states, with the logits of a part of the tokens at once."""
    rows, length = targets.shape
    chunk = max(size for size in range(1, min(_CHUNK, length) + 1) if length % size == 0)

    def part(args):
        hidden, targets = args
        logits = model.head(hidden).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked, picked >= jnp.max(logits, axis=-1)

    def split(x):  # [B, T, ...] -> [chunks, B, chunk, ...]
        return jnp.moveaxis(x.reshape(rows, length // chunk, chunk, *x.shape[2:]), 1, 0)

    found = jax.lax.map(part, (split(hidden), split(targets)))
    nll, best = (jnp.moveaxis(x, 0, 1).reshape(rows, length) for x in found)
    return nll, best


def log_likelihoods(
    graphdef: Any,
    params: dict[str, Any],
    rows: Sequence[Row],
    *,
    as_teacher: bool = False,
    batch_size: int = 8,
    prefill_chunk: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats of what follows the context, whether greedy decoding would give it) of each row.

    Rows of similar length go together, padded on the right. A context is read in chunks that hand on what the model
    remembers, so a recurrent model takes no more memory for a long one. Rows that read the same tokens are read once.
    The last token of a row is not read, which rotary frequencies that follow the length (``dynamic``) show.

    Args:
      graphdef, params: as from ``lawcat_jax.models.abstract`` and its parameters.
      rows: see :data:`Row`; softmax attention sees all of them, whatever it was trained for.
      as_teacher: softmax attention in every layer.
      batch_size: rows read at a time, a multiple of the devices that share a batch.
      prefill_chunk: tokens of each row read at a time; 0 chooses (:func:`lawcat_jax.inference.generation.default_chunk`).
      progress: called with the rows done so far and all rows.

    Raises:
      UserError: logits that are not finite (naming the layer).
    """
    together: dict[tuple[int, ...], list[int]] = {}  # what is read -> the rows that read it
    for number, (context, following) in enumerate(rows):
        together.setdefault((*context, *following)[:-1], []).append(number)
    order = sorted(together, key=len, reverse=True)  # what takes most memory first
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    done = 0
    for start in range(0, len(order), batch_size):
        inputs = order[start : start + batch_size]
        filled = inputs + [inputs[-1]] * (batch_size - len(inputs))  # one shape, so that nothing new is compiled
        wanted = [[(len(read) - len(rows[n][1]), rows[n][1]) for n in together[read]] for read in inputs]
        scores = _score(graphdef, params, filled, wanted, as_teacher, prefill_chunk)
        for read, results in zip(inputs, scores, strict=True):
            for number, (total, greedy) in zip(together[read], results, strict=True):
                if not np.isfinite(total):
                    raise not_finite_error(graphdef, params, read, as_teacher=as_teacher)
                found[number] = (total, greedy)
            done += len(results)
        if progress is not None:
            progress(done, len(rows))
    return found


def _score(graphdef, params, inputs, wanted, as_teacher: bool, chunk: int) -> list[list[tuple[float, bool]]]:
    """Results of each row of ``inputs``: of ``wanted`` pairs (place of the first prediction, targets)."""
    lengths = np.array([len(row) for row in inputs], np.int32)
    shortest, longest = int(lengths.min()), int(lengths.max())
    plan = prefill_plan(shortest, longest, chunk or default_chunk(-(-len(inputs) // batch_shards(params))))
    tokens = np.zeros((len(inputs), sum(plan[-1])), np.int32)
    for row, read in zip(tokens, inputs, strict=True):
        row[: len(read)] = read
    room = bucket(longest) if needs_room(graphdef, params, as_teacher) else 1
    totals = [[(0.0, True)] * len(pairs) for pairs in wanted]
    options = {"graphdef": graphdef, "as_teacher": as_teacher}
    with mesh_of(params):
        cache, _ = empty_cache(params, batch=len(inputs), length=room, **options)
    for start, size in plan:
        # (place in the chunk, target, number of the pair) of every prediction that falls into it
        entries = [
            [
                (place, target, number)
                for number, (first, targets) in enumerate(pairs)
                for place, target in enumerate(targets, first - start)
                if 0 <= place < size
            ]
            for pairs in wanted
        ]
        most = max(map(len, entries))
        places, targets = np.zeros((2, len(inputs), bucket(most) if most else 0), np.int32)
        for row, found in enumerate(entries):
            places[row, : len(found)] = [place for place, _, _ in found]
            targets[row, : len(found)] = [target for _, target, _ in found]
        piece, unread = tokens[:, start : start + size], np.maximum(lengths - start, 0)
        valid = None if shortest - start >= size else np.minimum(unread, size)
        with mesh_of(params):
            nll, best, cache = _step(params, cache, piece, valid, unread, places, targets, **options)
        if most:
            for sums, found, lost, right in zip(totals, entries, on_host(nll), on_host(best), strict=False):
                for entry, (_, _, number) in enumerate(found):
                    total, greedy = sums[number]
                    sums[number] = (total - float(lost[entry]), greedy and bool(right[entry]))
    return totals


@functools.partial(jax.jit, static_argnames=("graphdef", "as_teacher"), donate_argnames="cache")
def _step(params, cache, tokens, lengths, unread, places, targets, *, graphdef, as_teacher: bool):
    """Read a chunk [B, T] of rows that have ``unread`` [B] tokens from its first on: (NLL of ``targets`` [B, S] after the
    tokens at ``places`` [B, S], whether each is the most likely, cache)."""
    model = bind(graphdef, params)
    options = {"lengths": lengths, "unread": unread, "return_hidden": True, "as_teacher": as_teacher}
    hidden, cache = model.prefill(tokens, cache, **options)
    if places.shape[1] == 0:
        return jnp.zeros(places.shape), jnp.ones(places.shape, bool), cache
    return *token_nll(model, jnp.take_along_axis(hidden, places[..., None], axis=1), targets), cache
