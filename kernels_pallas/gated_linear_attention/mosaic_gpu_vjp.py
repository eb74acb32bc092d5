"""Backward of gated linear attention for NVIDIA Hopper GPUs.

The states and their cotangents before every chunk come from ``triton_vjp``'s two sweeps; the gradients of a chunk, which is most of the
work, from a Mosaic GPU kernel: one program for each chunk and head, one warpgroup for 64 features (and as many value columns), every
product a ``wgmma`` on tiles in shared memory. With S~, z~ = 2^r (S, z) before the chunk, dS~, dz~ = 2^r (dS, dz) after it, dn = do / den,
delta = -dn.o and L the lower triangle of ones:

    A  = L q^ k^T                    dA = L (dn v^T + delta)              dv = A^T dn + k^ dS~
    R  = dA k^ + dn S~^T + delta z~  E  = dA^T q^                         F  = v dS~^T + dz~
    dq = 2^(b-r) R                   dk = 2^(r-b) (E + F)
    dlog_g = L^T (q^ R - k^ E) + (L - 1) k^ F + sum_v S~ dS~ + z~ dz~

q^ R is q dq with the very operands of dA k^ and dA^T q^: the terms of a token with itself, which dominate at strong gates and belong to
no gate, cancel to float32. What is summed over tokens for the gates enters its product as two bfloat16 parts (2^-17).

Packed documents: L for A and dA lies within documents, and rows and terms are left out as in ``triton_vjp``.
"""

# Pallas for Mosaic GPU as of jax 0.11 and newer: pyright may see an older one, with other signatures (the next line).
# And a variant of a kernel has None for the references that it does without, which a flag beside them tells (the line after it).
# pyright: reportCallIssue=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.chunking import Split
from kernels_pallas.common import LOG2E, fold_vmap
from kernels_pallas.gated_linear_attention import mosaic_gpu, triton, triton_vjp
from kernels_pallas.gated_linear_attention.mosaic_gpu_tiles import (
    CHUNK,
    WIDTH,
    ChunkDocuments,
    bf16,
    f32,
    indices,
    launch,
    over_columns,
    over_rows,
    padded,
    passing,
    products,
    tiles,
    to_whole_chunks,
    transposed,
)
from kernels_pallas.gated_linear_attention.triton_tiles import Rows


def _constants() -> jax.Array:
    """[2, C, C]: L and ones."""
    i = np.arange(CHUNK)
    return jnp.asarray(np.stack([i[:, None] >= i, np.ones((CHUNK, CHUNK))]), bf16)


