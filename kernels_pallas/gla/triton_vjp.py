"""Backward of gated linear attention for NVIDIA GPUs, through Pallas' Triton lowering.

Two light sweeps write what couples the chunks, then every chunk is one independent program:

* ``states`` (B0): forward sweep, writes S~ = e S (rounded as the forward did) and z~ = e z before every chunk;
* ``dstates``: reverse sweep over q, gates, do, o, den, writes dS~ = e dS and dz~ = e dz after every chunk;
* ``chunk_vjp`` (B1): recomputes A and den, writes dq, dk, dv, dlog_g of the chunk in one go, with no state in registers.

With few heads both sweeps run by segments: the forward saved the state before every segment; ``dstates`` first sums up each segment, and
``combine`` runs the same rule backwards. Notation of the forward (e = 2^r, r = b_C / 2, x = b - r), with P = dn v^T, R = dn S~^T:

    dn = do / den     delta = -(sum_j A P + q^ R) / den     dA = where(i >= j, P + delta, 0)
    dq = 2^x (dA k^ + R + delta z~)        dk* = 2^-x (v dS~^T + dz~)        dk = 2^-x dA^T q^ + dk*        dv = A^T dn + k^ dS~
    dS_prev = e (dS~ + q^T dn)             dz_prev = e (dz~ + sum_i delta q^)
    dlog_g_t = sum_{i>=t} (q dq - 2^-x k dA^T q^)_i + sum_{i<t} (k dk*)_i + sum_v S~ dS~ + z~ dz~

delta is formed from the same rounded A, q^, dn and the same P and R that enter dA and dq, so what must cancel in a saturated chunk does.
The anchor of dlog_g holds at every chunk: its error does not grow with the length of the sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import interpret_mode, out_struct
from kernels_pallas.gla import block_sizes
from kernels_pallas.gla.block_sizes import BlockSizes, Split
from kernels_pallas.gla.triton import (
    _segment_state_kernel,
    chunks_of,
    combine,
    denominator,
    exponents,
    half_total,
    load_gates,
    plan_forward,
    read_state,
    scaled,
    scores,
    write_state,
    write_totals,
    zero_state,
    zero_totals,
)
from kernels_pallas.gla.triton_tiles import (
    causal,
    centred,
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
    token_spec,
)


def _dstates_kernel(*refs, split: Split, normalize: bool, per_chunk: bool, given: bool):
    """Reverse sweep of one segment. ``per_chunk``: writes every dS~, dz~, and the cotangent of the sequence's initial state."""
    refs = iter(refs)
    q_ref, g_ref, do_ref = (next(refs) for _ in range(3))
    den_ref, delta_ref = (next(refs), next(refs)) if normalize else (None, None)
    final = tuple(next(refs) for _ in range(2)) if given else None
    L_ref = None if per_chunk else next(refs)
    S_ref, z_ref = next(refs), next(refs)
    first = (next(refs), next(refs)) if per_chunk else None

    segment = pl.program_id(2) + (0 if per_chunk else 1)
    dtype = q_ref.dtype
    chunk, limit = split.chunk, split.length if split.ragged else None
    matrix = centred(chunk, dtype)
    blocks = feature_blocks(q_ref.shape[1])
    count = chunks_of(split, segment)

    def step(i, carry):
        state, L = carry
        index = segment * split.per_segment + count - 1 - i
        start = index * chunk
        dn = load_rows(do_ref, start, chunk, limit)
        if normalize:
            delta = lanes(load_vector(delta_ref, start, chunk, limit))
            inverse = 1.0 / load_vector(den_ref, start, chunk, limit)
            dn = round_to(dn.astype(f32) * inverse[:, None], dtype)
        qs, es, Ls = [], [], []
        for block, before in zip(blocks, L, strict=True):
            q = load_rows(q_ref, start, chunk, limit, block)
            g = load_gates(g_ref, start, chunk, limit, dtype, block)
            r = half_total(g)
            qs.append(round_to(q.astype(f32) * exp2(exponents(g, matrix)), dtype))
            es.append(exp2(r))
            Ls.append(before + 2.0 * r)
        S, z = scaled(state, tuple(es))
        if per_chunk:
            write_state(S_ref, z_ref, (S, z), index)
        S = tuple(x + dot(q, dn, ta=True) for x, q in zip(S, qs, strict=True))
        if normalize:
            z = tuple(x + dot_exact(q, delta, ta=True) for x, q in zip(z, qs, strict=True))
        return scaled((S, z), tuple(es)), tuple(Ls)

    features, values = S_ref.shape[-2:]
    state = read_state(*final) if final is not None else zero_state(values, features)
    state, L = lax.fori_loop(0, count, step, (state, zero_totals(features)))
    if not per_chunk:
        write_state(S_ref, z_ref, state)
        write_totals(L_ref, L)
        return

    @pl.when(segment == 0)
    def _():
        write_state(*first, state)


