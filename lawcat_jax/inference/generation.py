"""Greedy and sampled generation for teacher and student in batches; :mod:`lawcat_jax.inference.session` streams.

Prompts are consumed in chunks of a few fixed sizes, so that the number of compilations does not grow with the number of
prompt lengths; the student's memory does not grow with the length at all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.errors import UserError
from lawcat_jax.inference.sampling import GREEDY, Sampling, choose
from lawcat_jax.models import bind, num_linear
from lawcat_jax.models.cache import Cache
from lawcat_jax.models.finite import not_finite_error
from lawcat_jax.models.rope import reread_above
from lawcat_jax.runtime.distributed import on_host
from lawcat_jax.runtime.sharding import batch_shards, constrain, mesh_of

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

SMALLEST_BUCKET = 16
SMALLER_CHUNK, LARGEST_CHUNK = 1024, 8192
BUSY_TOKENS = 16384
LONGEST = 2**26
"""[tokens] Prompt and answer at most; far above what any machine runs."""
NOT_FINITE = -2
"""Stands for the next token where its logits are NaN or infinite."""
STOP_EVERY = 32
"""[tokens] Between two looks at whether answers have come to a stop string."""

Values = dict[str, Any]  # see Sampling.values: jax arrays by name


def bucket(size: int, largest: int | None = None) -> int:
    """``size`` rounded up to a power of two (at least 16), not above ``largest``."""
    rounded = max(SMALLEST_BUCKET, 1 << max(0, size - 1).bit_length())
    return rounded if largest is None else min(rounded, largest)


# The parameters are kept, though not used: they say on which devices the cache lies.
@functools.partial(jax.jit, static_argnames=("graphdef", "batch", "length", "as_teacher"), keep_unused=True)
def empty_cache(
    params: dict[str, Any], *, graphdef: Any, batch: int, length: int, as_teacher: bool = False
) -> tuple[Cache, Float[Array, "B V"]]:
    """(cache, logits [B, V] float32) of no tokens, split over the mesh in context like a batch."""
    model = bind(graphdef, params)
    logits = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
    cache = constrain({**model.init_cache(batch, length, as_teacher=as_teacher), "logits": logits})
    logits = cache.pop("logits")
    return cache, logits


@functools.partial(jax.jit, static_argnames=("graphdef", "as_teacher"), donate_argnames=("cache", "logits"))
def prefill_chunk(
    params: dict[str, Any],
    cache: Cache,
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None,
    unread: Int[Array, " B"],
    *,
    graphdef: Any,
    as_teacher: bool,
) -> tuple[Float[Array, "B V"], Cache]:
    """Consume one chunk of prompts, int32 [B, T]: (logits of the last valid token [B, V], cache).

    ``lengths`` int32 [B] counts the valid tokens of each row; a prompt that has ended already (0) keeps its cache and its
    logits. None says that all tokens are valid, for which there are faster kernels. ``unread`` int32 [B] counts the
    tokens of each prompt in this chunk and all later ones."""
    model = bind(graphdef, params)
    new, cache = model.prefill(tokens, cache, lengths=lengths, unread=unread, as_teacher=as_teacher)
    return new if lengths is None else jnp.where(lengths[:, None] > 0, new, logits), cache


def _choose(logits, step, keys, values, seen):
    """Next tokens [B] (:func:`lawcat_jax.inference.sampling.choose`); :data:`NOT_FINITE` where there is none."""
    tokens = choose(logits, step, keys, values, seen)
    return jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), tokens, NOT_FINITE)


@functools.partial(jax.jit, static_argnames=("graphdef", "as_teacher"), donate_argnames=("cache",))
def decode_step(
    params: dict[str, Any],
    cache: Cache,
    token: Int[Array, " B"],
    step: Int[Array, ""] | int,
    keys: Array,
    values: Values,
    seen: Bool[Array, "B V"] | None,
    *,
    graphdef: Any,
    as_teacher: bool,
) -> tuple[Int[Array, " B"], Cache, Bool[Array, "B V"] | None]:
    """Consume one token of every sequence, int32 [B], and choose the next: (next tokens [B], cache, ``seen`` with the
    tokens consumed)."""
    logits, cache = bind(graphdef, params).decode(token, cache, as_teacher=as_teacher)
    seen = _marked(seen, token)
    return _choose(logits, step, keys, values, seen), cache, seen


first_token = jax.jit(_choose)


def _marked(seen, token):
    return None if seen is None else seen.at[jnp.arange(token.shape[0]), token].set(True, mode="drop")


def seen_tokens(params: dict[str, Any], rows: Sequence[Sequence[int]], values: Values) -> jax.Array | None:
    """Which tokens each row holds, bool [B, V]; None where ``values`` penalises no repetition."""
    if "repetition_penalty" not in values:
        return None
    seen = np.zeros((len(rows), params["embed"]["embedding"].shape[0]), bool)
    for row, tokens in zip(seen, rows, strict=True):
        row[list(tokens)] = True
    return jnp.asarray(seen)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "as_teacher", "capacity"), donate_argnames=("cache", "logits", "seen")
)
def _decode_loop(
    params, cache, logits, done, seen, first, limit, eos, keys, values, *, graphdef, as_teacher, capacity: int
):
    """Tokens [B, capacity] number ``first`` and on of every answer, until all are done or ``limit`` tokens are out; -1
    where there is none. What a call for the tokens after these takes comes with them."""
    model = bind(graphdef, params)
    batch = logits.shape[0]

    def more(carry):
        step, _, _, done, _, _ = carry
        return (step < limit) & ~jnp.all(done)

    def body(carry):
        step, logits, cache, done, seen, out = carry
        token = _choose(logits, first + step, keys, values, seen)
        out = out.at[:, step].set(jnp.where(done, -1, token))
        done = done | jnp.any(token[:, None] == eos, axis=1) | (token == NOT_FINITE)
        logits, cache = model.decode(token, cache, as_teacher=as_teacher)
        return step + 1, logits, cache, done, _marked(seen, token), out

    out = jnp.full((batch, capacity), -1, jnp.int32)
    _, logits, cache, done, seen, out = jax.lax.while_loop(more, body, (jnp.int32(0), logits, cache, done, seen, out))
    return out, logits, cache, done, seen


def check_request(params: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling) -> None:
    """Refuse what cannot be generated, before anything runs; the errors of :func:`generate`."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    longest = max_new_tokens + max(map(len, prompts), default=0)
    if longest > LONGEST:
        raise UserError(f"a prompt and max_new_tokens take {longest} tokens together, more than can be run ({LONGEST})")
    sampling.check()
    vocabulary = params["embed"]["embedding"].shape[0]
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {number} is empty; give at least one token (the BOS token, say)")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UserError(f"prompt {number} has token ids outside the vocabulary of {vocabulary}")