def _kernel(*refs, blocks: int, groups: tuple[int, int], normalize: bool, bound: float | None, documents: bool):
    """``blocks`` of 64 features, of 64 value columns and of a warpgroup; ``groups`` as in the forward kernel; ``documents``: the
    first input is the numbers of packed rows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    numbers_ref, *refs = refs if documents else (None, *refs)
    c_ref, q_ref, k_ref, v_ref, g_ref, do_ref, S_ref, z_ref, dS_ref, dz_ref = refs[:10]
    inverse_ref, delta_ref = refs[10:12] if normalize else (None, None)
    rest = refs[12:] if normalize else refs[10:]
    dq_ref, dk_ref, dv_ref, dg_ref = rest[:4]
    c_s, q_s, k_s, v_s, g_s, do_s, S_s, dS_s, A_s, dA_s, x_s, y_s, constants, tokens, values, states, formed, scored = (
        rest[4:]
    )

    tile = plgpu.Layout.WGMMA
    along, across = tile.reduce(1), tile.reduce(0)
    h, i, b, wg = (lax.axis_index(name) for name in ("head", "chunk", "batch", "warpgroup"))
    rows = pl.ds(i * CHUNK, CHUNK)
    lower, ones = c_s.at[0], c_s.at[1]
    shape = (CHUNK, WIDTH)

    def columns(p: int) -> Any:
        return pl.ds(WIDTH * p, WIDTH)

    def product(*pairs: Any) -> jax.Array:
        return products((shape, *pairs))[0]

    def read(ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=tile).astype(f32)

    packed = None if numbers_ref is None else ChunkDocuments(numbers_ref, b, i * CHUNK)

    def masked(x: jax.Array) -> jax.Array:
        row, column = indices(*x.shape)
        keep = row >= column
        if packed is not None:
            keep &= column >= over_columns(packed.first())
        return jnp.where(keep, x, 0.0).astype(bf16)

    def entered(x: jax.Array) -> jax.Array:
        """x in the rows that the state before the chunk reaches."""
        return x if packed is None else jnp.where(over_columns(packed.first()) < 0, x, 0.0)

    def leaving(x: jax.Array) -> jax.Array:
        """x in the rows that reach the state after the chunk."""
        return x if packed is None else jnp.where(indices(*x.shape)[0] >= packed.last(), x, 0.0)

    def vector(ref: Any, p: int) -> jax.Array:
        """A vector of the features, in every row."""
        return over_rows(plgpu.load(ref.at[b, h, i, columns(p)], layout=across, optimized=False))

    def load() -> None:
        gates, heads = lax.div(h, jnp.int32(groups[1])), lax.div(h, jnp.int32(groups[0]))
        plgpu.copy_gmem_to_smem(c_ref, c_s, constants)
        for p in range(blocks):
            plgpu.copy_gmem_to_smem(g_ref.at[b, rows, gates, columns(p)], g_s.at[p], tokens)
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h, columns(p)], q_s.at[p], tokens)
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, h, columns(p)], k_s.at[p], tokens)
        for p in range(blocks):
            plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h, columns(p)], do_s.at[p], values)
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, heads, columns(p)], v_s.at[p], values)
        for p in range(blocks):
            for c in range(blocks):
                plgpu.copy_gmem_to_smem(dS_ref.at[b, h, i, columns(p), columns(c)], dS_s.at[p, c], states)
                plgpu.copy_gmem_to_smem(S_ref.at[b, h, i, columns(p), columns(c)], S_s.at[p, c], states)

    def write(ref: Any, staged: Any, x: jax.Array, p: int) -> None:
        staged[...] = x.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, ref.at[b, rows, h, columns(p)])

    def split(high: Any, low: Any, x: jax.Array) -> None:
        """x as the sum of two bfloat16 tiles."""
        rounded = x.astype(bf16)
        high[...] = rounded
        low[...] = (x - rounded.astype(f32)).astype(bf16)

    def block(p: int) -> None:
        if p == 0:
            load()
        q, k, g, x_own, y_own = q_s.at[p], k_s.at[p], g_s.at[p], x_s.at[p], y_s.at[p]
        plgpu.barrier_wait(constants)
        plgpu.barrier_wait(tokens)
        if bound is not None:
            x_own[...] = jnp.maximum(plgpu.load(g, layout=tile), jnp.asarray(bound, bf16))
            plgpu.commit_smem()
            g = x_own
        x, sums = products((shape, (lower, g)), (shape, (ones, g)))
        x = (x - 0.5 * sums) * LOG2E
        q[...] = (read(q) * jnp.exp2(x)).astype(bf16)
        k[...] = (read(k) * jnp.exp2(-x)).astype(bf16)
        plgpu.barrier_wait(values)
        dn = do_s.at[p]
        if normalize:
            inverse = plgpu.load(inverse_ref.at[b, h, rows], layout=along, optimized=False)
            dn[...] = (read(dn) * over_columns(inverse)).astype(bf16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(formed)
        plgpu.barrier_wait(formed)

        delta = plgpu.load(delta_ref.at[b, h, rows], layout=along, optimized=False) if normalize else None
        scores = []
        if p == 0:
            pairs = ((q_s.at[c], transposed(k_s.at[c])) for c in range(blocks))
            scores.append((A_s, None, (shape, *pairs)))
        if p == blocks - 1:
            pairs = ((do_s.at[c], transposed(v_s.at[c])) for c in range(blocks))
            scores.append((dA_s, delta, (shape, *pairs)))
        for (ref, added, _), score in zip(scores, products(*(pairs for _, _, pairs in scores)), strict=True):
            ref[...] = masked(score if added is None else score + over_columns(added))
        plgpu.commit_smem()
        plgpu.barrier_arrive(scored)
        plgpu.barrier_wait(scored)
        plgpu.barrier_wait(states)

        # Each sum as what comes from within the chunk, and what by the states: apart where not all rows have the latter.
        dv = ((transposed(A_s), dn),), tuple((k_s.at[c], dS_s.at[c, p]) for c in range(blocks))
        R = ((dA_s, k),), tuple((do_s.at[c], transposed(S_s.at[p, c])) for c in range(blocks))
        if documents:
            dv, dv_states, R, R_states = products(*((shape, *pairs) for pairs in (*dv, *R)))
            dv += leaving(dv_states)
        else:
            dv, R = products(*((shape, *inside, *states) for inside, states in (dv, R)))
            R_states = 0.0
        if normalize:
            R_states += over_columns(delta) * vector(z_ref, p)
        R += entered(R_states)
        write(dv_ref, y_own, dv, p)

        # S~ is done with, and with one block dn: their tiles take the sum over value columns of S~ dS~, here one of tiles.
        weights = sum(
            (read(S_s.at[p, c]) * read(dS_s.at[p, c]) for c in range(1, blocks)),
            read(S_s.at[p, 0]) * read(dS_s.at[p, 0]),
        )
        stays = 1.0 if packed is None else passing(packed.last())
        weighted = (S_s.at[p, 0], S_s.at[p, 1] if blocks > 1 else dn)
        split(*weighted, weights * stays)
        E, F = products(
            (shape, (transposed(dA_s), q)), (shape, *((v_s.at[c], transposed(dS_s.at[p, c])) for c in range(blocks)))
        )
        w = read(q) * R - read(k) * E
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        write(dq_ref, y_own, jnp.exp2(x) * R, p)
        # q^ and the operand of the exponents are done with: their tiles take what is summed over tokens.
        split(q, x_own, w)
        plgpu.commit_smem()
        dz = vector(dz_ref, p)
        F = leaving(F + dz)
        dg = product(*((ones, transposed(ref)) for ref in weighted), (transposed(lower), q), (transposed(lower), x_own))
        dg += vector(z_ref, p) * dz * stays
        u = read(k) * F
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        write(dk_ref, y_own, jnp.exp2(-x) * (E + F), p)
        split(q, x_own, u)
        plgpu.commit_smem()
        dg += product((lower, q), (lower, x_own)) - u
        if bound is not None:
            dg = jnp.where(read(g_s.at[p]) < bound, 0.0, dg)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        write(dg_ref, y_own, dg, p)
        plgpu.wait_smem_to_gmem(0)

    for p in range(blocks):
        pl.when(wg == p)(functools.partial(block, p))


def _launch(
    q, k, v, log_g, do, inverse, delta, states, dstates, numbers, *, split: Split, normalize: bool, bound: float | None
):
    """(dq, dk, dv, dlog_g) [B, T, H, .] bfloat16, of every query head. inverse = 1 / den and delta [B, H, n C] float32,
    zero beyond the sequence; None unless normalize. numbers [B, n C] int32 or None."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    heads, width = q.shape[2:]
    blocks = width // WIDTH
    inputs = [
        *(() if numbers is None else (numbers,)),
        _constants(),
        q,
        k,
        v,
        log_g,
        do,
        *states,
        *dstates,
        *((inverse, delta) if normalize else ()),
    ]
    scratch = [
        tiles(2),
        *(tiles(blocks),) * 5,
        *(tiles(blocks, blocks),) * 2,
        tiles(),
        tiles(),
        tiles(blocks),
        tiles(blocks),
    ]
    arrivals = (1, 3 * blocks, 2 * blocks, 2 * blocks * blocks, blocks, blocks)
    body = functools.partial(
        _kernel,
        blocks=blocks,
        groups=(heads // v.shape[2], heads // log_g.shape[2]),
        normalize=normalize,
        bound=bound,
        documents=numbers is not None,
    )
    scratch += [plgpu.Barrier(num_arrivals=n) for n in arrivals]
    grid = {"head": heads, "chunk": split.count, "batch": q.shape[0]}
    return launch(body, inputs, [(q.shape, bf16)] * 4, scratch, grid=grid, warpgroups=blocks)


def chunk_gradients(
    q, k, v, log_g, do, den, delta, states, dstates, *, split: Split, normalize: bool, bound: float | None, rows: Rows
) -> Any:
    """As ``triton_vjp.chunk_gradients``, in bfloat16. Gates in float32 are bounded here, and their zero gradient below the
    bound is left to the caller: rounded, they would not tell on which side they were."""
    length = q.shape[1]
    if log_g.dtype != bf16:
        log_g, bound = (log_g if bound is None else jnp.maximum(log_g, bound)).astype(bf16), None
    inverse = None
    if normalize:
        rest = split.count * CHUNK - length
        inverse, delta = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, rest))) for x in (1.0 / den, delta))
    run = functools.partial(_launch, split=split, normalize=normalize, bound=bound)
    numbers = None if rows.numbers is None else to_whole_chunks(rows.numbers, 1)
    vectors = (inverse, delta if normalize else None)
    grads = fold_vmap(run)(*padded(q, k, v, log_g, do), *vectors, states, dstates, numbers)
    return tuple(x[:, :length] for x in grads)


def backward(residuals, do, dstate, *, normalize: bool, lower_bound: float | None) -> Any:
    """See ``kernels_pallas.contract``."""
    q, _, v, log_g = residuals[:4]
    if q.shape[1] <= triton.SHORT:  # as in forward
        return triton_vjp.backward(residuals, do, dstate, normalize=normalize, lower_bound=lower_bound)
    square = q.shape[-1] == v.shape[-1]
    dq, dk, dv, dlog_g, dstate = triton_vjp.backward(
        residuals,
        do,
        dstate,
        normalize=normalize,
        lower_bound=lower_bound,
        split=mosaic_gpu.plan(q, v)[1],
        gradients=chunk_gradients if square else None,
    )
    if square and log_g.dtype != bf16 and lower_bound is not None:
        dlog_g = jnp.where(log_g < lower_bound, 0, dlog_g)
    return dq, dk, dv, dlog_g, dstate
