"""Forward of gated linear attention for NVIDIA GPUs, through Pallas' Triton lowering.

One program owns one query head, one segment of the sequence and ``block_v`` columns of the state, and walks the segment chunk by chunk
with the state S [K, block_v] and z [K] in registers; nothing but the inputs and o touches device memory. With enough heads one segment is
the whole sequence and there is one launch. Otherwise:

1. ``segment_state``: the state each segment adds, and the sum of its gates (P1);
2. ``combine`` turns them into the state before every segment (``prefix`` does so inside 3 when there are few segments);
3. ``segment_out``: outputs, from the state before the segment (P2).

Algebra of a chunk of C rows (b inclusive cumulative sum of lg = log2(e) log_g; r = b_C / 2 the one reference point; e = 2^r):

    q^ = q 2^(b - r)     k^ = k 2^(r - b)     A = where(i >= j, q^ k^T, 0)     S~ = e S     z~ = e z
    o = (A v + q^ S~) / (sum_j A + q^ z~ + eps)              S' = e (S~ + k^T v)     z' = e (z~ + sum_j k^)

since b_C - r = r: two exponentials per element and one per feature. Within |log_g| C <= 80 nothing overflows. The denominator sums the same
rounded A and q^ that the numerator uses. Gates without such a bound take several reference points (``triton_levels``).

Packed documents (``numbers``): A is masked between documents, S~ and z~ enter the rows of the document they belong to, k and v
of the last document alone reach S' and z', and S~ and z~ themselves only where no document begins in the chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.chunking import Split, reference_rows, split_sequence, strong_gates
from kernels_pallas.common import EPS, interpret_mode, out_struct
from kernels_pallas.gated_linear_attention import block_sizes
from kernels_pallas.gated_linear_attention.block_sizes import BlockSizes
from kernels_pallas.gated_linear_attention.triton_levels import (
    MAX_CHUNK,
    by_levels,
    exponents,
    level_scores,
    onward,
    state_exponents,
)
from kernels_pallas.gated_linear_attention.triton_tiles import (
    LANES,
    Documents,
    Rows,
    causal,
    column,
    compiler_params,
    dot,
    dot_exact,
    exp2,
    f32,
    feature_blocks,
    lanes,
    load_rows,
    ones,
    round_to,
    segment_spec,
    sequence_spec,
    state_spec,
    store_rows,
    store_vector,
    take_rows,
    token_spec,
)

APPLIES_BOUND = True
"""Gates below the bound are raised to it on load, and get no gradient: a pass of its own over them would cost more."""

TAKES_SEGMENTS = True
"""The documents of packed rows come as ``numbers``, and gates keep their bound."""

FORGOTTEN = -1e4
"""log2 units: the decay of a state across the start of a document."""

Pair = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
"""(S [K, V], z [K, 8]) in blocks of features, float32. Features are rows: a decay then takes two registers of a thread,
not sixteen."""


class State(NamedTuple):
    """The state between chunks, 2^pending (S, z): a chunk's closing factor waits for the next one's, to be applied once."""

    S: tuple[jax.Array, ...]
    z: tuple[jax.Array, ...]
    pending: tuple[jax.Array, ...]


SHORT = 64
"""Tokens. With strong gates, and up to so many tokens, a differentiated call also keeps o in float32. When it was rounded to
bfloat16, dq was off by 14 % at gates of -5, by 2.4 % at two tokens and -1.25, and by 0.5 % at 17 and more."""

PREFIX_SEGMENTS = 8
"""Up to so many segments, each program adds up the earlier ones itself (from L2); more take a ``combine`` launch."""


def supports(q, k, v, log_g, *, normalize: bool, lower_bound: float | None, differentiated: bool) -> str | None:
    """Why this backend cannot run these arguments (the end of a sentence), or None."""
    del k, log_g, normalize
    features, values = q.shape[-1], v.shape[-1]
    for name, size in (("K", features), ("V", values)):
        if size & (size - 1) or not 16 <= size <= 256:
            return f"{name} must be a power of two from 16 to 256, got {size}"
    if differentiated and max(features, values) > 128:
        return f"the backward pass takes head sizes up to 128, got K = {features}, V = {values}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q must be bfloat16 or float32, got {q.dtype}"
    # The three TF32 passes of a float32 product leave 1.2e-5 at gates of -5 (measured on an H200), where 1e-5 is promised.
    if differentiated and q.dtype == jnp.float32 and strong_gates(lower_bound):
        return f"float32 gradients take a gate_lower_bound of at least -1.25, got {lower_bound}"
    return None


def sizes_for(kernel: str, q: Any, v: Any, lower_bound: float | None) -> BlockSizes:
    """Block sizes of the table, with the chunk cut to what the gate bound and the length allow."""
    sizes = block_sizes.lookup(kernel, q.dtype, q.shape[-1], v.shape[-1])
    length = max(16, 1 << (q.shape[1] - 1).bit_length())
    allowed = MAX_CHUNK if by_levels(lower_bound) else reference_rows(lower_bound, MAX_CHUNK)
    chunk = min(sizes.chunk, allowed, length)
    return dataclasses.replace(sizes, chunk=chunk, block_v=min(sizes.block_v, v.shape[-1]))


def load_gates(
    ref: Any, start: Any, chunk: int, limit: int | None, dtype: Any, block: tuple[int, int], bound: float | None
) -> jax.Array:
    """Natural-log gates, bounded, and rounded once to the operand type so that every sum of them is exact."""
    g = load_rows(ref, start, chunk, limit, block)
    if bound is not None:
        g = jnp.maximum(g, jnp.asarray(bound, g.dtype))
    return round_to(g, dtype)


def chunks_of(split: Split, segment: Any) -> Any:
    """Number of chunks of a segment: static when all are equal."""
    if split.even:
        return split.per_segment
    return jnp.minimum(split.per_segment, split.count - segment * split.per_segment)


def zero_state(values: int, features: int) -> State:
    """The state before the first token when none is given."""
    widths = [n for _, n in feature_blocks(features)]
    lane = tuple(jnp.zeros((n, LANES), f32) for n in widths)
    return State(tuple(jnp.zeros((n, values), f32) for n in widths), lane, lane)


def read_state(S_ref: Any, z_ref: Any) -> State:
    """A state (refs [K, V] and [K]) as blocks of features."""
    blocks = feature_blocks(z_ref.shape[0])
    S = tuple(S_ref[pl.ds(at, n), :] for at, n in blocks)
    return State(S, tuple(lanes(z_ref[pl.ds(at, n)]) for at, n in blocks), zero_totals(z_ref.shape[0]))


def write_state(S_ref: Any, z_ref: Any, state: Pair, index: Any = None) -> None:
    """Write (S, z) to refs [K, V] and [K]; with ``index`` into that entry of refs [n, K, V] and [n, K]."""
    entry = () if index is None else (index,)
    for (at, n), S, z in zip(feature_blocks(z_ref.shape[-1]), *state, strict=True):
        S_ref[(*entry, pl.ds(at, n), slice(None))] = round_to(S, S_ref.dtype)
        z_ref[(*entry, pl.ds(at, n))] = column(z)


def write_totals(L_ref: Any, L: tuple[jax.Array, ...]) -> None:
    """Writes sums of gates, in blocks of features, to a ref [K]."""
    for (at, n), total in zip(feature_blocks(L_ref.shape[0]), L, strict=True):
        L_ref[pl.ds(at, n)] = column(total)


def zero_totals(features: int) -> tuple[jax.Array, ...]:
    """Sums of no gates."""
    return tuple(jnp.zeros((n, LANES), f32) for _, n in feature_blocks(features))


def _prefix(state: State, L_ref, S_ref, z_ref, count) -> State:
    """The state after ``count`` segments, from their summaries."""
    blocks = feature_blocks(L_ref.shape[1])

    def step(s, state):
        S, z = scaled(state, tuple(lanes(L_ref[s, pl.ds(at, n)]) for at, n in blocks))
        S = tuple(x + S_ref[s, pl.ds(at, n), :] for x, (at, n) in zip(S, blocks, strict=True))
        z = tuple(x + lanes(z_ref[s, pl.ds(at, n)]) for x, (at, n) in zip(z, blocks, strict=True))
        return State(S, z, tuple(jnp.zeros_like(x) for x in z))

    return lax.fori_loop(0, count, step, state)


def scaled(state: State, r: tuple[jax.Array, ...]) -> Pair:
    """2^r S and 2^r z; r [K, 8] per block."""
    factors = [exp2(p + x) for p, x in zip(state.pending, r, strict=True)]
    return (
        tuple(column(d)[:, None] * x for d, x in zip(factors, state.S, strict=True)),
        tuple(d * x for d, x in zip(factors, state.z, strict=True)),
    )


def settled(state: State) -> Pair:
    """(S, z) with nothing pending."""
    return scaled(state, tuple(jnp.zeros_like(x) for x in state.pending))


def add_chunk(
    before: Pair, k: tuple[jax.Array, ...], v: jax.Array, r: tuple[jax.Array, ...], documents: Documents | None
) -> State:
    """The state after a chunk from the scaled (S~, z~) before it: 2^r (S~ + k^T v, z~ + sum_j k^)."""
    counted = ones(v.shape[0], v.dtype)
    if documents is not None:
        before = jax.tree.map(documents.passing, before)
        v, counted = documents.leaving(v), documents.leaving(counted)
    S = tuple(x + dot(y, v, ta=True) for x, y in zip(before[0], k, strict=True))
    z = tuple(x + dot(y, counted, ta=True) for x, y in zip(before[1], k, strict=True))
    return State(S, z, r)


def segment_decay(L: tuple[jax.Array, ...], rows: Rows, split: Split, segment: Any) -> tuple[jax.Array, ...]:
    """The sums of a segment's gates, or :data:`FORGOTTEN` where a document begins in it."""
    if rows.numbers is None:
        return L
    tokens = split.per_segment * split.chunk
    last = rows.last_begins(segment * tokens, tokens, split.length)
    return tuple(jnp.where(last < 0, x, FORGOTTEN) for x in L)