def needs_room(graphdef: Any, params: Any, as_teacher: bool) -> bool:
    """Whether a cache grows with the length, which only that of softmax layers does."""
    model = bind(graphdef, params)
    if as_teacher or model.mixers is None or model.attention_config is None:
        return True
    return num_linear(model.config, model.attention_config) < model.config.num_layers


def rereads_above(graphdef: Any, params: Any, as_teacher: bool) -> int:
    """Tokens beyond which a sequence that grows is read anew (:func:`lawcat_jax.models.rope.reread_above`);
    :data:`LONGEST` where none is.
    """
    model = bind(graphdef, params)
    attention = None if as_teacher or model.mixers is None else model.attention_config
    limit = reread_above(model.config)
    return LONGEST if limit is None or (attention is not None and not attention.rotates) else limit


def prefill_plan(shortest: int, longest: int, chunk: int) -> list[tuple[int, int]]:
    """(first token, size) of the pieces in which the prompts of a batch are read.

    As long as all prompts go on, whole chunks are read, which faster kernels serve: first of ``chunk`` tokens, then of at
    most 1024. The rest, where prompts end, is read in pieces of the smaller size; of prompts shorter than one, in one
    piece of a power of two. So the sizes are few, whatever the lengths.
    """
    small = min(chunk, SMALLER_CHUNK)
    pieces, start = [], 0
    for size in dict.fromkeys((chunk, small)):
        while shortest - start >= size:
            pieces.append((start, size))
            start += size
    size = small if start else bucket(longest, small)
    return pieces + [(at, size) for at in range(start, longest, size)]


