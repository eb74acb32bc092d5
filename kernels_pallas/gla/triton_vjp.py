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
    State,
    _segment_state_kernel,
    chunks_of,
    combine,
    denominator,
    exponents,
    load_gates,
    plan_forward,
    read_state,
    scaled,
    scores,
    write_state,
    zero_state,
)
from kernels_pallas.gla.triton_tiles import (
    causal,
    centred,
    compiler_params,
    dot,
    exp2,
    f32,
    feature_blocks,
    iota,
    load_rows,
    load_vector,
    round_to,
    segment_spec,
    sequence_spec,
    state_spec,
    store_rows,
    token_spec,
)


def _dstates_kernel(*refs, split: Split, normalize: bool, per_chunk: bool, given: str):
    """Reverse sweep of one segment. ``per_chunk``: writes every dS~, dz~, and the cotangent of the sequence's initial state."""
    refs = iter(refs)
    q_ref, g_ref, do_ref = (next(refs) for _ in range(3))
    o_ref, den_ref = (next(refs), next(refs)) if normalize else (None, None)
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
        do = load_rows(do_ref, start, chunk, limit)
        inverse = delta = None
        if normalize:
            inverse = 1.0 / load_vector(den_ref, start, chunk, limit)
            o = load_rows(o_ref, start, chunk, limit)
            delta = -jnp.sum(do.astype(f32) * o.astype(f32), axis=1) * inverse
        es, Ls, dS, dz = [], [], [], []
        qs = []
        for block, before in zip(blocks, L, strict=True):
            q = load_rows(q_ref, start, chunk, limit, block)
            x, r = exponents(load_gates(g_ref, start, chunk, limit, dtype, block), matrix)
            qs.append(q.astype(f32) * exp2(x))
            es.append(exp2(r))
            Ls.append(before + 2.0 * r)
        S, z = scaled(state, tuple(es))
        if per_chunk:
            write_state(S_ref, z_ref, (S, z), values_first=True, index=index)
        for q, e, a, b in zip(qs, es, S, z, strict=True):
            if normalize:
                b += jnp.sum(q * delta[:, None], axis=0)
                # The division by den goes to q^: do stays a plain operand that needs no copy to be transposed.
                q = q * inverse[:, None]
            dS.append(e[None, :] * (a + dot(do, round_to(q, dtype), ta=True)))
            dz.append(e * b)
        return (tuple(dS), tuple(dz)), tuple(Ls)

    values, features = S_ref.shape[-2:]
    state = read_state(*final, values_first=given == "segment") if given else zero_state(values, features)
    zeros = tuple(jnp.zeros((n,), f32) for _, n in blocks)
    state, L = lax.fori_loop(0, count, step, (state, zeros))
    if not per_chunk:
        write_state(S_ref, z_ref, state, values_first=True)
        for (at, n), total in zip(blocks, L, strict=True):
            L_ref[pl.ds(at, n)] = total
        return

    @pl.when(segment == 0)
    def _():
        write_state(*first, state, values_first=False)


def _reverse_sum(upper: jax.Array, w: jax.Array) -> jax.Array:
    """upper @ w with a 0/1 matrix; float32 w as two bfloat16 parts (2^-17)."""
    if upper.dtype == f32:
        return dot(upper, w)
    high = round_to(w, upper.dtype)
    return dot(upper, high) + dot(upper, round_to(w - high.astype(f32), upper.dtype))


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
        x, _ = exponents(load_gates(g_ref, start, chunk, limit, dtype, block), matrix)
        q = load_rows(q_ref, start, chunk, limit, block)
        k = load_rows(k_ref, start, chunk, limit, block)
        xs.append(x)
        qs.append(round_to(q.astype(f32) * exp2(x), dtype))
        ks.append(round_to(k.astype(f32) * exp2(-x), dtype))
    A = scores(tuple(qs), tuple(ks), mask)
    z = tuple(z_ref[pl.ds(at, n)] for at, n in blocks)
    dn = do
    if normalize:
        inverse = 1.0 / denominator(A, tuple(qs), z)
        dn = round_to(do.astype(f32) * inverse[:, None], dtype)
    P = dot(dn, v, tb=True)
    R = [dot(dn, S_ref[:, pl.ds(at, n)]) for at, n in blocks]
    if normalize:
        total = jnp.sum(A.astype(f32) * P, axis=1)
        for q, r in zip(qs, R, strict=True):
            total += jnp.sum(q.astype(f32) * r, axis=1)
        delta = -total * inverse
        P += delta[:, None]
    dA = round_to(jnp.where(mask, P, 0.0), dtype)
    dv = dot(A, dn, ta=True)

    upper = (iota((chunk, chunk), 0) <= iota((chunk, chunk), 1)).astype(dtype)
    before = (iota((chunk, chunk), 0) > iota((chunk, chunk), 1)).astype(dtype)
    for block, x, q_hat, k_hat, r, z_hat in zip(blocks, xs, qs, ks, R, z, strict=True):
        at, n = block
        dS, dz = dS_ref[:, pl.ds(at, n)], dz_ref[pl.ds(at, n)]
        S = S_ref[:, pl.ds(at, n)]
        dv += dot(k_hat, dS, tb=True)
        grow, shrink = exp2(x), exp2(-x)
        r += dot(dA, k_hat)
        if normalize:
            r += delta[:, None] * z_hat[None, :]
        dq = grow * r
        local = shrink * dot(dA, q_hat, ta=True)
        later = shrink * (dot(v, dS) + dz[None, :])
        store_rows(dq_ref, start, dq, limit, block)
        store_rows(dk_ref, start, local + later, limit, block)
        q = load_rows(q_ref, start, chunk, limit, block).astype(f32)
        k = load_rows(k_ref, start, chunk, limit, block).astype(f32)
        anchor = jnp.sum(S.astype(f32) * dS.astype(f32), axis=0) + z_hat * dz
        dg = _reverse_sum(upper, q * dq - k * local) + _reverse_sum(before, k * later) + anchor[None, :]
        store_rows(dg_ref, start, dg, limit, block)
    store_rows(dv_ref, start, dv, limit)


