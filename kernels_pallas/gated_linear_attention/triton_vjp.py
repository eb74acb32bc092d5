"""Backward of gated linear attention for NVIDIA GPUs, through Pallas' Triton lowering.

Two light sweeps write what couples the chunks, then every chunk is one independent program:

* ``states`` (B0): forward sweep, writes S~ = e S (rounded as the forward did) and z~ = e z before every chunk;
* ``dstates``: reverse sweep over q, gates, do, o, den, writes dS~ = e dS and dz~ = e dz after every chunk;
* ``chunk_vjp`` (B1): recomputes A, writes dq, dk, dv, dlog_g of the chunk in one go, with no state in registers.

With few heads both sweeps run segment by segment, in parallel: the forward pass saved the state before every segment, ``dstates``
first sums up each segment, and ``combine`` joins the sums from the last to the first.

Notation of the forward (e = 2^r, r = b_C / 2, x = b - r), with P = dn v^T, R = dn S~^T:

    dn = do / den     delta = -dn o        dA = where(i >= j, P + delta, 0)
    dq = 2^x (dA k^ + R + delta z~)        dk* = 2^-x (v dS~^T + dz~)        dk = 2^-x dA^T q^ + dk*        dv = A^T dn + k^ dS~
    dS_prev = e (dS~ + q^T dn)             dz_prev = e (dz~ + sum_i delta q^)
    dlog_g_t = sum_{i>=t} (q dq - k 2^-x dA^T q^)_i + sum_{i<t} (k dk*)_i + sum_v S~ dS~ + z~ dz~

The anchor of dlog_g holds at every chunk: its error does not grow with the length of the sequence.

Packed documents: A and dA are masked between documents; R, and what q adds to dS_prev and dz_prev, only in rows that the state
enters; dk* and k^ dS~ only in rows that leave the chunk; e dS~ and the last two terms of dlog_g only where no document begins
in it. The gate of a document's first token then has no gradient but rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.chunking import Split
from kernels_pallas.common import interpret_mode, out_struct, valid_tokens, without_padding
from kernels_pallas.gated_linear_attention import block_sizes
from kernels_pallas.gated_linear_attention.block_sizes import BlockSizes
from kernels_pallas.gated_linear_attention.triton import (
    State,
    chunks_of,
    combine,
    load_gates,
    plan_forward,
    read_state,
    scaled,
    segment_decay,
    segment_state_kernel,
    settled,
    write_state,
    write_totals,
    zero_state,
    zero_totals,
)
from kernels_pallas.gated_linear_attention.triton_levels import (
    Exponents,
    by_levels,
    exponents,
    level_gradients,
    level_scores,
    onward,
    state_exponents,
)
from kernels_pallas.gated_linear_attention.triton_tiles import (
    Rows,
    causal,
    column,
    compiler_params,
    dot,
    dot_exact,
    exp2,
    f32,
    feature_blocks,
    iota,
    lanes,
    load_rows,
    load_vector,
    round_to,
    segment_spec,
    sequence_spec,
    state_spec,
    store_rows,
    take_rows,
    token_spec,
)


def _dstates_kernel(
    *refs,
    split: Split,
    normalize: bool,
    per_chunk: bool,
    given: bool,
    bound: float | None,
    given_rows: tuple[bool, ...],
):
    """Reverse sweep of one segment. ``per_chunk``: writes every dS~, dz~, and the cotangent of the sequence's initial state."""
    refs = iter(refs)
    rows = take_rows(refs, given_rows)
    q_ref, g_ref, do_ref = (next(refs) for _ in range(3))
    den_ref, delta_ref = (next(refs), next(refs)) if normalize else (None, None)
    final = tuple(next(refs) for _ in range(2)) if given else None
    L_ref = None if per_chunk else next(refs)
    S_ref, z_ref = next(refs), next(refs)
    first = (next(refs), next(refs)) if per_chunk else None

    segment = pl.program_id(2) + (0 if per_chunk else 1)
    dtype = q_ref.dtype
    chunk, limit = split.chunk, split.length if split.ragged else None
    blocks = feature_blocks(q_ref.shape[1])
    count = chunks_of(split, segment)

    def step(i, carry):
        state, L = carry
        index = segment * split.per_segment + count - 1 - i
        start = index * chunk
        documents = rows.documents(start, chunk, split.length)
        dn, delta = load_rows(do_ref, start, chunk, limit), None
        if normalize:
            delta = lanes(load_vector(delta_ref, start, chunk, limit))
            inverse = 1.0 / load_vector(den_ref, start, chunk, limit)
            dn = round_to(dn.astype(f32) * inverse[:, None], dtype)
        if documents is not None:
            dn, delta = documents.entered(dn), None if delta is None else documents.entered(delta)
        qs, factors, Ls = [], [], []
        for block, before in zip(blocks, L, strict=True):
            q = load_rows(q_ref, start, chunk, limit, block)
            g = load_gates(g_ref, start, chunk, limit, dtype, block, bound)
            x = state_exponents(g, by_levels(bound))
            qs.append(round_to(q.astype(f32) * exp2(exponents(g, by_levels(bound)).q), dtype))
            factors.append(x)
            Ls.append(before + x.total())
        r = tuple(x.r for x in factors)
        S, z = scaled(state, r)
        if per_chunk:
            write_state(S_ref, z_ref, (S, z), index)
        S, z = onward((S, z), factors)
        if documents is not None:
            S, z = jax.tree.map(documents.passing, (S, z))
        S = tuple(x + dot(q, dn, ta=True) for x, q in zip(S, qs, strict=True))
        if delta is not None:
            z = tuple(x + dot_exact(q, delta, ta=True) for x, q in zip(z, qs, strict=True))
        return State(S, z, r), tuple(Ls)

    features, values = S_ref.shape[-2:]
    state = read_state(*final) if final is not None else zero_state(values, features)
    state, L = lax.fori_loop(0, count, step, (state, zero_totals(features)))
    if not per_chunk:
        write_state(S_ref, z_ref, settled(state))
        write_totals(L_ref, segment_decay(L, rows, split, segment))
        return

    assert first is not None  # per_chunk

    @pl.when(segment == 0)
    def _():
        write_state(*first, state=settled(state))