def default_chunk(rows: int) -> int:
    """Tokens of each of ``rows`` prompts (a device's) that are read at once: about 16K tokens together, which keep a
    device busy, and at most 8K of one prompt.
    """
    return min(LARGEST_CHUNK, max(SMALLER_CHUNK, 1 << max(0, (BUSY_TOKENS // rows).bit_length() - 1)))


def read_prompts(
    graphdef: Any,
    params: dict[str, Any],
    cache: Cache,
    logits: Float[Array, "B V"],
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int = 0,
    as_teacher: bool = False,
) -> tuple[Cache, Float[Array, "B V"]]:
    """Append tokens, at least one a row, to caches that have room for them: (caches, next-token logits); both are given
    up. ``chunk`` tokens of a row are read at a time, 0 chooses."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    shortest, longest = int(lengths.min()), int(lengths.max())
    plan = prefill_plan(shortest, longest, chunk or default_chunk(-(-len(prompts) // batch_shards(params))))
    tokens = np.zeros((len(prompts), sum(plan[-1])), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    options = {"graphdef": graphdef, "as_teacher": as_teacher}
    for start, size in plan:
        piece, unread = tokens[:, start : start + size], np.maximum(lengths - start, 0)
        valid = None if shortest - start >= size else np.minimum(unread, size)
        with mesh_of(params):
            logits, cache = prefill_chunk(params, cache, logits, piece, valid, unread, **options)
    return cache, logits


def read_new(
    graphdef: Any,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    room: int,
    chunk: int = 0,
    as_teacher: bool = False,
) -> tuple[Cache, Float[Array, "B V"]]:
    """:func:`read_prompts` into new caches, which have room for ``room`` tokens."""
    with mesh_of(params):
        cache, logits = empty_cache(params, graphdef=graphdef, batch=len(prompts), length=room, as_teacher=as_teacher)
    return read_prompts(graphdef, params, cache, logits, prompts, chunk=chunk, as_teacher=as_teacher)


def generate(
    graphdef: Any,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    stop: Callable[[int, Sequence[int]], bool] | None = None,
    as_teacher: bool = False,
    batch_size: int = 8,
    prefill_chunk: int = 0,
) -> list[list[int]]:
    """Continue prompts; the answers are in the prompts' order, without the prompts.

    Args:
      graphdef, params: as from ``lawcat_jax.models.abstract`` and its parameters.
      prompts: token ids, each at least one.
      max_new_tokens: most tokens of an answer.
      eos_ids: an answer ends with the first of these, which is its last token.
      sampling: how tokens are chosen. An answer depends on the seed and the prompt's number, not on the batch.
      stop: says of a prompt's number and the tokens of its answer whether it need not go on. It is asked every
        :data:`STOP_EVERY` tokens, so that an answer may have more tokens than it takes.
      batch_size: prompts continued at a time; prompts of similar length go together.
      prefill_chunk: tokens of each prompt consumed at a time, which bounds the memory that a long prompt takes; 0
        chooses by the batch and the lengths (:func:`default_chunk`).

    Raises:
      UserError: for an empty prompt, a token outside the vocabulary, sizes out of range, sampling that cannot be, or
        logits that are not finite (naming the layer).
    """
    check_request(params, prompts, max_new_tokens, sampling)
    if batch_size < 1 or prefill_chunk < 0:
        raise UserError(f"batch_size {batch_size} must be at least 1, and prefill_chunk {prefill_chunk} not negative")
    options = {"graphdef": graphdef, "as_teacher": as_teacher}
    eos, values = jnp.asarray([*eos_ids] or [-1], jnp.int32), sampling.values()
    piece = max_new_tokens if stop is None else min(STOP_EVERY, max_new_tokens)
    switch = rereads_above(graphdef, params, as_teacher)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        # A short last batch is filled up with copies: an empty row would rule out the kernels for whole chunks.
        rows = [prompts[number] for number in numbers] + [prompts[numbers[-1]]] * (batch_size - len(numbers))
        # Only the key-value buffer of softmax layers depends on the length.
        room = bucket(max(map(len, rows)) + max_new_tokens) if needs_room(graphdef, params, as_teacher) else 1
        cache, logits = read_new(params=params, prompts=rows, room=room, chunk=prefill_chunk, **options)
        # With so many tokens of its answer, a row becomes longer than ``switch``.
        switches = {end for row in rows if 0 < (end := switch + 1 - len(row)) < max_new_tokens}
        ends = sorted({*range(piece, max_new_tokens, piece), *switches, max_new_tokens})
        done, seen = np.arange(batch_size) >= len(numbers), seen_tokens(params, rows, values)
        keys = sequence_keys(sampling.seed, [*numbers, *[0] * (batch_size - len(numbers))])
        for first, end in itertools.pairwise([0, *ends]):
            with mesh_of(params):
                out, logits, cache, done, seen = _decode_loop(
                    params,
                    cache,
                    logits,
                    done,
                    seen,
                    jnp.int32(first),
                    jnp.int32(end - first),
                    eos,
                    keys,
                    values,
                    capacity=bucket(piece),
                    **options,
                )
            for number, row in zip(numbers, on_host(out), strict=False):
                answers[number] += [int(token) for token in row if token >= 0]
                if np.any(row == NOT_FINITE):
                    raise not_finite_error(
                        graphdef, params, [*prompts[number], *answers[number]], as_teacher=as_teacher
                    )
            if end == max_new_tokens:
                break
            done = on_host(done)
            if stop is not None and end % piece == 0:
                stopped = [stop(number, answers[number]) for number in numbers]
                done = done | np.array(stopped + [True] * (batch_size - len(numbers)))
            if done.all():
                break
            if end in switches:
                del cache, logits  # before there is another
                grown = [[*row, *answers[number]] for row, number in zip(rows, numbers, strict=False)]
                grown += rows[len(numbers) :]
                cache, logits = read_new(params=params, prompts=grown, room=room, chunk=prefill_chunk, **options)
    return answers


def sequence_keys(seed: int, numbers: Sequence[int]) -> jax.Array:
    """A key of each sequence, whose number is its place among the prompts."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(numbers, jnp.uint32))