def _chunk_vjp_kernel(*refs, split: Split, normalize: bool):
    q_ref, k_ref, v_ref, g_ref, do_ref, S_ref, z_ref, dS_ref, dz_ref, dq_ref, dk_ref, dv_ref, dg_ref = refs
    dtype = q_ref.dtype
    chunk, limit = split.chunk, split.length if split.ragged else None
    start = pl.program_id(2) * chunk
    matrix, mask = centred(chunk, dtype), causal(chunk)
    blocks = feature_blocks(q_ref.shape[1])

    v = load_rows(v_ref, start, chunk, limit)
    do = load_rows(do_ref, start, chunk, limit)
    xs, qs, ks = [], [], []
    for block in blocks:
        x = exponents(load_gates(g_ref, start, chunk, limit, dtype, block), matrix)
        q = load_rows(q_ref, start, chunk, limit, block)
        k = load_rows(k_ref, start, chunk, limit, block)
        xs.append(x)
        qs.append(round_to(q.astype(f32) * exp2(x), dtype))
        ks.append(round_to(k.astype(f32) * exp2(-x), dtype))
    A = scores(tuple(qs), tuple(ks), mask)
    z = tuple(z_ref[pl.ds(at, n)] for at, n in blocks)
    dn = do
    if normalize:
        inverse = 1.0 / denominator(A, tuple(qs), tuple(lanes(x) for x in z))
        dn = round_to(do.astype(f32) * inverse[:, None], dtype)
    P = dot(dn, v, tb=True)
    R = [dot(dn, S_ref[pl.ds(at, n), :], tb=True) for at, n in blocks]
    if normalize:
        total = jnp.sum(A.astype(f32) * P, axis=1)
        for q, r in zip(qs, R, strict=True):
            total += jnp.sum(q.astype(f32) * r, axis=1)
        delta = -total * inverse
        P += delta[:, None]
    dA = round_to(jnp.where(mask, P, 0.0), dtype)
    # One output after the other, each stored at once: few tiles live at a time.
    dv = dot(A, dn, ta=True)
    for (at, n), k_hat in zip(blocks, ks, strict=True):
        dv += dot(k_hat, dS_ref[pl.ds(at, n), :])
    store_rows(dv_ref, start, dv, limit)

    upper = (iota((chunk, chunk), 0) <= iota((chunk, chunk), 1)).astype(dtype)
    before = (iota((chunk, chunk), 0) > iota((chunk, chunk), 1)).astype(dtype)
    for block, x, q_hat, k_hat, r, z_hat in zip(blocks, xs, qs, ks, R, z, strict=True):
        at, n = block
        r += dot(dA, k_hat)
        if normalize:
            r += delta[:, None] * z_hat[None, :]
        dq = exp2(x) * r
        store_rows(dq_ref, start, dq, limit, block)
        w = load_rows(q_ref, start, chunk, limit, block).astype(f32) * dq
        shrink = exp2(-x)
        k = load_rows(k_ref, start, chunk, limit, block).astype(f32)
        S, dS, dz = S_ref[pl.ds(at, n), :], dS_ref[pl.ds(at, n), :], dz_ref[pl.ds(at, n)]
        local = shrink * dot(dA, q_hat, ta=True)
        dg = dot_exact(upper, w - k * local)
        later = shrink * (dot(v, dS, tb=True) + dz[None, :])
        store_rows(dk_ref, start, local + later, limit, block)
        anchor = jnp.sum(S.astype(f32) * dS.astype(f32), axis=1) + z_hat * dz
        store_rows(dg_ref, start, dg + dot_exact(before, k * later) + anchor[None, :], limit, block)


def _chunk_shapes(q, v, split: Split) -> tuple[tuple[int, ...], tuple[int, ...]]:
    batch, _, heads, features = q.shape
    return (batch, heads, split.count, features, v.shape[-1]), (batch, heads, split.count, features)


