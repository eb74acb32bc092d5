"""One sequence that a model reads and continues, whose memory stays on the device between the calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lawcat_jax.inference.generation import (
    NOT_FINITE,
    bucket,
    check_request,
    decode_step,
    empty_cache,
    first_token,
    needs_room,
    read_prompts,
    rereads_above,
    seen_tokens,
    sequence_keys,
)
from lawcat_jax.inference.sampling import GREEDY, Sampling
from lawcat_jax.models.finite import not_finite_error
from lawcat_jax.runtime.sharding import mesh_of


class Session:
    """What a model remembers of one sequence. Text and answers are appended; nothing is read twice, but once where a model
    wants it (:func:`lawcat_jax.inference.generation.rereads_above`).

    A recurrent model's memory has one size. The key-value buffers of softmax layers grow by powers of two.

    Args:
      graphdef, params: as from ``lawcat_jax.models.abstract`` and its parameters.
      as_teacher: softmax attention in every layer.
      prefill_chunk: tokens read at a time, see :func:`lawcat_jax.inference.generation.generate`.

    Attributes:
      tokens: all token ids so far, read and made.
    """

    def __init__(self, graphdef: Any, params: dict[str, Any], *, as_teacher: bool = False, prefill_chunk: int = 0):
        self._options = {"graphdef": graphdef, "as_teacher": as_teacher}
        self._params, self._chunk = params, prefill_chunk
        self._grows = needs_room(graphdef, params, as_teacher)
        self._switch = rereads_above(graphdef, params, as_teacher)
        self._room = self._consumed = self._made = 0
        self._cache: Any = None
        self._logits: Any = None
        self.tokens: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered, with the room that key-value buffers have left."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._cache))

    def stream(
        self,
        tokens: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        sampling: Sampling = GREEDY,
    ) -> Iterator[int]:
        """Read ``tokens`` and yield the tokens of the continuation as they are made, the end token included: in a new
        session those that :func:`lawcat_jax.inference.generation.generate` gives for this prompt alone.

        Whoever stops before the last token leaves a session that ends with the token given last.

        Raises:
          UserError: as ``generate``: for what can be seen beforehand at once, else at a token asked for.
        """
        check_request(self._params, [[*self.tokens, *tokens]], max_new_tokens, sampling)
        self.tokens.extend(tokens)
        return self._stream(max_new_tokens, frozenset(eos_ids), sampling)

    def _stream(self, max_new_tokens: int, eos_ids: frozenset[int], sampling: Sampling) -> Iterator[int]:
        self._read(max_new_tokens)
        keys, values = sequence_keys(sampling.seed, [0]), sampling.values()
        seen = seen_tokens(self._params, [self.tokens], values)
        token = first_token(self._logits, jnp.int32(self._made), keys, values, seen)
        for number in range(max_new_tokens):
            value = int(token[0])
            if value == NOT_FINITE:
                raise not_finite_error(params=self._params, tokens=self.tokens, **self._options)
            self.tokens.append(value)
            self._made += 1
            yield value
            if value in eos_ids or number + 1 == max_new_tokens:
                return
            if self._consumed == self._switch:
                self._read(max_new_tokens - number)
                seen = seen_tokens(self._params, [self.tokens], values)
                token = first_token(self._logits, jnp.int32(self._made), keys, values, seen)
                continue
            with mesh_of(self._params):  # not around the yield, where it would leak into the caller
                token, self._cache, seen = decode_step(
                    self._params, self._cache, token, jnp.int32(self._made), keys, values, seen, **self._options
                )
            self._consumed += 1

    def _read(self, ahead: int) -> None:
        """Consume the tokens that were not yet, and make room for ``ahead`` more."""
        if self._consumed <= self._switch < len(self.tokens):
            self._cache, self._logits, self._consumed = None, None, 0
        room = bucket(len(self.tokens) + ahead) if self._grows else 1
        with mesh_of(self._params):
            if self._cache is None:
                self._cache, self._logits = empty_cache(self._params, batch=1, length=room, **self._options)
                self._room = room
            elif room > self._room:
                self._cache["softmax"] = jax.tree.map(lambda x: _longer(x, room), self._cache["softmax"])
                self._room = room
        if missing := self.tokens[self._consumed :]:
            self._cache, self._logits = read_prompts(
                params=self._params,
                cache=self._cache,
                logits=self._logits,
                prompts=[missing],
                chunk=self._chunk,
                **self._options,
            )
            self._consumed = len(self.tokens)


def _longer(buffer: jax.Array, length: int) -> jax.Array:
    """A key-value buffer [N, B, S, Hkv, d] with room for ``length`` positions."""
    return jnp.pad(buffer, ((0, 0), (0, 0), (0, length - buffer.shape[2]), (0, 0), (0, 0)))