def _chunk_shapes(q, v, split: Split) -> tuple[tuple[int, ...], tuple[int, ...]]:
    batch, _, heads, features = q.shape
    return (batch, heads, split.count, v.shape[-1], features), (batch, heads, split.count, features)


def _states(k, v, log_g, given, heads: int, split: Split, sizes: BlockSizes, shapes):
    """B0: S~ [B, H, n, V, K] in k's dtype and z~ [B, H, n, K] float32 before every chunk; ``given`` (S^T, z) before every segment."""
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


def _dstates(q, log_g, do, o, den, final, split: Split, sizes: BlockSizes, shapes, normalize: bool, per_chunk: bool):
    """The reverse sweep. per_chunk: (dS~, dz~ after every chunk, dS0, dz0); else (L, dS, dz) of every segment but the first."""
    batch, _, heads, features = q.shape
    values = do.shape[-1]
    # delta sums over all of V, so columns are not split over programs here.
    inputs, specs = [q, log_g, do], [token_spec(q, heads), token_spec(log_g, heads), token_spec(do, heads)]
    if normalize:
        inputs += [o, den]
        specs += [token_spec(o, heads), pl.BlockSpec((None, q.shape[1], None), lambda h, c, s, b: (b, 0, h))]
    given = ""
    if final is not None:
        inputs += list(final)
        given = "segment" if final[0].ndim == 5 else "sequence"
        spec = segment_spec if final[0].ndim == 5 else state_spec
        specs += [spec(final[0].shape), spec(final[1].shape)]
    if per_chunk:
        initial = ((batch, heads, features, values), (batch, heads, features))
        out_specs = [sequence_spec(shapes[0]), sequence_spec(shapes[1]), *(state_spec(s) for s in initial)]
        out_shape = [out_struct(shapes[0], q.dtype, *inputs), out_struct(shapes[1], f32, *inputs)]
        out_shape += [out_struct(s, f32, *inputs) for s in initial]
        programs = split.segments
    else:
        vectors, matrices = (batch, heads, split.segments, features), (batch, heads, split.segments, values, features)
        later = pl.BlockSpec((None, None, None, features), lambda h, c, s, b: (b, h, s + 1, 0))
        matrix = pl.BlockSpec((None, None, None, values, features), lambda h, c, s, b: (b, h, s + 1, 0, 0))
        out_specs = [later, matrix, later]
        out_shape = [out_struct(s, f32, *inputs) for s in (vectors, matrices, vectors)]
        programs = split.segments - 1
    return pl.pallas_call(
        functools.partial(_dstates_kernel, split=split, normalize=normalize, per_chunk=per_chunk, given=given),
        grid=(heads, 1, programs, batch),
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
        given = (jnp.swapaxes(initial_state[0], 2, 3)[:, :, None], initial_state[1][:, :, None])
    states = _states(k, v, log_g, given, heads, split, sizes("states"), shapes)

    final: Any = dstate
    sweep = functools.partial(_dstates, q, log_g, do, o, den, split=split, sizes=sizes("segment_dstate"), shapes=shapes)
    if split.segments > 1:
        final = combine(*sweep(None, normalize=normalize, per_chunk=False), dstate, reverse=True)
    dS, dz, dS0, dz0 = sweep(final, normalize=normalize, per_chunk=True)
    dq, dk, dv, dlog_g = _chunk_vjp(
        q, k, v, log_g, do, states, (dS, dz), split, sizes("backward"), normalize
    )
    dv = _group_sum(dv, v.shape[2], v.dtype)
    dlog_g = _group_sum(dlog_g, log_g.shape[2], log_g.dtype)
    return dq, dk, dv, dlog_g, (dS0, dz0) if initial_state is not None else (None, None)