def _states(k, v, log_g, given, heads: int, split: Split, sizes: BlockSizes, shapes):
    """B0: S~ [B, H, n, K, V] in k's dtype and z~ [B, H, n, K] float32 before every chunk; ``given`` (S, z) before every segment."""
    batch, values, width = k.shape[0], v.shape[-1], sizes.block_v
    inputs, specs = [k, v, log_g], [token_spec(k, heads), token_spec(v, heads, width), token_spec(log_g, heads)]
    if given is not None:
        inputs += list(given)
        specs += [segment_spec(given[0].shape, width), segment_spec(given[1].shape)]
    return pl.pallas_call(
        functools.partial(_segment_state_kernel, split=split, dtype=k.dtype, per_chunk=True),
        grid=(heads, values // width, split.segments, batch),
        in_specs=specs,
        out_specs=[sequence_spec(shapes[0], width), sequence_spec(shapes[1])],
        out_shape=[out_struct(shapes[0], k.dtype, *inputs), out_struct(shapes[1], f32, *inputs)],
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="gla_states",
    )(*inputs)


def _dstates(
    q, log_g, do, den, delta, final, split: Split, sizes: BlockSizes, shapes, normalize: bool, per_chunk: bool
):
    """The reverse sweep. per_chunk: (dS~, dz~ after every chunk, dS0, dz0); else (L, dS, dz) of every segment but the first."""
    batch, _, heads, features = q.shape
    values, width = do.shape[-1], sizes.block_v
    inputs, specs = [q, log_g, do], [token_spec(q, heads), token_spec(log_g, heads), token_spec(do, heads, width)]
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
        functools.partial(_dstates_kernel, split=split, normalize=normalize, per_chunk=per_chunk, given=given),
        grid=(heads, values // width, programs, batch),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="gla_dstates",
    )(*inputs)


def _chunk_vjp(q, k, v, log_g, do, states, dstates, split: Split, sizes: BlockSizes, normalize: bool):
    batch, length, heads, features = q.shape
    values = v.shape[-1]
    tokens = (q, k, v, log_g, do)
    inputs = [*tokens, *states, *dstates]
    specs = [token_spec(x, heads) for x in tokens] + [segment_spec(x.shape) for x in (*states, *dstates)]
    shared_v, shared_g = v.shape[2] == heads, log_g.shape[2] == heads
    # Per-head parts of grouped heads stay float32 until XLA has summed them.
    outs = [
        out_struct(q.shape, q.dtype, *inputs),
        out_struct(q.shape, k.dtype, *inputs),
        out_struct((batch, length, heads, values), v.dtype if shared_v else f32, *inputs),
        out_struct(q.shape, log_g.dtype if shared_g else f32, *inputs),
    ]
    return pl.pallas_call(
        functools.partial(_chunk_vjp_kernel, split=split, normalize=normalize),
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


def backward(residuals, do, dstate, *, normalize: bool, lower_bound: float | None) -> Any:
    """See ``kernels_pallas.gla`` for the signature."""
    q, k, v, log_g, initial_state, o, den, segment_state = residuals
    heads = q.shape[2]
    forward_sizes, split = plan_forward(q, v, lower_bound)
    shapes = _chunk_shapes(q, v, split)

    def sizes(kernel: str) -> BlockSizes:
        own = block_sizes.lookup(kernel, q.dtype, q.shape[-1], v.shape[-1])
        return dataclasses.replace(own, chunk=forward_sizes.chunk, block_v=min(own.block_v, v.shape[-1]))

    given = segment_state
    if given is None and initial_state is not None:
        given = (initial_state[0][:, :, None], initial_state[1][:, :, None])
    states = _states(k, v, log_g, given, heads, split, sizes("states"), shapes)

    # From the stored o: it only reaches other chunks. Where dA is formed, delta is recomputed from what is there (see chunk_vjp).
    delta = -jnp.sum(do.astype(f32) * o.astype(f32), axis=-1) / den if normalize else None
    final: Any = dstate
    own, rest = sizes("segment_dstate"), dict(split=split, shapes=shapes, normalize=normalize)
    sweep = functools.partial(_dstates, q, log_g, do, den, delta, sizes=own, **rest)
    if split.segments > 1:
        final = combine(*sweep(None, per_chunk=False), dstate, reverse=True)
    dS, dz, dS0, dz0 = sweep(final, per_chunk=True)
    dq, dk, dv, dlog_g = _chunk_vjp(q, k, v, log_g, do, states, (dS, dz), split, sizes("backward"), normalize)
    dv = _group_sum(dv, v.shape[2], v.dtype)
    dlog_g = _group_sum(dlog_g, log_g.shape[2], log_g.dtype)
    return dq, dk, dv, dlog_g, (dS0, dz0) if initial_state is not None else (None, None)