def segment_state_kernel(
    *refs, split: Split, dtype: Any, per_chunk: bool, bound: float | None, given_rows: tuple[bool, ...]
):
    """P1: the summary of a segment. With ``per_chunk``, for the backward pass: the scaled state before every chunk, from a given
    state."""
    inputs = iter(refs)
    rows = take_rows(inputs, given_rows)
    k_ref, v_ref, g_ref, *refs = inputs
    segment = pl.program_id(2)
    chunk, limit = split.chunk, split.length if split.ragged else None
    blocks = feature_blocks(g_ref.shape[1])
    if per_chunk:
        *given, S_ref, z_ref = refs
    else:
        given, (L_ref, S_ref, z_ref) = (), refs

    def step(i, carry):
        state, L = carry
        index = segment * split.per_segment + i
        start = index * chunk
        documents = rows.documents(start, chunk, split.length)
        v = load_rows(v_ref, start, chunk, rows.limit(limit))
        ks, factors, Ls = [], [], []
        for block, before in zip(blocks, L, strict=True):
            k = load_rows(k_ref, start, chunk, limit, block)
            g = load_gates(g_ref, start, chunk, limit, dtype, block, bound)
            x = state_exponents(g, by_levels(bound))
            ks.append(round_to(k.astype(f32) * exp2(exponents(g, by_levels(bound)).k), dtype))
            factors.append(x)
            Ls.append(before + x.total())
        r = tuple(x.r for x in factors)
        before = scaled(state, r)
        if per_chunk:
            write_state(S_ref, z_ref, before, index)
        return add_chunk(onward(before, factors), tuple(ks), v, r, documents), tuple(Ls)

    features, values = S_ref.shape[-2:]
    state = read_state(*given) if given else zero_state(values, features)
    state, L = lax.fori_loop(0, chunks_of(split, segment), step, (state, zero_totals(features)))
    if not per_chunk:
        write_state(S_ref, z_ref, settled(state))
        write_totals(L_ref, segment_decay(L, rows, split, segment))


