"""Forward of gated linear attention for NVIDIA Hopper GPUs, through Pallas' Mosaic GPU lowering.

A program is four warpgroups (two for an odd number of 64-wide heads, three for K other than V) that walk a segment of one head or, at
d = 64, of two in chunks of 64 tokens. Tiles come by TMA into rings in shared memory.

*Preparing* warpgroups, one for 64 features, do all that S does not have to wait for, on tiles in place: the sums of the gates as products
with a constant matrix, q^ = q 2^(b - r) and k^ = k 2^(r - b), z, and q^ z~ of the denominator. *Recurrent* warpgroups, one for 64
value columns, keep S [K, 64] in registers: scores, outputs and state are chains of ``wgmma`` on the prepared tiles. The two kinds
work on neighbouring chunks at the same time; each reloads what it alone reads. Algebra as in ``triton``:

    q^ = q 2^(b - r)     k^ = k 2^(r - b)     A = where(i >= j, q^ k^T, 0)     S~ = 2^r S     z~ = 2^r z
    o = (A v + q^ S~) / (sum_j A + q^ z~ + eps)              S' = 2^r (S~ + k^T v)     z' = 2^r (z~ + sum_j k^)

The closing factor 2^r of S' waits for the next chunk's, to be applied once.

Packed documents: as in ``triton``, on the operands: once the scores of a chunk in which a document begins are formed, the recurrent
warpgroups clear the rows of q^ that the state before the chunk does not reach, and those of k^ that do not leave the chunk. The products
are the same in every chunk, and wait for each other as they do without documents.
"""

# Pallas for Mosaic GPU as of jax 0.11 and newer: pyright may see an older one, with other signatures and accumulators (the next line).
# And a variant of a kernel has None for the references that it does without, which a flag beside them tells (the line after it).
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.chunking import Split, reference_rows, split_sequence
from kernels_pallas.common import EPS, LOG2E, fold_vmap, interpret_mode
from kernels_pallas.gated_linear_attention import block_sizes, triton
from kernels_pallas.gated_linear_attention.mosaic_gpu_tiles import (
    CHUNK,
    ROWS,
    WIDTH,
    ChunkDocuments,
    bf16,
    f32,
    indices,
    keep_rows,
    launch,
    operand,
    over_columns,
    padded,
    passing,
    products,
    tiles,
    to_whole_chunks,
    transposed,
)
from kernels_pallas.gated_linear_attention.triton_tiles import Rows

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
"""Names of devices with wgmma, the products of warpgroups, of compute capability 9.0 and no other."""

PARTS = 16
"""Columns of z~ as an operand, the narrowest swizzled line: its high and its low part, eight times each."""


class Ring(NamedTuple):
    """How many chunks of a head shared memory holds at a time.

    ``keys`` of k and q, which stay until the outputs of a chunk are done; ``gates``, which only the preparing warpgroup reads;
    ``values`` of v, whose slot then holds the outputs. At least two of keys, and of values where there are outputs: one is
    loaded while the other is read.
    """

    keys: int
    gates: int
    values: int


RINGS = {True: Ring(3, 2, 2), False: Ring(4, 4, 4)}
"""By whether a kernel writes outputs. A slot is taken while its chunk is loaded, prepared and read. With outputs, and d = 128,
these fill the shared memory. The summary of a segment does little per chunk: two slots would not hide its loads."""

REGISTERS = (80, 176)
"""Of a thread in a preparing and in a recurrent warpgroup, where there are two of each: the state alone takes 64."""

PROGRAMS = 120
"""With fewer programs than this a sequence is cut into segments: an H100 or H200 runs 132 at a time, one on each
multiprocessor."""

TAKES_SEGMENTS = True
"""As ``triton``."""

APPLIES_BOUND = True
"""Gates below the bound are raised on load, as in ``triton``."""


def supports(q, k, v, log_g, *, normalize: bool, lower_bound: float | None, differentiated: bool) -> str | None:
    """Why this backend cannot run these arguments (the end of a sentence), or None."""
    del k, log_g, normalize, differentiated
    if jax.__version_info__ < (0, 11):
        return f"it needs jax 0.11 or newer, this is {jax.__version__}"
    kind = block_sizes.device_kind()
    if kind != "default" and not interpret_mode() and not any(name in kind for name in HOPPER):
        return f"it needs a Hopper GPU, this is {kind}"
    if q.dtype != bf16:
        return f"q must be bfloat16, got {q.dtype}"
    for name, size in (("K", q.shape[-1]), ("V", v.shape[-1])):
        if size not in (64, 128):
            return f"{name} must be 64 or 128, got {size}"
    if reference_rows(lower_bound, CHUNK) < CHUNK:
        return f"it needs a gate_lower_bound of at least -1.25, got {lower_bound}"
    return None


