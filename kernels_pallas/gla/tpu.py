"""Gated linear attention on TPUs (Pallas, Mosaic): forward kernel, chunk states, and what the backward kernel shares.

Grid (batch, blocks of heads, chunks); chunks run in order and the state stays in VMEM. Blocks are cut from
[B, T, heads * width], so nothing is transposed in HBM. Arrays inside a kernel are *tiles* of 128 lanes: one head of 128
features, or ``pack`` narrower heads side by side. Heads of a tile share every elementwise operation; their scores come
out side by side, [A_a | A_b], because the keys are stacked once per head with the other heads' lanes set to zero. The
state of a tile is kept transposed (rows: value dimensions, lanes: features), so that a decay per feature is a row
broadcast, and compact: ``width`` rows, where every lane belongs to the head of that lane.

Exponents (b is the inclusive cumulative sum of the log2-gates, C rows a chunk):

* pairs: blocks of c rows with c |log_g| <= 80 nats take their own middle r = b_end / 2 as the reference, so operands
  stay within e^+-40; a later block meets an earlier one after a row factor 2^(r_m - r_n), with no further exponentials;
* levels (weak or no bound): binary sub-blocks, each with the border between its halves as the reference, so that no
  exponent is positive.

All exponents are products of a 0/+-1/2/1 matrix with the gates (exact in bfloat16, on the MXU); no long cumulative sums
are subtracted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import EPS, LOG2E, interpret_mode, out_struct

LANES = 128
MAX_CHUNK = 128
MAX_NATS = 80.0
"""Largest c |log_g| of one reference block (kernels must stay below e^88)."""

MAX_PAIR_BLOCKS = 4
VMEM_LIMIT_BYTES = 48 * 2**20
"""Scoped VMEM asked for: below the 64 MiB of a v5p or v7x core."""

VMEM_BUDGET_BYTES = 40 * 2**20

INTERPRET: Any = True
"""What ``pallas_call`` gets in interpret mode; tests set ``pltpu.InterpretParams`` here."""


class Plan(NamedTuple):
    """Static description of one call: ``heads`` query heads of padded width ``width``, ``pack`` of them to a tile."""

    batch: int
    length: int
    heads: int
    v_group: int
    g_group: int
    features: int
    values: int
    width: int
    pack: int
    heads_block: int
    chunk: int
    block: int
    dtype: Any

    @property
    def lanes(self) -> int:
        return self.width * self.pack

    @property
    def tiles(self) -> int:
        return self.heads_block // self.pack

    @property
    def head_blocks(self) -> int:
        return self.heads // self.heads_block

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def ragged(self) -> bool:
        return self.length % self.chunk != 0

    @property
    def by_pairs(self) -> bool:
        return self.chunk // self.block <= MAX_PAIR_BLOCKS

    def kv_heads(self, group: int) -> int:
        """How many kv heads (of ``group`` query heads each) one program reads."""
        return max(1, self.heads_block // group)


# Planning


def _block_rows(lower_bound: float | None, chunk: int) -> int:
    """Largest power of two of rows that one reference may span."""
    if lower_bound is None:
        return 1
    rows = MAX_NATS / max(-lower_bound, 1e-30)
    return min(chunk, 1 << math.floor(math.log2(max(1.0, min(rows, chunk)))))


def _heads_block_fits(heads: int, count: int, group: int, width: int) -> bool:
    """Whether a program of ``count`` query heads can read its kv heads as one block of whole 128-lane tiles."""
    if count % group == 0:
        return count == heads or (count // group * width) % LANES == 0
    return group % count == 0 and width % LANES == 0


def make_plan(q, v, log_g, lower_bound: float | None, *, max_heads: int = 8) -> Plan:
    """Sizes for q [B, T, H, K], v [B, T, Hv, V], log_g [B, T, Hg, K] (anything with shape and dtype)."""
    batch, length, heads, features = q.shape
    values = v.shape[-1]
    width = max(16, 1 << (max(features, values) - 1).bit_length())
    pack = max(1, LANES // width)
    while heads % pack:
        pack //= 2
    width = max(width, LANES // pack)
    v_group, g_group = heads // v.shape[2], heads // log_g.shape[2]
    fitting = [
        n
        for n in range(pack, heads + 1, pack)
        if heads % n == 0 and all(_heads_block_fits(heads, n, group, width) for group in (v_group, g_group))
    ]
    # An even number of programs along the heads keeps both cores of a chip with two busy at batch 1.
    small = [n for n in fitting if n * width <= max_heads * LANES and n <= 2 * max_heads]
    even = [n for n in small if (heads // n) % 2 == 0]
    count = max(even or small or fitting[:1])
    chunk = min(MAX_CHUNK, max(16, 1 << (length - 1).bit_length()))
    block = _block_rows(lower_bound, chunk)
    dtype = jnp.dtype(q.dtype)
    return Plan(batch, length, heads, v_group, g_group, features, values, width, pack, count, chunk, block, dtype)


def vmem_bytes(plan: Plan, *, backward: bool) -> int:
    """Estimate of the VMEM of one kernel: double-buffered blocks, states, and room for temporaries."""
    size = plan.dtype.itemsize
    row = plan.heads_block * plan.width * plan.chunk
    kv = plan.width * plan.chunk * (plan.kv_heads(plan.v_group) * size + plan.kv_heads(plan.g_group) * 4)
    state = plan.heads_block * plan.width * plan.width * 4
    blocks = 2 * ((6 if backward else 3) * row * size + (2 if backward else 1) * kv) + 4 * state
    return blocks + 24 * plan.chunk * max(plan.chunk * plan.pack, plan.lanes) * 4


def supports(q, k, v, log_g, *, normalize: bool, lower_bound: float | None, differentiated: bool) -> str | None:
    """Why these kernels cannot serve, or None (see ``kernels_pallas.gla``)."""
    del k, normalize
    widest = max(q.shape[-1], v.shape[-1])
    if widest > 256:
        return f"head sizes above 256 are not supported, got K = {q.shape[-1]} and V = {v.shape[-1]}"
    plan = make_plan(q, v, log_g, lower_bound)
    need = vmem_bytes(plan, backward=differentiated)
    if need > VMEM_BUDGET_BYTES:
        return (
            f"{plan.heads_block} heads of width {plan.width} a program need about {need >> 20} MiB of VMEM, more than "
            f"{VMEM_BUDGET_BYTES >> 20} MiB "
            f"(Hv = {v.shape[2]}, Hg = {log_g.shape[2]} of H = {plan.heads} heads leave no smaller block)"
        )
    return None


# Layout outside the kernels


def flat(x: jax.Array, plan: Plan) -> jax.Array:
    """[B, T, h, d] -> [B, T', h * width]: zero padding of narrow heads, and of sequences shorter than one chunk."""
    batch, length, heads, size = x.shape
    rows = max(0, plan.chunk - length)
    if rows or size < plan.width:
        x = jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, plan.width - size)))
    return x.reshape(batch, length + rows, heads * plan.width)


