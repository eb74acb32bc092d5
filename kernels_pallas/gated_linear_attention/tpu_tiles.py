"""Pieces of the TPU kernels of gated linear attention that work on one tile of 128 lanes (see
``kernels_pallas.gated_linear_attention.tpu``)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import EPS, LOG2E
from kernels_pallas.gated_linear_attention.tpu_plan import LANES, Plan, level_sizes


def dot(a: jax.Array, b: jax.Array, axes: str) -> jax.Array:
    """Product in float32; ``axes`` "nn", "nt" (contract the last axes) or "tn" (contract the first)."""
    contract = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[axes]
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def shift_of(size: int) -> int:
    """log2 of a power of two."""
    return size.bit_length() - 1


def own_lanes(plan: Plan, head: int, rows: int, per_head: int | None = None) -> jax.Array:
    """Boolean [rows, pack * per_head]: the lanes of one packed head, which has ``per_head`` lanes (default: its features)."""
    per_head = plan.width if per_head is None else per_head
    lane = lax.broadcasted_iota(jnp.int32, (rows, per_head * plan.pack), 1)
    return (lane >= head * per_head) & (lane < (head + 1) * per_head)


def stack_heads(x: jax.Array, plan: Plan) -> jax.Array:
    """[n, lanes] -> [pack * n, lanes]: one copy per packed head, the other heads' lanes set to zero."""
    if plan.pack == 1:
        return x
    return jnp.concatenate([_keep_head(x, plan, h) for h in range(plan.pack)], axis=0)


def _keep_head(x: jax.Array, plan: Plan, head: int) -> jax.Array:
    if x.dtype != jnp.bfloat16:
        return jnp.where(own_lanes(plan, head, x.shape[0]), x, jnp.zeros_like(x))
    # Two bfloat16 rows share a 32-bit row: one AND clears both, where a 16-bit select needs its mask laid out anew.
    keep = jnp.where(own_lanes(plan, head, 1), jnp.int32(-1), jnp.int32(0))
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & keep, jnp.bfloat16)


def pick_heads(x: jax.Array, plan: Plan) -> jax.Array:
    """[pack * n, lanes] -> [n, lanes]: every lane from the copy of its own head. Transposes :func:`stack_heads`."""
    rows = x.shape[0] >> shift_of(plan.pack)
    picked = x[:rows]
    for h in range(1, plan.pack):
        picked = jnp.where(own_lanes(plan, h, rows), x[h * rows : (h + 1) * rows], picked)
    return picked


def spread_lanes(x: jax.Array, heads: list[int], plan: Plan) -> jax.Array:
    """Block [C, n * width] of kv heads -> tile [C, lanes] whose packed heads see the kv heads ``heads``."""
    width, first = plan.width, heads[0]
    if heads == list(range(first, first + plan.pack)) and (first * width) % LANES == 0:
        return x[:, first * width : first * width + plan.lanes]
    return jnp.concatenate([x[:, h * width : (h + 1) * width] for h in heads], axis=1)