def plan(q, v) -> tuple[int, Split]:
    """How a call is divided: (heads that one program takes, how the sequence is cut)."""
    batch, length, heads, features = q.shape
    per_program = 2 if features == v.shape[-1] == WIDTH and heads % 2 == 0 else 1
    return per_program, split_sequence(length, CHUNK, batch * heads // per_program, PROGRAMS)


def _constants() -> jax.Array:
    """[2, C, C]: M with M @ lg = b - b_C / 2, and halves, whose products are half sums."""
    i = np.arange(CHUNK)
    return jnp.asarray(np.stack([np.where(i[:, None] >= i, 0.5, -0.5), np.full((CHUNK, CHUNK), 0.5)]), bf16)


def _kernel(
    *refs,
    split: Split,
    heads: int,
    groups: tuple[int, int],
    shape: tuple[int, int],
    flags: dict[str, bool],
    bound: float | None,
):
    """Body of a program. ``heads`` a program; ``groups``: query heads that a value head and a gate head serve; ``shape``
    (K, V); ``flags``: outputs (else the summary of the segment), given (a state before each segment), normalize, save_den,
    lengths (v is read up to each sequence's), documents (of packed rows);
    ``bound``: raise the gates to it (None: they are)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    outputs, given, normalize = flags["outputs"], flags["given"], flags["normalize"]
    ring = RINGS[outputs]
    refs = iter(refs)
    c_ref = next(refs)
    q_ref = next(refs) if outputs else None
    k_ref, v_ref, g_ref = (next(refs) for _ in range(3))
    lengths_ref = next(refs) if flags["lengths"] else None
    numbers_ref = next(refs) if flags["documents"] else None
    S0_ref, z0_ref = (next(refs), next(refs)) if given else (None, None)
    o_ref = next(refs) if outputs else None
    L_ref = None if outputs else next(refs)
    S_ref, z_ref = next(refs), next(refs)
    den_ref = next(refs) if flags["save_den"] else None
    c_s, k_s, g_s, v_s, r_s = (next(refs) for _ in range(5))
    q_s, S_s, z_s, past_s, out_den_s = (next(refs) for _ in range(5)) if outputs else (None,) * 5
    constants, keys_loaded, gates_loaded, values_loaded, ready, free, *masking = refs

    preparing, recurrent = shape[0] // WIDTH, shape[1] // WIDTH
    redistribute = outputs and heads * preparing == heads * recurrent == 2
    tile = plgpu.Layout.WGMMA
    row = tile.reduce(1)
    M_s, half_s = c_s.at[0], c_s.at[1]
    eight_halves = half_s.at[pl.ds(0, 8)].transpose((1, 0))

    segment, b, wg = (lax.axis_index(name) for name in ("segment", "batch", "warpgroup"))
    first = segment * split.per_segment
    count = jnp.minimum(split.per_segment, split.count - first)

    def chunk_rows(i):
        return pl.ds((first + i) * CHUNK, CHUNK)

    def documents_of(i):
        """(first row, of every row [C]; first row, of the last row) of chunk i's documents; loads that the wait for copies hides."""
        if numbers_ref is None:
            return None, None
        found = ChunkDocuments(numbers_ref, b, (first + i) * CHUNK)
        return found.first(), found.last()

    def slot_of(j, i, depth):
        return j * depth + lax.rem(i, jnp.int32(depth))

    def start_copies(load, depth):
        for i in range(depth):
            pl.when(i < count)(functools.partial(load, jnp.int32(i)))

    def prepare(j: int, p: int) -> None:
        if redistribute:
            plgpu.set_max_registers(REGISTERS[0], action="decrease")
        h = lax.axis_index("head") * heads + j
        columns = pl.ds(WIDTH * p, WIDTH)

        def load_gates(i):
            """Start the copy of chunk i. Rows beyond the sequence arrive as zeros: they leave the state alone."""
            slot, head = slot_of(j, i, ring.gates), lax.div(h, jnp.int32(groups[1]))
            source = g_ref.at[b, chunk_rows(i), head, columns]
            plgpu.copy_gmem_to_smem(source, g_s.at[slot, p], gates_loaded.at[slot * preparing + p])

        def load_keys(i):
            """k and q, all in one barrier's count."""
            slot, rows = slot_of(j, i, ring.keys), chunk_rows(i)
            for part in range(preparing):
                columns, barrier = pl.ds(WIDTH * part, WIDTH), keys_loaded.at[slot]
                plgpu.copy_gmem_to_smem(k_ref.at[b, rows, h, columns], k_s.at[slot, part], barrier)
                if outputs:
                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h, columns], q_s.at[slot, part], barrier)

        if j == p == 0:
            plgpu.copy_gmem_to_smem(c_ref, c_s, constants)
        start_copies(load_gates, ring.gates)
        if p == 0:
            start_copies(load_keys, ring.keys)
        plgpu.barrier_wait(constants)

        if given:
            # + 0.0: under shard_map a loaded array varies over the mesh in its type, what is computed in a kernel does not,
            # and a loop's carry may not change its type.
            z = plgpu.load(z0_ref.at[b, h, segment, columns], layout=row, optimized=False) + 0.0
        else:
            z = plgpu.layout_cast(jnp.zeros((WIDTH,), f32), row)
        L = plgpu.layout_cast(jnp.zeros((WIDTH,), f32), row)
        left = indices(WIDTH, PARTS)[1] < PARTS // 2

        def step(i, carry):
            z, L = carry
            slot, gate_slot = slot_of(j, i, ring.keys), slot_of(j, i, ring.gates)
            begins, last = documents_of(i)
            plgpu.barrier_wait(gates_loaded.at[gate_slot * preparing + p])
            g, k = g_s.at[gate_slot, p], k_s.at[slot, p]
            if bound is not None:
                g[...] = jnp.maximum(plgpu.load(g, layout=tile), jnp.asarray(bound, bf16))
                plgpu.commit_smem()
            x, r = products(((CHUNK, WIDTH), (M_s, g)), ((WIDTH, 8), (transposed(g), eight_halves)))
            x, r = x * LOG2E, jnp.max(r, axis=1) * LOG2E
            plgpu.barrier_wait(keys_loaded.at[slot])
            r_s[slot, p] = r
            decay = jnp.exp2(r)
            z = decay * z
            k[...] = (plgpu.load(k, layout=tile).astype(f32) * jnp.exp2(-x)).astype(bf16)
            sums = [((WIDTH, 8), (transposed(k), eight_halves))]
            if outputs:
                q = (plgpu.load(q_s.at[slot, p], layout=tile).astype(f32) * jnp.exp2(x)).astype(bf16)
                q_s[slot, p] = q
                if normalize:
                    # As an operand of q^ z~: eight columns of z~ rounded, eight of what the rounding left.
                    high = z.astype(bf16).astype(f32)
                    z_parts = jnp.where(left, over_columns(high, PARTS), over_columns(z - high, PARTS))
                    z_s[gate_slot, p] = z_parts.astype(bf16)
                    sums.append(((CHUNK, PARTS), (q, z_s.at[gate_slot, p])))
            plgpu.commit_smem()
            pl.when(i + ring.gates < count)(functools.partial(load_gates, i + ring.gates))
            if last is not None:
                # Row c of M sums the rows to c less those after it, by halves. Of eight rows one is taken below.
                c = jnp.maximum(last - 1, 0)
                eight = M_s.at[pl.ds(pl.multiple_of(c // ROWS * ROWS, ROWS), ROWS)]
                sums.append(((WIDTH, ROWS), (transposed(k), transposed(eight))))
            # What the recurrent warpgroups need of the sums is the denominator's; and they may clear rows of k^.
            waits = outputs and (normalize or last is not None)
            if not waits:
                plgpu.barrier_arrive(ready.at[slot])
            added, *others = products(*sums)
            added = jnp.max(added, axis=1)
            if outputs and normalize:
                past = jnp.sum(others[0], axis=1) * (2 / PARTS)
                past_s[slot, p] = past if begins is None else jnp.where(begins < 0, past, 0.0)
            if waits:
                plgpu.barrier_arrive(ready.at[slot])
            if last is None:
                z = decay * (z + 2.0 * added)
            else:
                row_c = indices(WIDTH, ROWS)[1] == c % ROWS
                before = jnp.sum(jnp.where(row_c, others[-1], 0.0), axis=1)
                # before + added: the rows to c. There are none, and c is no such row, where the last document begins with the chunk.
                z = decay * (z * passing(last) + 2.0 * added - jnp.where(last > 0, 1.0, 0.0) * (before + added))
                r += 0.5 * triton.FORGOTTEN * (1.0 - passing(last))  # for L; what the others read is stored
            plgpu.barrier_arrive(free.at[slot])
            if p == 0:
                following = i + (ring.keys - 1)

                @pl.when((i > 0) & (following < count))
                def _():
                    plgpu.barrier_wait(free.at[slot_of(j, following, ring.keys)])
                    load_keys(following)

            return z, L + 2.0 * r

        z, L = lax.fori_loop(0, count, step, (z, L))
        if outputs:

            @pl.when(segment == split.segments - 1)
            def _():
                z_ref[b, h, columns] = z
        else:
            z_ref[b, h, segment, columns] = z
            L_ref[b, h, segment, columns] = L
        if p == 0:
            for back in range(ring.keys):  # of every barrier each phase is waited for

                @pl.when(count > back)
                def _(back=back):
                    plgpu.barrier_wait(free.at[slot_of(j, count - 1 - back, ring.keys)])

    def recur(j: int, w: int) -> None:
        if redistribute:
            plgpu.set_max_registers(REGISTERS[1], action="increase")
        h = lax.axis_index("head") * heads + j
        values = pl.ds(WIDTH * w, WIDTH)
        features = [pl.ds(WIDTH * p, WIDTH) for p in range(preparing)]

        def load_values(i):
            slot, head = slot_of(j, i, ring.values), lax.div(h, jnp.int32(groups[0]))
            source = v_ref.at[b, chunk_rows(i), head, values]
            plgpu.copy_gmem_to_smem(source, v_s.at[slot, w], values_loaded.at[slot * recurrent + w])

        start_copies(load_values, ring.values)
        if given:
            S = tuple(
                plgpu.load(S0_ref.at[b, h, segment, rows, values], layout=tile, optimized=False) + 0.0
                for rows in features
            )
        else:
            S = tuple(plgpu.layout_cast(jnp.zeros((WIDTH, WIDTH), f32), tile) for _ in features)
        pending = tuple(plgpu.layout_cast(jnp.zeros((WIDTH,), f32), row) for _ in features)
        rows, columns = indices(CHUNK, CHUNK)
        mask = rows >= columns

        def step(i, carry):
            S, pending = carry
            slot, value_slot = slot_of(j, i, ring.keys), slot_of(j, i, ring.values)
            begins, last = documents_of(i)
            plgpu.barrier_wait(ready.at[slot])

            # References are formed where they are used: the index constants of one from outside have no place in the body
            # of a run_state.
            def v():
                return v_s.at[value_slot, w]

            def await_values():
                plgpu.barrier_wait(values_loaded.at[value_slot * recurrent + w])
                if lengths_ref is not None:
                    keep_rows(v(), 0, lengths_ref[b] - (first + i) * CHUNK)

            def ks():
                return [transposed(k_s.at[slot, p]) for p in range(preparing)]

            def qs():
                return [q_s.at[slot, p] for p in range(preparing)]

            def own():
                return [S_s.at[j * recurrent + w, p] for p in range(preparing)]

            def scale():
                rs = tuple(plgpu.load(r_s.at[slot, p], layout=row) for p in range(preparing))
                return tuple(x * over_columns(jnp.exp2(p + r)) for x, p, r in zip(S, pending, rs, strict=True)), rs

            def clear_rows():
                """In a chunk in which a document begins, rows of q^ that the state before it does not reach, and of k^ that do not
                leave it, when all recurrent warpgroups of the head have formed their scores."""
                mine = range(w, preparing, recurrent)

                def together():
                    if recurrent > 1:
                        plgpu.barrier_arrive(masking[0].at[j])
                        plgpu.barrier_wait(masking[0].at[j])

                @pl.when(last >= 0)
                def _():
                    together()
                    for p in mine:
                        q = q_s.at[slot, p]
                        x = plgpu.load(q, layout=tile).astype(f32)
                        q[...] = jnp.where(over_columns(begins) < 0, x, 0.0).astype(bf16)
                        keep_rows(k_s.at[slot, p], last, CHUNK)
                    plgpu.commit_smem()
                    together()

            def add_chunk(S):
                if interpret_mode():  # which has no accumulators with a start
                    return tuple(x + products(((WIDTH, WIDTH), (k, v())))[0] for x, k in zip(S, ks(), strict=True))

                def body(accs):
                    for acc, k in zip(accs, ks(), strict=True):
                        plgpu.wgmma(acc, k, v())

                return pl.run_state(body)(tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in S))

            if not outputs:
                S, rs = scale()
                await_values()
                if last is not None:
                    keep_rows(v(), last, CHUNK)
                    S = tuple(x * passing(last) for x in S)
                S = add_chunk(S)
                plgpu.barrier_arrive(free.at[slot])
                pl.when(i + ring.values < count)(functools.partial(load_values, i + ring.values))
                return S, rs

            def scaled():
                """S~, and its operand copy: made while the tensor cores work on the scores."""
                S, rs = scale()
                for ref, x in zip(own(), S, strict=True):
                    ref[...] = x.astype(bf16)
                refill_values()
                return S, rs

            def refill_values():
                """The slot of the chunk before, from which its outputs went."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                following = i + (ring.values - 1)
                pl.when((i > 0) & (following < count))(functools.partial(load_values, following))

            def scores(acc):
                for q, k in zip(qs(), ks(), strict=True):
                    plgpu.wgmma(acc, q, k)
                S, rs = scaled()
                return acc[...], S, rs

            A, S, rs = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((CHUNK, CHUNK), f32))
            within = mask if begins is None else mask & (columns >= over_columns(begins))
            A = jnp.where(within, A, 0.0).astype(bf16)
            inverse = None
            if normalize:
                past = sum(plgpu.load(past_s.at[slot, p], layout=row) for p in range(preparing))
                den = jnp.sum(A.astype(f32), axis=1) + past + EPS
                inverse = 1.0 / den
            plgpu.commit_smem()
            await_values()
            if last is not None:
                clear_rows()
                S = tuple(x * passing(last) for x in S)
            if interpret_mode():
                (o,) = products(((CHUNK, WIDTH), (A, v()), *zip(qs(), own(), strict=True)))
                S = add_chunk(S)
            else:

                def accumulate(accs):
                    acc, *states = accs
                    plgpu.wgmma(acc, A, v())
                    for q, s in zip(qs(), own(), strict=True):
                        plgpu.wgmma(acc, q, s)
                    for state, k in zip(states, ks(), strict=True):
                        plgpu.wgmma(state, k, v())

                zeros = plgpu.layout_cast(jnp.zeros((CHUNK, WIDTH), f32), tile)
                o, *S = pl.run_state(accumulate)(tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in (zeros, *S)))
                S = tuple(S)
            if normalize:
                o = o * over_columns(inverse)
            plgpu.barrier_arrive(free.at[slot])
            # Nothing reads v any more: a store, and a copy into shared memory, starts with a barrier of the warpgroup.
            out = v()
            out[...] = o.astype(bf16)
            saves = den_ref is not None and w == 0
            if saves:
                out_den_s[j] = den
            plgpu.commit_smem()
            rows = chunk_rows(i)
            plgpu.copy_smem_to_gmem(out, o_ref.at[b, rows, h, values])
            if saves:
                plgpu.copy_smem_to_gmem(out_den_s.at[j], den_ref.at[b, h, rows])
            return S, rs

        S, pending = lax.fori_loop(0, count, step, (S, pending))

        def write(*index):
            for rows, x, p in zip(features, S, pending, strict=True):
                S_ref[*index, rows, values] = x * over_columns(jnp.exp2(p))

        if outputs:
            pl.when(segment == split.segments - 1)(functools.partial(write, b, h))
            plgpu.wait_smem_to_gmem(0)
        else:
            write(b, h, segment)

    for j in range(heads):
        at = j * (preparing + recurrent)
        for p in range(preparing):
            pl.when(wg == at + p)(functools.partial(prepare, j, p))
        for w in range(recurrent):
            pl.when(wg == at + preparing + w)(functools.partial(recur, j, w))


def _call(
    q, k, v, log_g, rows: Rows, given, split: Split, heads: int, bound: float | None, *, normalize: bool, save_den: bool
) -> tuple[Any, ...]:
    """One launch, with a batch axis more under vmap. q None: (L, S, z) of every segment but the last; else (o, S, z[, den])."""
    options = {"normalize": normalize, "save_den": save_den}
    run = functools.partial(_launch, split=split, heads=heads, bound=bound, **options)
    return fold_vmap(run)(q, k, v, log_g, rows, given)


def _launch(
    q, k, v, log_g, rows: Rows, given, *, split: Split, heads: int, bound: float | None, normalize: bool, save_den: bool
) -> tuple[Any, ...]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, all_heads, features = k.shape
    values, outputs = v.shape[-1], q is not None
    preparing, recurrent = features // WIDTH, values // WIDTH

    def vectors(*lead: int) -> Any:
        return plgpu.SMEM((*lead, CHUNK), f32)

    slots, gate_slots, value_slots = (heads * depth for depth in RINGS[outputs])
    scratch = [tiles(2), tiles(slots, preparing), tiles(gate_slots, preparing), tiles(value_slots, recurrent)]
    scratch += [vectors(slots, preparing)]
    if outputs:
        scratch += [tiles(slots, preparing), tiles(heads * recurrent, preparing)]
        scratch += [operand(gate_slots, preparing, WIDTH, PARTS), vectors(slots, preparing), vectors(heads)]
    copies = (2 if outputs else 1) * preparing
    scratch += [plgpu.Barrier(), plgpu.Barrier(num_arrivals=copies, num_barriers=slots)]
    scratch += [plgpu.Barrier(num_barriers=n) for n in (gate_slots * preparing, value_slots * recurrent)]
    scratch += [plgpu.Barrier(num_arrivals=n, num_barriers=slots) for n in (preparing, preparing + recurrent)]
    if rows.numbers is not None and outputs and recurrent > 1:
        scratch += [plgpu.Barrier(num_arrivals=recurrent, num_barriers=heads)]

    inputs = [_constants(), *((q,) if outputs else ()), k, v, log_g]
    inputs += [*rows.inputs(), *(given or ())]
    segments = split.segments
    lead = (batch, all_heads) if outputs else (batch, all_heads, segments)
    shapes = [((*lead, features, values), f32), ((*lead, features), f32)]
    if outputs:
        shapes.insert(0, ((batch, length, all_heads, values), bf16))
        if save_den:
            shapes.append(((batch, all_heads, split.count * CHUNK), f32))
    else:
        shapes.insert(0, ((*lead, features), f32))
    flags = {"outputs": outputs, "given": given is not None, "normalize": normalize, "save_den": save_den}
    flags["lengths"], flags["documents"] = rows.given
    body = functools.partial(
        _kernel,
        split=split,
        heads=heads,
        groups=(all_heads // v.shape[2], all_heads // log_g.shape[2]),
        shape=(features, values),
        flags=flags,
        bound=bound,
    )
    grid = {"head": all_heads // heads, "segment": segments if outputs else segments - 1, "batch": batch}
    return launch(body, inputs, shapes, scratch, grid=grid, warpgroups=heads * (preparing + recurrent))


def forward(
    q,
    k,
    v,
    log_g,
    initial_state,
    *,
    normalize: bool,
    lower_bound: float | None,
    save_residuals: bool,
    lengths=None,
    numbers=None,
) -> Any:
    """See ``kernels_pallas.contract``. ``lengths`` and residuals as in ``triton``, whose backward pass takes them."""
    length = q.shape[1]
    if save_residuals and length <= triton.SHORT:  # it keeps o in float32 for the gradients
        options = {"normalize": normalize, "lower_bound": lower_bound, "save_residuals": True}
        return triton.forward(q, k, v, log_g, initial_state, **options, lengths=lengths, numbers=numbers)
    rows = Rows(lengths, None if numbers is None else to_whole_chunks(numbers, 1))
    residuals = (q, k, v, log_g)
    heads, split = plan(q, v)
    q, k, v, log_g = padded(q, k, v, log_g)
    gates, bound = log_g, lower_bound
    if log_g.dtype != bf16:  # a pass over the gates anyway, or none where XLA fuses it into what makes them
        gates, bound = jnp.maximum(log_g, lower_bound).astype(bf16), None
    given = None if initial_state is None else tuple(x[:, :, None] for x in initial_state)
    if split.segments > 1:
        summaries = _call(None, k, v, gates, rows, None, split, heads, bound, normalize=False, save_den=False)
        given = triton.combine(*summaries, initial_state)
    save_den = save_residuals and normalize
    o, S, z, *den = _call(q, k, v, gates, rows, given, split, heads, bound, normalize=normalize, save_den=save_den)
    o = o[:, :length]
    if not save_residuals:
        return o, (S, z), None
    den = den[0][:, :, :length].swapaxes(1, 2) if normalize else None
    segment = None if split.segments == 1 else given
    return o, (S, z), (*residuals, initial_state, o if normalize else None, den, segment, Rows(lengths, numbers))
