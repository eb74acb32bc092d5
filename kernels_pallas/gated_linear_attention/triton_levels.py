"""Exponents of a chunk for the Triton kernels: from one reference point within a gate bound, or by levels for any gates.

*One reference*: q^ = q 2^(b - r), k^ = k 2^(r - b) serve the scores, the state before the chunk (times 2^r) and the state after it
(times 2^r): two exponentials an element. Operands reach e^(C/2 |log g|), so that even the shortest chunk, of 16 rows, ends at -5 nats.

*Levels*: the chunk is halved again and again. Scores of the second half of a block of 2s rows with its first half take the border
between them as their reference, so that no exponent is positive; a token's score with itself takes none. The state takes q 2^b
and k 2^(b_C - b). One product for the exponents and one for the scores for each of the log2(C) levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.chunking import reference_rows
from kernels_pallas.common import LOG2E
from kernels_pallas.gated_linear_attention.triton_tiles import (
    centred,
    column,
    dot,
    exp2,
    f32,
    iota,
    ones,
    round_to,
)

MAX_CHUNK = 128
"""Tokens."""

LEAST_CHUNK = 16
"""Tokens: the fewest rows of a product."""

Block = tuple[Any, int]
"""(offset, width) of a block of features."""


def by_levels(bound: float | None) -> bool:
    """Whether gates of this bound allow no reference point for a chunk."""
    return reference_rows(bound, MAX_CHUNK) < LEAST_CHUNK


def half_total(g: jax.Array) -> jax.Array:
    """r = b_C / 2 [K, 8] in log2 units: as rows, where the state has its features."""
    return dot(g, ones(g.shape[0], g.dtype), ta=True) * (0.5 * LOG2E)


class Exponents(NamedTuple):
    """Of q towards the state before a chunk and of k towards the state after it [C, K], in log2 units, of a block of features."""

    q: jax.Array
    k: jax.Array


class StateExponents(NamedTuple):
    """Of the state before its use in a chunk, and again after the chunk, [K, 8] in log2 units; and ``through``, what else it takes
    on its way through the chunk (None: nothing)."""

    r: jax.Array
    through: jax.Array | None

    def total(self) -> jax.Array:
        """The sum of the chunk's gates."""
        return 2.0 * self.r if self.through is None else self.through


def exponents(g: jax.Array, levels: bool) -> Exponents:
    """From the gates [C, K] of a chunk, as :func:`~kernels_pallas.gated_linear_attention.triton.load_gates` gives them."""
    if not levels:
        x = dot(centred(g.shape[0], g.dtype), g) * LOG2E
        return Exponents(x, -x)
    row, token = (iota((g.shape[0], g.shape[0]), axis) for axis in (0, 1))
    into, out = (dot(m.astype(g.dtype), g) * LOG2E for m in (token <= row, token > row))
    return Exponents(into, out)


def state_exponents(g: jax.Array, levels: bool) -> StateExponents:
    """As :func:`exponents`."""
    r = half_total(g)
    return StateExponents(jnp.zeros_like(r), 2.0 * r) if levels else StateExponents(r, None)


def onward(pair: Any, factors: Sequence[StateExponents]) -> Any:
    """(S, z) as a chunk uses them, on their way through it."""
    decays = [exp2(x.through) for x in factors if x.through is not None]
    if not decays:
        return pair
    S = tuple(column(d)[:, None] * x for d, x in zip(decays, pair[0], strict=True))
    return S, tuple(d * x for d, x in zip(decays, pair[1], strict=True))


def level_factors(g: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
    """For each level: (mask [C, C] of its scores, factor [C, K] of its rows of q and of its columns of k)."""
    chunk = g.shape[0]
    row, token = (iota((chunk, chunk), axis) for axis in (0, 1))
    for shift in range(chunk.bit_length() - 1):
        size = 1 << shift
        border = (row & -(2 * size)) + (size - 1)
        later = (border < token) & (token <= row)
        earlier = (row < token) & (token <= border)
        matrix = jnp.where(row > border, later, earlier).astype(g.dtype)
        mask = (lax.shift_right_logical(row ^ token, jnp.int32(shift)) == 1) & (row > token)
        yield mask, exp2(dot(matrix, g) * LOG2E)


def level_scores(
    blocks: tuple[Block, ...], tiles: Callable[[Block], tuple[jax.Array, jax.Array, jax.Array]], dtype: Any
) -> jax.Array:
    """A [C, C] float32, zero above the diagonal; ``tiles`` gives q, k and gates of a block of features."""
    A: Any = 0.0
    for block in blocks:
        q, k, g = tiles(block)
        shape = (g.shape[0], g.shape[0])
        q, k = q.astype(f32), k.astype(f32)
        own = jnp.sum(q * k, axis=1)
        part = jnp.where(iota(shape, 0) == iota(shape, 1), own[:, None], 0.0)
        for mask, factor in level_factors(g):
            product = dot(round_to(q * factor, dtype), round_to(k * factor, dtype), tb=True)
            part = jnp.where(mask, product, part)
        A += part
    return A


class LevelGradients(NamedTuple):
    """What the scores add to the gradients of a block: of q and k [C, K], and to q dq - k dk but for own terms."""

    q: jax.Array
    k: jax.Array
    difference: jax.Array


def level_gradients(q: jax.Array, k: jax.Array, g: jax.Array, dA: jax.Array) -> LevelGradients:
    """From the cotangent dA [C, C] float32 of the scores, zero where they are masked. A token's score with itself, whose gradient is
    the difference of nearly equal numbers at strong gates, is not rounded, and belongs to no gate."""
    dtype = g.dtype
    q, k = q.astype(f32), k.astype(f32)
    own = jnp.sum(jnp.where(iota(dA.shape, 0) == iota(dA.shape, 1), dA, 0.0), axis=1)[:, None]
    dq, dk, difference = own * k, own * q, jnp.zeros_like(q)
    for mask, factor in level_factors(g):
        part = round_to(jnp.where(mask, dA, 0.0), dtype)
        left, right = round_to(q * factor, dtype), round_to(k * factor, dtype)
        of_q, of_k = dot(part, right), dot(part, left, ta=True)
        dq += factor * of_q
        dk += factor * of_k
        difference += left.astype(f32) * of_q - right.astype(f32) * of_k
    return LevelGradients(dq, dk, difference)