def tile_heads(plan: Plan, tile: int, group: int) -> list[int]:
    """Local kv head of each packed head of a tile."""
    heads = range(tile * plan.pack, (tile + 1) * plan.pack)
    return [h // group if plan.heads_block % group == 0 else 0 for h in heads]


def valid_rows(
    plan: Plan, chunk_index, *, neutral_padding: bool = True, length: jax.Array | None = None
) -> jax.Array | None:
    """[C, 1] bool: the rows of this chunk that lie inside the sequence, of which ``length`` [1, 1] tokens count (None: all). None
    where no mask is needed: every chunk is full, or the only chunk is padded with zeros and such rows are neutral
    (``neutral_padding``)."""
    row = lax.broadcasted_iota(jnp.int32, (plan.chunk, 1), 0)
    if length is not None:
        return row < length - chunk_index * plan.chunk
    if not plan.ragged or (plan.chunks == 1 and neutral_padding):
        return None
    return row < plan.length - chunk_index * plan.chunk


def clean(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Zero the rows beyond the sequence, which hold garbage (perhaps NaN)."""
    return x if valid is None else jnp.where(valid, x, jnp.zeros_like(x))


# Decay factors and scores


class Term(NamedTuple):
    """Scores of one product: rows times ``q`` against columns times ``k`` (None: factor 1) where ``mask`` holds
    (None: the columns' own triangle at the top, everything below)."""

    q: jax.Array | None
    k: jax.Array | None
    mask: jax.Array | None


class Columns(NamedTuple):
    """Scores of the columns start ... start + size against the rows from ``start`` on; terms have disjoint masks."""

    start: int
    size: int
    terms: tuple[Term, ...]

    def used(self, *, own: bool) -> tuple[Term, ...]:
        """The terms; without ``own``, not those that hold only the scores of tokens with themselves."""
        return tuple(term for term in self.terms if own or term.q is not None)


class Decays(NamedTuple):
    """Factors of one tile. q * into_rows is multiplied with the state times ``into``. The new state is the old one times
    ``total`` = 2^(b_C), plus v^T (k * out_rows) times ``out``."""

    columns: tuple[Columns, ...]
    into_rows: jax.Array
    into: jax.Array | None
    out_rows: jax.Array
    out: jax.Array | None
    total: jax.Array


def decays(log_g: jax.Array, matrices, plan: Plan) -> Decays:
    """Natural log-gates of a tile [C, lanes] (float32, 0 beyond the sequence) -> factors. ``matrices``: their ref."""
    lg = (log_g * LOG2E).astype(plan.dtype)
    return _pair_decays(lg, matrices, plan) if plan.by_pairs else _level_decays(lg, matrices, plan)


def _pair_decays(lg: jax.Array, matrices, plan: Plan) -> Decays:
    size, count = plan.block, plan.chunk // plan.block
    centred = dot(matrices[0], lg, "nn")
    up, down = jnp.exp2(centred), jnp.exp2(-centred)
    rows = [slice(n * size, (n + 1) * size) for n in range(count)]
    half = [0.5 * jnp.sum(lg[r].astype(jnp.float32), axis=0, keepdims=True) for r in rows]

    def between(first: int, second: int) -> jax.Array:
        """2^(r_second - r_first), the middles of two blocks; first < second."""
        inner = [2.0 * half[n] for n in range(first + 1, second)]
        return jnp.exp2(sum(inner, half[first] + half[second]))

    columns = []
    for n in range(count):
        later = [up[rows[n]]] + [up[rows[m]] * between(n, m) for m in range(n + 1, count)]
        columns.append(Columns(n * size, size, (Term(_join(later), down[rows[n]], None),)))
    out_rows = _join([down[rows[n]] * between(n, count - 1) for n in range(count - 1)] + [down[rows[-1]]])
    return Decays(
        tuple(columns),
        columns[0].terms[0].q,
        jnp.exp2(half[0]),
        out_rows,
        jnp.exp2(half[-1]),
        jnp.exp2(sum(2.0 * h for h in half)),
    )


def _level_decays(lg: jax.Array, matrices, plan: Plan) -> Decays:
    shape = (plan.chunk, plan.chunk * plan.pack)
    i = lax.broadcasted_iota(jnp.int32, shape, 0)
    j = lax.broadcasted_iota(jnp.int32, shape, 1) & (plan.chunk - 1)
    differ = i ^ j
    terms, index = [], 0
    if plan.block > 1:
        centred = dot(matrices[0], lg, "nn")
        terms.append(Term(jnp.exp2(centred), jnp.exp2(-centred), (differ < plan.block) & (i >= j)))
        index = 1
    else:
        terms.append(Term(None, None, differ == 0))
    for size in level_sizes(plan):
        factor = jnp.exp2(dot(matrices[index], lg, "nn"))
        terms.append(Term(factor, factor, (lax.shift_right_logical(differ, shift_of(size)) == 1) & (i > j)))
        index += 1
    into_rows = jnp.exp2(dot(matrices[index], lg, "nn"))
    out_rows = jnp.exp2(dot(matrices[index + 1], lg, "nn"))
    total = jnp.exp2(jnp.sum(lg.astype(jnp.float32), axis=0, keepdims=True))
    return Decays((Columns(0, plan.chunk, tuple(terms)),), into_rows, None, out_rows, None, total)


def _join(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def add_rows(x: jax.Array, start: int, part: jax.Array) -> jax.Array:
    """x with ``part`` added to the rows from ``start`` on."""
    return x + part if start == 0 else jnp.concatenate([x[:start], x[start:] + part], axis=0)


def scaled(x: jax.Array, factor: jax.Array | None, plan: Plan) -> jax.Array:
    """An operand: x times its factor, rounded to the compute dtype."""
    return (x if factor is None else x * factor).astype(plan.dtype)


def mask_scores(x: jax.Array, mask: jax.Array | None, columns: Columns, plan: Plan, *, own: bool) -> jax.Array:
    """x [rows, pack * size] where the scores of a term live, else 0; ``own``: those of tokens with themselves too."""
    size = columns.size
    rows = size if mask is None else x.shape[0]
    i = lax.broadcasted_iota(jnp.int32, (rows, size * plan.pack), 0)
    j = lax.broadcasted_iota(jnp.int32, (rows, size * plan.pack), 1) & (size - 1)
    if mask is not None:
        return jnp.where(mask if own else mask & (i > j), x, 0.0)
    top = jnp.where(i >= j if own else i > j, x[:size], 0.0)
    return top if x.shape[0] == size else jnp.concatenate([top, x[size:]], axis=0)


class Scores(NamedTuple):
    """Rounded scores of one :class:`Columns`, side by side for the packed heads, and the operands of every term."""

    a: jax.Array
    operands: tuple[tuple[jax.Array, jax.Array], ...]


def scores(q: jax.Array, k: jax.Array, columns: Columns, plan: Plan, *, own: bool) -> Scores:
    """q, k float32 tiles [C, lanes]; without ``own``, zero where a token meets itself."""
    rows = slice(columns.start, columns.start + columns.size)
    a, operands = None, []
    for term in columns.used(own=own):
        left = scaled(q[columns.start :], term.q, plan)
        right = stack_heads(scaled(k[rows], term.k, plan), plan)
        product = dot(left, right, "nt")
        if a is None:
            a = mask_scores(product, term.mask, columns, plan, own=own)
        else:
            assert term.mask is not None  # only the first term of a block has none
            a = jnp.where(term.mask, product, a)
        operands.append((left, right))
    assert a is not None  # a block of columns has at least one term
    return Scores(a.astype(plan.dtype), tuple(operands))


def state_operand(S: jax.Array, factor: jax.Array | None, plan: Plan) -> jax.Array:
    """Compact state [width, lanes] times a row of factors -> block-diagonal [lanes, lanes] (rows: value dimensions)."""
    return stack_heads(scaled(S, factor, plan), plan)


def head_sums(x: jax.Array, plan: Plan, per_head: int | None = None) -> list[jax.Array]:
    """[C, pack * per_head] -> one column [C, 1] per packed head: the sum over its lanes."""
    if plan.pack == 1:
        return [jnp.sum(x, axis=1, keepdims=True)]
    rows = x.shape[0]
    return [
        jnp.sum(jnp.where(own_lanes(plan, h, rows, per_head), x, 0.0), axis=1, keepdims=True) for h in range(plan.pack)
    ]


def spread_columns(columns: list[jax.Array], plan: Plan, per_head: int | None = None) -> jax.Array:
    """One column per packed head -> [C, pack * per_head] (just the column [C, 1] when there is one head)."""
    spread = columns[0]
    for h in range(1, plan.pack):
        spread = jnp.where(own_lanes(plan, h, spread.shape[0], per_head), columns[h], spread)
    return spread


def reciprocal(x: jax.Array, plan: Plan) -> jax.Array:
    """1 / x; for bfloat16 operands the hardware estimate and one Newton step (relative 2^-16), a third of the work."""
    if plan.dtype == jnp.float32:
        return 1.0 / x
    estimate = pl.reciprocal(x, approx=True)
    return estimate * (2.0 - x * estimate)


def read_out(q, k, v, S, z, decay: Decays, plan: Plan, normalize: bool, *, own: bool = True):
    """Numerator of a tile (float32 [C, lanes]) and denominator + eps ([C, lanes], or [C, 1] for one head, or None);
    ``own``: with the scores of tokens with themselves.

    Returns (num, den, state operand of q, scores of every Columns). The denominator sums the rounded scores and the
    rounded q of the numerator; it does so outside the matrix unit, which is the busier one here.
    """
    shared = decay.columns[0].terms[0].q is decay.into_rows
    found = [scores(q, k, columns, plan, own=own) for columns in decay.columns]
    q_in = found[0].operands[0][0] if shared else scaled(q, decay.into_rows, plan)
    num = dot(q_in, state_operand(S, decay.into, plan), "nt")
    for columns, score in zip(decay.columns, found, strict=True):
        rows = slice(columns.start, columns.start + columns.size)
        num = add_rows(num, columns.start, dot(score.a, stack_heads(v[rows], plan), "nn"))
    if not normalize:
        return num, None, q_in, found

    weighted = q_in.astype(jnp.float32) * (z if decay.into is None else z * decay.into)
    size = decay.columns[0].size
    total = None
    for columns, score in zip(decay.columns, found, strict=True):
        a = score.a.astype(jnp.float32)
        total = a if total is None else add_rows(total, columns.start, a)
    assert total is not None  # a chunk has at least one block of columns
    if plan.pack == 1 and size != plan.lanes:
        den = [jnp.sum(weighted, axis=1, keepdims=True) + jnp.sum(total, axis=1, keepdims=True)]
    elif size == plan.width:
        den = head_sums(weighted + total, plan)
    else:
        sums = zip(head_sums(weighted, plan), head_sums(total, plan, size), strict=True)
        den = [state + scores for state, scores in sums]
    return num, spread_columns(den, plan) + EPS, q_in, found


def next_state(k: jax.Array, v: jax.Array, S: jax.Array, z: jax.Array, decay: Decays, plan: Plan):
    """(S, z) after the chunk; k is a float32 tile, v a tile in the compute dtype."""
    k_out = scaled(k, decay.out_rows, plan)
    update = pick_heads(dot(v, k_out, "tn"), plan)
    total = jnp.sum(k_out.astype(jnp.float32), axis=0, keepdims=True)
    if decay.out is not None:
        update, total = update * decay.out, total * decay.out
    return decay.total * S + update, decay.total * z + total


# What the tiles of a program share


class TileInputs(NamedTuple):
    """What the tiles of a program share: blocks of kv heads, and the decay factors by gate heads."""

    valid: jax.Array | None
    v: jax.Array
    log_g: jax.Array
    matrices: Any
    cache: dict

    def values(self, tile: int, plan: Plan) -> jax.Array:
        return spread_lanes(self.v, tile_heads(plan, tile, plan.v_group), plan)

    def decays(self, tile: int, plan: Plan) -> Decays:
        heads = tile_heads(plan, tile, plan.g_group)
        if tuple(heads) not in self.cache:
            self.cache.clear()
            self.cache[tuple(heads)] = decays(spread_lanes(self.log_g, heads, plan), self.matrices, plan)
        return self.cache[tuple(heads)]


def tile_inputs(v_ref, g_ref, m_ref, chunk_index, plan: Plan) -> TileInputs:
    """Read the kv blocks of a program."""
    valid = valid_rows(plan, chunk_index)
    return TileInputs(valid, clean(v_ref[0], valid), clean(g_ref[0].astype(jnp.float32), valid), m_ref, {})


def tile_of(ref, tile: int, valid, plan: Plan) -> jax.Array:
    """Tile [C, lanes] of a block of query heads, as float32."""
    return clean(ref[0, :, tile * plan.lanes : (tile + 1) * plan.lanes], valid).astype(jnp.float32)