def unflat(x: jax.Array, heads: int, size: int, plan: Plan) -> jax.Array:
    """[B, T', heads * width] -> [B, T, heads, size]."""
    x = x.reshape(x.shape[0], x.shape[1], heads, plan.width)
    return x[:, : plan.length, :, :size]


def pack_state(S: jax.Array, z: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """(S [B, H, K, V], z [B, H, K]) -> [B, H / pack, width, lanes] (compact, transposed), [B, blocks, tiles, lanes]."""
    features, values = S.shape[2:]
    S = jnp.pad(S, ((0, 0), (0, 0), (0, plan.width - features), (0, plan.width - values)))
    S = S.reshape(plan.batch, plan.heads // plan.pack, plan.pack, plan.width, plan.width)
    S = S.transpose(0, 1, 4, 2, 3).reshape(plan.batch, plan.heads // plan.pack, plan.width, plan.lanes)
    z = jnp.pad(z, ((0, 0), (0, 0), (0, plan.width - features)))
    return S, z.reshape(plan.batch, plan.head_blocks, plan.tiles, plan.lanes)


def unpack_state(S: jax.Array, z: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The inverse of :func:`pack_state`."""
    S = S.reshape(plan.batch, plan.heads // plan.pack, plan.width, plan.pack, plan.width).transpose(0, 1, 3, 4, 2)
    S = S.reshape(plan.batch, plan.heads, plan.width, plan.width)[:, :, : plan.features, : plan.values]
    return S, z.reshape(plan.batch, plan.heads, plan.width)[:, :, : plan.features]


def gate_matrices(plan: Plan) -> np.ndarray:
    """Matrices [n, C, C] whose products with the log2-gates are the exponents, in the order of :func:`decays`."""
    chunk, block = plan.chunk, plan.block
    i, t = np.arange(chunk)[:, None], np.arange(chunk)[None, :]
    centred = np.where(i // block == t // block, np.where(t <= i, 0.5, -0.5), 0.0)
    if plan.by_pairs:
        return centred[None].astype(np.float32)
    found = [centred] if block > 1 else []
    for size in _level_sizes(plan):
        border = (i // (2 * size)) * 2 * size + size - 1
        found.append(np.where(i > border, (border < t) & (t <= i), (i < t) & (t <= border)))
    found += [t <= i, t > i]
    return np.stack([np.asarray(x, np.float32) for x in found])


def _level_sizes(plan: Plan) -> list[int]:
    """Rows of the half blocks, smallest first."""
    sizes, size = [], plan.block
    while size < plan.chunk:
        sizes.append(size)
        size *= 2
    return sizes


# Inside the kernels: tiles


def dot(a: jax.Array, b: jax.Array, axes: str) -> jax.Array:
    """Product in float32; ``axes`` "nn", "nt" (contract the last axes) or "tn" (contract the first)."""
    contract = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[axes]
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def shift_of(size: int) -> int:
    """log2 of a power of two."""
    return size.bit_length() - 1


def own_lanes(plan: Plan, head: int, rows: int, per_head: int | None = None) -> jax.Array:
    """Boolean [rows, pack * per_head]: the lanes of one packed head (``per_head`` lanes a head; default: features)."""
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


def valid_rows(plan: Plan, chunk_index) -> jax.Array | None:
    """Rows of this chunk inside the sequence [C, 1] (boolean), or None when every chunk is full."""
    if not plan.ragged or plan.chunks == 1:
        return None
    row = lax.broadcasted_iota(jnp.int32, (plan.chunk, 1), 0)
    return row < plan.length - chunk_index * plan.chunk


def clean(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Zero the rows beyond the sequence, which hold garbage (perhaps NaN)."""
    return x if valid is None else jnp.where(valid, x, jnp.zeros_like(x))


# Inside the kernels: decay factors and scores


class Term(NamedTuple):
    """Scores of one product: rows times ``q`` against columns times ``k`` (None: factor 1) where ``mask`` holds (None: the
    columns' own triangle at the top, everything below)."""

    q: jax.Array | None
    k: jax.Array | None
    mask: jax.Array | None


class Columns(NamedTuple):
    """Scores of the columns start ... start + size against the rows from ``start`` on; terms have disjoint masks."""

    start: int
    size: int
    terms: tuple[Term, ...]


class Decays(NamedTuple):
    """Factors of one tile. q * into_rows meets the state times ``into``; k * out_rows, times ``out``, adds to it after it
    was multiplied by ``total`` = 2^(b_C)."""

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
    for size in _level_sizes(plan):
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


def mask_scores(x: jax.Array, mask: jax.Array | None, columns: Columns, plan: Plan) -> jax.Array:
    """x [rows, pack * size] where the scores of a term live, else 0."""
    if mask is not None:
        return jnp.where(mask, x, 0.0)
    size = columns.size
    i = lax.broadcasted_iota(jnp.int32, (size, size * plan.pack), 0)
    j = lax.broadcasted_iota(jnp.int32, (size, size * plan.pack), 1) & (size - 1)
    top = jnp.where(i >= j, x[:size], 0.0)
    return top if x.shape[0] == size else jnp.concatenate([top, x[size:]], axis=0)


class Scores(NamedTuple):
    """Rounded scores of one :class:`Columns`, side by side for the packed heads, and the operands of every term."""

    a: jax.Array
    operands: tuple[tuple[jax.Array, jax.Array], ...]


def scores(q: jax.Array, k: jax.Array, columns: Columns, plan: Plan) -> Scores:
    """q, k float32 tiles [C, lanes]."""
    rows = slice(columns.start, columns.start + columns.size)
    a, operands = None, []
    for term in columns.terms:
        left = scaled(q[columns.start :], term.q, plan)
        right = stack_heads(scaled(k[rows], term.k, plan), plan)
        product = dot(left, right, "nt")
        if a is None:
            a = mask_scores(product, term.mask, columns, plan)
        else:
            a = jnp.where(term.mask, product, a)
        operands.append((left, right))
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


def read_out(q, k, v, S, z, decay: Decays, plan: Plan, normalize: bool):
    """Numerator of a tile (float32 [C, lanes]) and 1 / denominator ([C, lanes], or [C, 1] for one head, or None).

    Returns (num, inverse, state operand of q, scores of every Columns). The denominator sums the rounded scores and the
    rounded q of the numerator; it does so outside the matrix unit, which is the busier one here.
    """
    shared = decay.columns[0].terms[0].q is decay.into_rows
    found = [scores(q, k, columns, plan) for columns in decay.columns]
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
    if plan.pack == 1 and size != plan.lanes:
        den = [jnp.sum(weighted, axis=1, keepdims=True) + jnp.sum(total, axis=1, keepdims=True)]
    elif size == plan.width:
        den = head_sums(weighted + total, plan)
    else:
        sums = zip(head_sums(weighted, plan), head_sums(total, plan, size), strict=True)
        den = [state + scores for state, scores in sums]
    return num, reciprocal(spread_columns(den, plan) + EPS, plan), q_in, found


def next_state(k: jax.Array, v: jax.Array, S: jax.Array, z: jax.Array, decay: Decays, plan: Plan):
    """State after the chunk; k float32 tile, v tile in the compute dtype."""
    k_out = scaled(k, decay.out_rows, plan)
    update = pick_heads(dot(v, k_out, "tn"), plan)
    total = jnp.sum(k_out.astype(jnp.float32), axis=0, keepdims=True)
    if decay.out is not None:
        update, total = update * decay.out, total * decay.out
    return decay.total * S + update, decay.total * z + total


# Kernels


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


def _start_state(refs, state, has_state: bool) -> None:
    """Before the first chunk: the initial state, or zeros."""
    S_ref, z_ref = state

    @pl.when(pl.program_id(2) == 0)
    def _():
        S_ref[...] = refs[0][...] if has_state else jnp.zeros_like(S_ref)
        z_ref[...] = refs[1][...] if has_state else jnp.zeros_like(z_ref)


def _forward_kernel(*refs, plan: Plan, normalize: bool, has_state: bool):
    q_ref, k_ref, v_ref, g_ref, m_ref, *initial, o_ref, S_ref, z_ref = refs
    _start_state(initial, (S_ref, z_ref), has_state)
    shared = tile_inputs(v_ref, g_ref, m_ref, pl.program_id(2), plan)
    for tile in range(plan.tiles):
        q, k = tile_of(q_ref, tile, shared.valid, plan), tile_of(k_ref, tile, shared.valid, plan)
        v, decay = shared.values(tile, plan), shared.decays(tile, plan)
        S, z = S_ref[0, tile], z_ref[0, 0, tile : tile + 1]
        num, inverse, _, _ = read_out(q, k, v, S, z, decay, plan, normalize)
        out = num if inverse is None else num * inverse
        o_ref[0, :, tile * plan.lanes : (tile + 1) * plan.lanes] = out.astype(o_ref.dtype)
        S_ref[0, tile], z_ref[0, 0, tile : tile + 1] = next_state(k, v, S, z, decay, plan)


def _states_kernel(*refs, plan: Plan, has_state: bool):
    """The states at the start of every chunk, for the backward pass."""
    k_ref, v_ref, g_ref, m_ref, *initial, states_ref, zs_ref, S_ref, z_ref = refs
    _start_state(initial, (S_ref, z_ref), has_state)
    shared = tile_inputs(v_ref, g_ref, m_ref, pl.program_id(2), plan)
    zs_ref[0, 0] = z_ref[0]
    for tile in range(plan.tiles):
        S, z = S_ref[0, tile], z_ref[0, 0, tile : tile + 1]
        states_ref[0, 0, tile] = S.astype(states_ref.dtype)
        k = tile_of(k_ref, tile, shared.valid, plan)
        v, decay = shared.values(tile, plan), shared.decays(tile, plan)
        S_ref[0, tile], z_ref[0, 0, tile : tile + 1] = next_state(k, v, S, z, decay, plan)


# Calls


class Specs(NamedTuple):
    """BlockSpecs of one call, by kind of array."""

    row: pl.BlockSpec
    v: pl.BlockSpec
    gate: pl.BlockSpec
    matrices: pl.BlockSpec
    S: pl.BlockSpec
    z: pl.BlockSpec
    states: pl.BlockSpec
    zs: pl.BlockSpec


def specs(plan: Plan, *, reverse: bool = False) -> Specs:
    """Blocks on [B, T, heads * width]; ``reverse`` walks the chunks from the last to the first."""
    last = plan.chunks - 1

    def time(t):
        return last - t if reverse else t

    def kv(group: int) -> pl.BlockSpec:
        count = plan.kv_heads(group)
        # Several programs may read one kv head; plain lax.div, as // adds a sign correction that needs the device kind.
        share = max(1, group // plan.heads_block)
        block = (1, plan.chunk, count * plan.width)
        return pl.BlockSpec(block, lambda b, h, t: (b, time(t), h if share == 1 else lax.div(h, np.int32(share))))

    count = gate_matrices(plan).shape[0]
    tile = (plan.tiles, plan.width, plan.lanes)
    return Specs(
        row=pl.BlockSpec((1, plan.chunk, plan.heads_block * plan.width), lambda b, h, t: (b, time(t), h)),
        v=kv(plan.v_group),
        gate=kv(plan.g_group),
        matrices=pl.BlockSpec((count, plan.chunk, plan.chunk), lambda b, h, t: (0, 0, 0)),
        S=pl.BlockSpec((1, *tile), lambda b, h, t: (b, h, 0, 0)),
        z=pl.BlockSpec((1, 1, plan.tiles, plan.lanes), lambda b, h, t: (b, h, 0, 0)),
        states=pl.BlockSpec((1, 1, *tile), lambda b, h, t: (b, time(t), h, 0, 0)),
        zs=pl.BlockSpec((1, 1, 1, plan.tiles, plan.lanes), lambda b, h, t: (b, time(t), h, 0, 0)),
    )


def call(
    kernel,
    plan: Plan,
    *,
    in_specs,
    out_specs,
    out_shape,
    inputs,
    flops: float,
    exponentials: float,
    name: str,
    scratch=(),
):
    """One ``pallas_call`` over (batch, blocks of heads, chunks)."""
    moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *out_shape))
    return pl.pallas_call(
        kernel,
        grid=(plan.batch, plan.head_blocks, plan.chunks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=list(scratch),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=pl.CostEstimate(flops=int(flops), bytes_accessed=int(moved), transcendentals=int(exponentials)),
        interpret=INTERPRET if interpret_mode() else False,
        name=name,
    )(*inputs)


def state_shapes(plan: Plan, *like) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of a packed state."""
    S = (plan.batch, plan.heads // plan.pack, plan.width, plan.lanes)
    z = (plan.batch, plan.head_blocks, plan.tiles, plan.lanes)
    return out_struct(S, jnp.float32, *like), out_struct(z, jnp.float32, *like)


def token_heads(plan: Plan) -> int:
    return plan.batch * plan.chunks * plan.chunk * plan.heads


def forward(q, k, v, log_g, initial_state, *, normalize: bool, lower_bound: float | None, save_residuals: bool):
    """See ``kernels_pallas.gla``. Residuals are the inputs: backward recomputes everything else, chunk states included."""
    plan = make_plan(q, v, log_g, lower_bound)
    sp = specs(plan)
    inputs = [flat(x, plan) for x in (q, k, v, log_g)]
    inputs.append(jnp.asarray(gate_matrices(plan), plan.dtype))
    in_specs = [sp.row, sp.row, sp.v, sp.gate, sp.matrices]
    if initial_state is not None:
        inputs += pack_state(*initial_state, plan)
        in_specs += [sp.S, sp.z]

    count = token_heads(plan)
    o, S, z = call(
        lambda *refs: _forward_kernel(*refs, plan=plan, normalize=normalize, has_state=initial_state is not None),
        plan,
        in_specs=in_specs,
        out_specs=[sp.row, sp.S, sp.z],
        out_shape=[out_struct(inputs[0].shape, v.dtype, *inputs), *state_shapes(plan, *inputs)],
        inputs=inputs,
        flops=2 * count * (2 * plan.chunk * plan.width + 2 * plan.width**2),
        exponentials=2 * count * plan.width // plan.g_group,
        name="gla_forward",
    )
    residuals = (q, k, v, log_g, initial_state) if save_residuals else None
    return unflat(o, plan.heads, plan.values, plan), unpack_state(S, z, plan), residuals


def chunk_states(inputs, packed_state, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """States at every chunk start: [B, chunks, H / pack, width, lanes] (compute dtype), [B, chunks, blocks, tiles, lanes].

    ``inputs``: flat k, v, log_g and the gate matrices.
    """
    sp = specs(plan)
    in_specs = [sp.row, sp.v, sp.gate, sp.matrices]
    if packed_state is not None:
        inputs = [*inputs, *packed_state]
        in_specs += [sp.S, sp.z]
    S, z = state_shapes(plan, *inputs)
    count = token_heads(plan)
    stacked = [
        out_struct((plan.batch, plan.chunks, *S.shape[1:]), plan.dtype, *inputs),
        out_struct((plan.batch, plan.chunks, *z.shape[1:]), jnp.float32, *inputs),
    ]
    tile = (1, plan.tiles, plan.width, plan.lanes)
    states, zs = call(
        lambda *refs: _states_kernel(*refs, plan=plan, has_state=packed_state is not None),
        plan,
        in_specs=in_specs,
        out_specs=[sp.states, sp.zs],
        out_shape=stacked,
        inputs=inputs,
        flops=2 * count * plan.width**2,
        exponentials=count * plan.width // plan.g_group,
        name="gla_states",
        scratch=[pltpu.VMEM(tile, jnp.float32), pltpu.VMEM((1, 1, plan.tiles, plan.lanes), jnp.float32)],
    )
    return states, zs