def _over_blocks(width: int, body: Any, carry: Any) -> Any:
    """``carry = body(block, carry)`` over feature blocks; a loop when there are several, so that each has the registers
    to itself."""
    blocks = feature_blocks(width)
    if len(blocks) == 1:
        return body(blocks[0], carry)
    size = blocks[0][1]
    return lax.fori_loop(0, len(blocks), lambda i, c: body((i * size, size), c), carry)


def _chunk_vjp_kernel(*refs, split: Split, normalize: bool, bound: float | None, given_rows: tuple[bool, ...]):
    """B1. Tiles are loaded and formed again where they are next used: kept, they would take the registers of all that
    stands between. The first-level cache still has them."""
    refs = iter(refs)
    known = take_rows(refs, given_rows)
    q_ref, k_ref, v_ref, g_ref, do_ref = (next(refs) for _ in range(5))
    den_ref, delta_ref = (next(refs), next(refs)) if normalize else (None, None)
    S_ref, z_ref, dS_ref, dz_ref, dq_ref, dk_ref, dv_ref, dg_ref = refs
    dtype = q_ref.dtype
    chunk, limit = split.chunk, split.length if split.ragged else None
    start = pl.program_id(2) * chunk
    mask = causal(chunk)
    documents = known.documents(start, chunk, split.length)
    if documents is not None:
        mask = documents.same(mask)
    features, values = q_ref.shape[1], v_ref.shape[1]
    columns = feature_blocks(values)
    single, levels = len(feature_blocks(features)) == 1, by_levels(bound)
    inverse = delta = None
    if normalize:
        inverse = 1.0 / load_vector(den_ref, start, chunk, limit)
        delta = load_vector(delta_ref, start, chunk, limit)

    def load(ref: Any, block: tuple[Any, int]) -> jax.Array:
        return load_rows(ref, start, chunk, limit, block)

    def gates(block: tuple[Any, int]) -> jax.Array:
        return load_gates(g_ref, start, chunk, limit, dtype, block, bound)

    def exponent(block: tuple[Any, int]) -> Exponents:
        return exponents(gates(block), levels)

    def q_hat(block: tuple[Any, int], x: Exponents) -> jax.Array:
        return round_to(load(q_ref, block).astype(f32) * exp2(x.q), dtype)

    def k_hat(block: tuple[Any, int], x: Exponents) -> jax.Array:
        return round_to(load(k_ref, block).astype(f32) * exp2(x.k), dtype)

    def scaled_do(block: tuple[Any, int]) -> jax.Array:
        do = load(do_ref, block)
        return do if inverse is None else round_to(do.astype(f32) * inverse[:, None], dtype)

    P = jnp.zeros((chunk, chunk), f32) if delta is None else jnp.broadcast_to(delta[:, None], (chunk, chunk))
    for c in columns:
        P += dot(scaled_do(c), load(v_ref, c), tb=True)
    exact_dA = jnp.where(mask, P, 0.0)
    dA = round_to(exact_dA, dtype)

    kept: list[jax.Array] = []

    def add_scores(block: tuple[Any, int], A: jax.Array) -> jax.Array:
        x = exponent(block)
        q, k = q_hat(block, x), k_hat(block, x)
        if single:
            kept.extend((q, k))
        return A + dot(q, k, tb=True)

    if levels:
        A = level_scores(
            feature_blocks(features), lambda block: (load(q_ref, block), load(k_ref, block), gates(block)), dtype
        )
    else:
        A = _over_blocks(features, add_scores, jnp.zeros((chunk, chunk), f32))
    A = round_to(jnp.where(mask, A, 0.0), dtype)

    def add_dv(block: tuple[Any, int], dv: Any) -> Any:
        k = kept[1] if kept else k_hat(block, exponent(block))
        return tuple(y + dot(k, dS_ref[pl.ds(*block), pl.ds(*c)]) for y, c in zip(dv, columns, strict=True))

    if documents is None:
        dv = _over_blocks(features, add_dv, tuple(dot(A, scaled_do(c), ta=True) for c in columns))
    else:
        dv = _over_blocks(features, add_dv, tuple(jnp.zeros((chunk, n), f32) for _, n in columns))
        dv = tuple(documents.leaving(x) + dot(A, scaled_do(c), ta=True) for x, c in zip(dv, columns, strict=True))
    for c, x in zip(columns, dv, strict=True):
        store_rows(dv_ref, start, x, limit, c)

    def gradients(block: tuple[Any, int], carry: Any) -> Any:
        rows = pl.ds(*block)
        x = exponent(block)
        q, k = kept if kept else (q_hat(block, x), k_hat(block, x))
        z, dz = z_ref[rows], dz_ref[rows]
        apart = documents is not None or levels
        r = jnp.zeros(k.shape, f32) if apart else dot(dA, k)
        for c in columns:
            r += dot(scaled_do(c), S_ref[rows, pl.ds(*c)], tb=True)
        if delta is not None:
            r += delta[:, None] * z[None, :]
        if documents is not None:
            r = documents.entered(r)
        if apart and not levels:
            r += dot(dA, k)
        inside = level_gradients(load(q_ref, block), load(k_ref, block), gates(block), exact_dA) if levels else None
        dq = exp2(x.q) * r
        store_rows(dq_ref, start, dq if inside is None else dq + inside.q, limit, block)
        # q dq and k dk as q^ r and k^ (...): with the very operands of dA k^ and dA^T q^, so that the terms of a token
        # with itself, which dominate at strong gates and belong to no gate, cancel to float32.
        upper = (iota((chunk, chunk), 0) <= iota((chunk, chunk), 1)).astype(dtype)
        if inside is None:
            local = dot(dA, q, ta=True)
            dg = dot_exact(upper, q.astype(f32) * r - k.astype(f32) * local)
        else:
            local = jnp.zeros_like(r)
            dg = dot_exact(upper, q.astype(f32) * r + inside.difference)
        anchor = z * dz
        later = jnp.broadcast_to(dz[None, :], r.shape)
        for c in columns:
            S, dS = S_ref[rows, pl.ds(*c)], dS_ref[rows, pl.ds(*c)]
            later += dot(load(v_ref, c), dS, tb=True)
            anchor += jnp.sum(S.astype(f32) * dS.astype(f32), axis=1)
        if documents is not None:
            later, anchor = documents.leaving(later), documents.passing(anchor)
        if levels:
            anchor *= column(exp2(state_exponents(gates(block), levels).total()))
        dk = exp2(x.k) * (local + later)
        store_rows(dk_ref, start, dk if inside is None else dk + inside.k, limit, block)
        before = (iota((chunk, chunk), 0) > iota((chunk, chunk), 1)).astype(dtype)
        dg += dot_exact(before, k.astype(f32) * later) + anchor[None, :]
        if bound is not None:
            dg = jnp.where(load(g_ref, block).astype(f32) < bound, 0.0, dg)
        store_rows(dg_ref, start, dg, limit, block)
        return carry

    _over_blocks(features, gradients, 0)