def _combine_kernel(L_ref, Sl_ref, zl_ref, *rest, segments: int, reverse: bool, initial: bool):
    """Exclusive prefix (suffix when reverse) of the segment summaries; ``initial`` is the state before the first one."""
    *before, S_ref, z_ref = rest
    if initial:
        S, z = before[0][:, :], before[1][:]
    else:
        S, z = jnp.zeros(Sl_ref.shape[1:], f32), jnp.zeros(zl_ref.shape[1:], f32)

    def step(i, state):
        S, z = state
        s = segments - 1 - i if reverse else i
        S_ref[s, :, :], z_ref[s, :] = S, z
        decay = exp2(L_ref[s, :])
        return decay[:, None] * S + Sl_ref[s, :, :], decay * z + zl_ref[s, :]

    lax.fori_loop(0, segments, step, (S, z))


def _segment_out_kernel(
    *refs,
    split: Split,
    normalize: bool,
    states: str,
    initial: bool,
    save_den: bool,
    save_o: bool,
    bound: float | None,
    given_rows: tuple[bool, ...],
):
    """P2: the outputs of a segment; the last one also writes the final state."""
    refs = iter(refs)
    rows = take_rows(refs, given_rows)
    q_ref, k_ref, v_ref, g_ref = (next(refs) for _ in range(4))
    given = tuple(next(refs) for _ in range(2)) if initial or states == "given" else None
    summaries = tuple(next(refs) for _ in range(3)) if states == "prefix" else None
    o_ref, S_ref, z_ref = (next(refs) for _ in range(3))
    den_ref = next(refs) if save_den else None
    exact_ref = next(refs) if save_o else None

    segment = pl.program_id(2)
    dtype = q_ref.dtype
    chunk, limit = split.chunk, split.length if split.ragged else None
    mask = causal(chunk)
    features, values = S_ref.shape
    blocks = feature_blocks(features)
    state = zero_state(values, features) if given is None else read_state(*given)
    if summaries is not None:
        state = _prefix(state, *summaries, count=segment)

    def step(i, state):
        start = (segment * split.per_segment + i) * chunk
        documents = rows.documents(start, chunk, split.length)

        def gates(block):
            return load_gates(g_ref, start, chunk, limit, dtype, block, bound)

        factors = [state_exponents(gates(block), by_levels(bound)) for block in blocks]
        r = tuple(x.r for x in factors)
        before = scaled(state, r)
        rounded = tuple(round_to(x, dtype) for x in before[0])
        # The state comes before q, so that its operands are dead when the tiles of the output are formed.
        sides = [exponents(gates(block), by_levels(bound)) for block in blocks]
        k = tuple(
            round_to(load_rows(k_ref, start, chunk, limit, block).astype(f32) * exp2(x.k), dtype)
            for block, x in zip(blocks, sides, strict=True)
        )
        v = load_rows(v_ref, start, chunk, rows.limit(limit))
        state = add_chunk(onward(before, factors), k, v, r, documents)
        q = tuple(
            round_to(load_rows(q_ref, start, chunk, limit, block).astype(f32) * exp2(x.q), dtype)
            for block, x in zip(blocks, sides, strict=True)
        )
        within = mask if documents is None else documents.same(mask)
        if by_levels(bound):

            def tiles(block):
                load = functools.partial(load_rows, start=start, rows=chunk, limit=limit, block=block)
                return load(q_ref), load(k_ref), gates(block)

            A = round_to(jnp.where(within, level_scores(blocks, tiles, dtype), 0.0), dtype)
        else:
            A = scores(q, k, within)
        o, den = chunk_out(A, q, v, rounded, before[1], normalize, documents)
        store_rows(o_ref, start, o, limit)
        if exact_ref is not None:
            store_rows(exact_ref, start, o, limit)
        if den_ref is not None and den is not None:
            store_vector(den_ref, start, den, limit)
        return state

    state = lax.fori_loop(0, chunks_of(split, segment), step, state)

    @pl.when(segment == split.segments - 1)
    def _():
        write_state(S_ref, z_ref, settled(state))