def _chunk_shapes(q, v, split: Split) -> tuple[tuple[int, ...], tuple[int, ...]]:
    batch, _, heads, features = q.shape
    return (batch, heads, split.count, features, v.shape[-1]), (batch, heads, split.count, features)


def _states(k, v, log_g, given, heads: int, split: Split, sizes: BlockSizes, shapes, bound: float | None, rows: Rows):
    """B0: S~ [B, H, n, K, V] in k's dtype and z~ [B, H, n, K] float32 before every chunk; ``given`` (S, z) before every segment."""
    batch, values, width = k.shape[0], v.shape[-1], sizes.block_v
    inputs = [*rows.inputs(), k, v, log_g]
    specs = [*rows.specs(), token_spec(k, heads), token_spec(v, heads, width), token_spec(log_g, heads)]
    if given is not None:
        inputs += list(given)
        specs += [segment_spec(given[0].shape, width), segment_spec(given[1].shape)]
    options = {"split": split, "dtype": k.dtype, "per_chunk": True, "bound": bound, "given_rows": rows.given}
    return pl.pallas_call(
        functools.partial(segment_state_kernel, **options),
        grid=(heads, values // width, split.segments, batch),
        in_specs=specs,
        out_specs=[sequence_spec(shapes[0], width), sequence_spec(shapes[1])],
        out_shape=[out_struct(shapes[0], k.dtype, *inputs), out_struct(shapes[1], f32, *inputs)],
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="gla_states",
    )(*inputs)


def _dstates(
    q,
    log_g,
    do,
    den,
    delta,
    final,
    split: Split,
    sizes: BlockSizes,
    shapes,
    normalize: bool,
    per_chunk: bool,
    bound: float | None,
    rows: Rows,
):
    """The reverse sweep. per_chunk: (dS~, dz~ after every chunk, dS0, dz0); else (L, dS, dz) of every segment but the first."""
    batch, _, heads, features = q.shape
    values, width = do.shape[-1], sizes.block_v
    inputs = [*rows.inputs(), q, log_g, do]
    specs = [*rows.specs(), token_spec(q, heads), token_spec(log_g, heads), token_spec(do, heads, width)]
    if normalize:
        inputs += [den, delta]
        specs += [pl.BlockSpec((None, q.shape[1], None), lambda h, c, s, b: (b, 0, h))] * 2
    given = final is not None
    if given:
        inputs += list(final)
        spec = segment_spec if final[0].ndim == 5 else state_spec
        specs += [spec(final[0].shape, width), spec(final[1].shape)]
    if per_chunk:
        initial = ((batch, heads, features, values), (batch, heads, features))
        out_specs = [sequence_spec(shapes[0], width), sequence_spec(shapes[1])]
        out_specs += [state_spec(initial[0], width), state_spec(initial[1])]
        out_shape = [out_struct(shapes[0], q.dtype, *inputs), out_struct(shapes[1], f32, *inputs)]
        out_shape += [out_struct(s, f32, *inputs) for s in initial]
        programs = split.segments
    else:
        vectors, matrices = (batch, heads, split.segments, features), (batch, heads, split.segments, features, values)
        later = pl.BlockSpec((None, None, None, features), lambda h, c, s, b: (b, h, s + 1, 0))
        matrix = pl.BlockSpec((None, None, None, features, width), lambda h, c, s, b: (b, h, s + 1, 0, c))
        out_specs = [later, matrix, later]
        out_shape = [out_struct(s, f32, *inputs) for s in (vectors, matrices, vectors)]
        programs = split.segments - 1
    return pl.pallas_call(
        functools.partial(
            _dstates_kernel,
            split=split,
            normalize=normalize,
            per_chunk=per_chunk,
            given=given,
            bound=bound,
            given_rows=rows.given,
        ),
        grid=(heads, values // width, programs, batch),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="gla_dstates",
    )(*inputs)


def chunk_gradients(
    q,
    k,
    v,
    log_g,
    do,
    den,
    delta,
    states,
    dstates,
    *,
    split: Split,
    normalize: bool,
    bound: float | None,
    sizes: BlockSizes,
    rows: Rows,
) -> Any:
    """(dq, dk, dv, dlog_g) [B, T, H, .] for every query head, from the scaled (S~, z~) and (dS~, dz~) of every chunk. den and
    delta are [B, T, H] float32, read only when ``normalize``."""
    batch, length, heads, _ = q.shape
    values = v.shape[-1]
    tokens = (q, k, v, log_g, do)
    vectors = (den, delta) if normalize else ()
    inputs = [*rows.inputs(), *tokens, *vectors, *states, *dstates]
    specs = [*rows.specs(), *(token_spec(x, heads) for x in tokens)]
    specs += [pl.BlockSpec((None, length, None), lambda h, c, s, b: (b, 0, h)) for _ in vectors]
    specs += [segment_spec(x.shape) for x in (*states, *dstates)]
    shared_v, shared_g = v.shape[2] == heads, log_g.shape[2] == heads
    # Per-head parts of grouped heads stay float32 until XLA has summed them.
    outs = [
        out_struct(q.shape, q.dtype, *inputs),
        out_struct(q.shape, k.dtype, *inputs),
        out_struct((batch, length, heads, values), v.dtype if shared_v else f32, *inputs),
        out_struct(q.shape, log_g.dtype if shared_g else f32, *inputs),
    ]
    return pl.pallas_call(
        functools.partial(_chunk_vjp_kernel, split=split, normalize=normalize, bound=bound, given_rows=rows.given),
        grid=(heads, 1, split.count, batch),
        in_specs=specs,
        out_specs=[token_spec(x, heads) for x in outs],
        out_shape=outs,
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="gla_chunk_vjp",
    )(*inputs)


def _group_sum(x: jax.Array, heads: int, dtype: Any) -> jax.Array:
    """Sum over the query heads of a group, in float32, then cast."""
    if x.shape[2] == heads:
        return x.astype(dtype)
    grouped = x.reshape(*x.shape[:2], heads, x.shape[2] // heads, x.shape[3])
    return jnp.sum(grouped, axis=3, dtype=f32).astype(dtype)


def backward(
    residuals,
    do,
    dstate,
    *,
    normalize: bool,
    lower_bound: float | None,
    split: Split | None = None,
    gradients: Callable[..., Any] | None = None,
) -> Any:
    """See ``kernels_pallas.contract``. ``split``: how the forward cut the sequence, if not as ``triton`` does;
    ``gradients``: instead of :func:`chunk_gradients`."""
    q, k, v, log_g, initial_state, o, den, segment_state, (lengths, numbers) = residuals
    heads, rows = q.shape[2], Rows(None, numbers)
    if lengths is not None:
        # One pass over v, beside the many over everything else, spares the kernels a mask.
        (v,) = without_padding(valid_tokens(lengths, q.shape[1]), v)
    if split is None:
        _, split = plan_forward(q, v, lower_bound)
    shapes = _chunk_shapes(q, v, split)

    def sizes(kernel: str) -> BlockSizes:
        own = block_sizes.lookup(kernel, q.dtype, q.shape[-1], v.shape[-1])
        return dataclasses.replace(own, chunk=split.chunk, block_v=min(own.block_v, v.shape[-1]))

    # The dn of delta is rounded as the kernels round theirs, and o is float32 where gates are strong or tokens few
    # (SHORT in triton.py): dA of a token with itself is dn v + delta, and there the two nearly cancel.
    delta = None
    if normalize:
        dn = do.astype(f32) * (1.0 / den)[..., None]
        if do.dtype == jnp.bfloat16:
            dn = lax.reduce_precision(dn, exponent_bits=8, mantissa_bits=7)
        delta = -jnp.sum(dn * o.astype(f32), axis=-1)
    # o, which only delta reads, is done with before the states of all chunks are formed: they may take its memory.
    if delta is not None:
        k, v, log_g, delta = lax.optimization_barrier((k, v, log_g, delta))
    given = segment_state
    if given is None and initial_state is not None:
        given = (initial_state[0][:, :, None], initial_state[1][:, :, None])
    states = _states(k, v, log_g, given, heads, split, sizes("states"), shapes, lower_bound, rows)

    final: Any = dstate
    options = {"split": split, "shapes": shapes, "normalize": normalize, "bound": lower_bound, "rows": rows}
    sweep = functools.partial(_dstates, q, log_g, do, den, delta, sizes=sizes("segment_dstate"), **options)
    if split.segments > 1:
        final = combine(*sweep(None, per_chunk=False), initial=dstate, reverse=True)
    dS, dz, dS0, dz0 = sweep(final, per_chunk=True)
    run = gradients or functools.partial(chunk_gradients, sizes=sizes("backward"))
    options = {"split": split, "normalize": normalize, "bound": lower_bound, "rows": rows}
    dq, dk, dv, dlog_g = run(q, k, v, log_g, do, den, delta, states, (dS, dz), **options)
    dv = _group_sum(dv, v.shape[2], v.dtype)
    dlog_g = _group_sum(dlog_g, log_g.shape[2], log_g.dtype)
    return dq, dk, dv, dlog_g, (dS0, dz0) if initial_state is not None else (None, None)