def scores(q: tuple[jax.Array, ...], k: tuple[jax.Array, ...], mask: jax.Array) -> jax.Array:
    """A = where(i >= j, q^ k^T, 0), rounded."""
    total = sum((dot(x, y, tb=True) for x, y in zip(q[1:], k[1:], strict=True)), start=dot(q[0], k[0], tb=True))
    return round_to(jnp.where(mask, total, 0.0), q[0].dtype)


def denominator(
    A: jax.Array, q: tuple[jax.Array, ...], z: tuple[jax.Array, ...], documents: Documents | None = None
) -> jax.Array:
    """sum_j A + q^ z~ + eps [C] from the rounded A and q^; z~ [K, 8] for each block."""
    products = [dot_exact(x, y) for x, y in zip(q, z, strict=True)]
    inside = dot(A, ones(A.shape[1], A.dtype))
    if documents is not None:
        products = [documents.entered(sum(products[1:], start=products[0]))]
    return column(sum(products, start=inside)) + EPS


def chunk_out(A, q, v, S, z, normalize: bool, documents: Documents | None = None) -> tuple[jax.Array, jax.Array | None]:
    """o [C, V] float32 and den [C] (None unless normalize) of a chunk; A, q^ and S~ rounded, z~ [K, 8] float32, by blocks."""
    if documents is None:
        o = dot(A, v)
        for x, y in zip(q, S, strict=True):
            o += dot(x, y)
    else:
        # In this order one accumulator serves: the rows that the state does not reach are cleared on the way.
        o = documents.entered(sum((dot(x, y) for x, y in zip(q[1:], S[1:], strict=True)), start=dot(q[0], S[0])))
        o += dot(A, v)
    if not normalize:
        return o, None
    den = denominator(A, q, z, documents)
    return o * (1.0 / den)[:, None], den


def segment_states(k, v, log_g, heads: int, split: Split, sizes: BlockSizes, bound: float | None, rows: Rows):
    """L, S, z of every segment: [B, H, n, K], [B, H, n, K, V], [B, H, n, K] float32, L in log2 units.

    The last segment's entry is left unwritten: nothing that is used depends on it.
    """
    batch, _, _, features = k.shape
    values, count = v.shape[-1], split.segments
    vectors, matrices = (batch, heads, count, features), (batch, heads, count, features, values)
    width = sizes.block_v
    options = {"split": split, "dtype": k.dtype, "per_chunk": False, "bound": bound, "given_rows": rows.given}
    return pl.pallas_call(
        functools.partial(segment_state_kernel, **options),
        grid=(heads, values // width, count - 1, batch),
        in_specs=[*rows.specs(), token_spec(k, heads), token_spec(v, heads, width), token_spec(log_g, heads)],
        out_specs=[segment_spec(vectors), segment_spec(matrices, width), segment_spec(vectors)],
        out_shape=[out_struct(shape, f32, k, v, log_g) for shape in (vectors, matrices, vectors)],
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="gla_segment_state",
    )(*rows.inputs(), k, v, log_g)


def combine(L, S, z, initial, *, reverse: bool = False):
    """State before every segment [B, H, n, K, V], [B, H, n, K] (after every segment when ``reverse``) from the summaries.

    The last (first when ``reverse``) summary is read but does not enter the result: it may be anything.
    """
    batch, heads, _, _, values = S.shape
    width = min(32, values)
    initial_specs = [] if initial is None else [state_spec(initial[0].shape, width), state_spec(initial[1].shape)]
    return pl.pallas_call(
        functools.partial(_combine_kernel, segments=S.shape[2], reverse=reverse, initial=initial is not None),
        grid=(heads, values // width, 1, batch),
        in_specs=[sequence_spec(L.shape), sequence_spec(S.shape, width), sequence_spec(z.shape), *initial_specs],
        out_specs=[sequence_spec(S.shape, width), sequence_spec(z.shape)],
        out_shape=[out_struct(S.shape, f32, L, S), out_struct(z.shape, f32, L, S)],
        compiler_params=compiler_params(BlockSizes(num_warps=4, num_stages=1)),
        interpret=interpret_mode(),
        name="gla_combine",
    )(L, S, z, *(initial or ()))


def plan_forward(q, v, lower_bound: float | None, kernel: str = "forward") -> tuple[BlockSizes, Split]:
    sizes = sizes_for(kernel, q, v, lower_bound)
    programs = q.shape[0] * q.shape[2] * (v.shape[3] // sizes.block_v)
    return sizes, split_sequence(q.shape[1], sizes.chunk, programs, sizes.programs)


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
    numbers=None,
    lengths=None,
) -> Any:
    """See ``kernels_pallas.contract``. Residuals: (q, k, v, log_g, initial_state, o, den, segment states, rows).

    ``lengths`` [B] int32: from there on v may hold anything, and q, k and log_g are zeros.
    """
    sizes, split = plan_forward(q, v, lower_bound)
    rows = Rows(lengths, numbers)
    states, summaries, given = "zero", (), None
    if initial_state is not None:
        given = initial_state
    if split.segments > 1:
        own = sizes_for_segments(q, v, sizes)
        summaries = segment_states(k, v, log_g, q.shape[2], split, own, lower_bound, rows)
        states = "prefix"
        if save_residuals or split.segments > PREFIX_SEGMENTS:
            given = combine(*summaries, initial=initial_state)
            summaries, states = (), "given"

    cancels = strong_gates(lower_bound) or q.shape[1] <= SHORT
    wide = q.dtype == jnp.bfloat16 and cancels
    save_o = save_residuals and normalize and wide
    save_den = save_residuals and normalize
    o, S, z, den, exact = _segment_out(
        q, k, v, log_g, given, summaries, sizes, split, states, normalize, save_den, save_o, lower_bound, rows
    )
    residuals = None
    if save_residuals:
        segment = None if split.segments == 1 else given
        kept = (exact if wide else o) if normalize else None
        residuals = (q, k, v, log_g, initial_state, kept, den, segment, rows)
    return o, (S, z), residuals


def sizes_for_segments(q, v, sizes: BlockSizes) -> BlockSizes:
    """P1 cuts the sequence as P2 does, with its own warps, stages and columns."""
    own = block_sizes.lookup("segment_state", q.dtype, q.shape[-1], v.shape[-1])
    return dataclasses.replace(own, chunk=sizes.chunk, block_v=min(own.block_v, v.shape[-1]))


def _segment_out(q, k, v, log_g, given, summaries, sizes, split, states, normalize, save_den, save_o, bound, rows):
    batch, length, heads, features = q.shape
    values, width = v.shape[-1], sizes.block_v
    inputs = [*rows.inputs(), q, k, v, log_g]
    specs = [*rows.specs(), token_spec(q, heads), token_spec(k, heads), token_spec(v, heads, width)]
    specs.append(token_spec(log_g, heads))
    if given is not None:
        inputs += list(given)
        spec = segment_spec if states == "given" else state_spec
        specs += [spec(given[0].shape, width), spec(given[1].shape)]
    if summaries:
        inputs += list(summaries)
        specs += [
            sequence_spec(summaries[0].shape),
            sequence_spec(summaries[1].shape, width),
            sequence_spec(summaries[2].shape),
        ]
    shapes = [(batch, length, heads, values), (batch, heads, features, values), (batch, heads, features)]
    out_shape = [out_struct(shapes[0], v.dtype, *inputs)] + [out_struct(shape, f32, *inputs) for shape in shapes[1:]]
    out_specs = [token_spec(out_shape[0], heads, width), state_spec(shapes[1], width), state_spec(shapes[2])]
    if save_den:
        out_shape.append(out_struct((batch, length, heads), f32, *inputs))
        out_specs.append(pl.BlockSpec((None, length, None), lambda h, c, s, b: (b, 0, h)))
    if save_o:
        out_shape.append(out_struct(shapes[0], f32, *inputs))
        out_specs.append(token_spec(out_shape[-1], heads, width))
    kernel = functools.partial(
        _segment_out_kernel,
        split=split,
        normalize=normalize,
        states=states,
        initial=given is not None,
        save_den=save_den,
        save_o=save_o,
        bound=bound,
        given_rows=rows.given,
    )
    o, S, z, *saved = pl.pallas_call(
        kernel,
        grid=(heads, values // width, split.segments, batch),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="gla_segment_out",
    )(*inputs)
    return o, S, z, saved[0] if save_den else None, saved[-1] if save_o else None
