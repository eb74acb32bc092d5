"""LAWCAT attention from raw projections for NVIDIA Hopper GPUs, through Pallas' Mosaic GPU lowering.

``_features_kernel`` forms the Hedgehog features of q and of k, one warpgroup for each, in tiles of 64 rows; XLA forms the
gates, which query heads share; then ``gated_linear_attention/mosaic_gpu.py`` runs on them. One token takes the decoding
kernel of ``triton_decode.py``.

A convolution needs rows of x that other threads hold. Shared memory is swizzled for the tensor cores, so that rows cannot be read at an
offset of one; the tensor cores shift them instead: sum_j w_j (P_j X), P_j a matrix of ones on a diagonal, exact in bfloat16, and what
it needs of the tile before is a second, narrow product. u = that sum stays in registers as the left operand of u phi.
"""

# Pallas for Mosaic GPU as of jax 0.11 and newer: pyright may see an older one, with other signatures.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import LOG2E, fold_vmap, valid_tokens, without_padding
from kernels_pallas.gated_linear_attention import mosaic_gpu as gla
from kernels_pallas.gated_linear_attention.mosaic_gpu_tiles import (
    CHUNK,
    WIDTH,
    bf16,
    f32,
    indices,
    keep_rows,
    launch,
    operand,
    over_columns,
    over_rows,
    padded,
    products,
    to_whole_chunks,
)
from kernels_pallas.lawcat_attention import triton, xla

HALO = 16
"""Rows of the tile before that a program reads: the depth of one wgmma, more than the taps need."""

TILES = 16
"""Tiles that a program takes, so that it reads its head's parameters once for all of them."""

SLOTS = 2
"""Tiles of x in shared memory."""


def supports(
    q,
    k,
    v,
    gate_logits,
    conv_q,
    conv_k,
    phi,
    *,
    normalize: bool,
    gate_lower_bound: float | None,
    lengths: bool = False,
    segments: bool = False,
) -> str | None:
    """Why these kernels cannot run these arguments (the end of a sentence), or None."""
    options = {"normalize": normalize, "gate_lower_bound": gate_lower_bound, "lengths": lengths, "segments": segments}
    reason = triton.supports(q, k, v, gate_logits, conv_q, conv_k, phi, **options)
    if reason is not None:
        return reason
    width, half, taps = q.shape[-1], phi.shape[-1], conv_q.shape[1]
    if width not in (64, 128) or half not in (32, 64):
        return f"d must be 64 or 128 and f 32 or 64, got d = {width}, f = {half}"
    if taps > HALO + 1:
        return f"the convolutions may have up to {HALO + 1} taps, got {taps}"
    shaped = jax.ShapeDtypeStruct((*q.shape[:-1], 2 * half), q.dtype)
    return gla.supports(
        shaped, shaped, v, shaped, normalize=normalize, lower_bound=gate_lower_bound, differentiated=False
    )


def _features_kernel(
    *refs,
    tiles: int,
    count: int,
    taps: int,
    blocks: int,
    half: int,
    groups: int,
    has_lengths: bool,
    has_numbers: bool,
):
    """One warpgroup for q and one for k of a head. ``blocks`` of 64 channels; a program takes ``tiles`` of the ``count`` tiles;
    query head h reads head h // groups of k. Rows from each sequence's length on, if there are lengths, become zeros, and
    convolutions stay within documents, if there are numbers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lengths_ref, *refs = refs if has_lengths else (None, *refs)
    numbers_ref, *refs = refs if has_numbers else (None, *refs)
    phi_ref = refs[0]
    inputs = (refs[1:4], refs[4:7])
    outputs = refs[7:9]
    phi_s, w_s, x_s, halo_s, out_s, parameters, loaded = refs[9:]
    tile = plgpu.Layout.WGMMA
    h, group, b, wg = (lax.axis_index(name) for name in ("head", "tiles", "batch", "warpgroup"))
    first = group * tiles
    steps = jnp.minimum(tiles, count - first)
    # Shifts waited for at once: two blocks leave no registers for more than one.
    together = taps - 1 if blocks == 1 else 1

    def product(shape: tuple[int, int], *pairs: Any) -> jax.Array:
        return products((shape, *pairs))[0]

    def diagonal(columns: int, offset: int) -> jax.Array:
        """[C, columns] with ones where column = row + offset."""
        i, j = indices(CHUNK, columns)
        return jnp.where(j == i + offset, 1.0, 0.0).astype(bf16)

    def convolve(side: int) -> None:
        """q (side 0) or k."""
        x_ref, carry_ref, w_ref = inputs[side]
        own = lax.div(h, jnp.int32(groups)) if side else h

        def slot_of(i):
            return lax.rem(i, jnp.int32(SLOTS))

        def load(i):
            slot, barrier = slot_of(i), loaded.at[side * SLOTS + slot_of(i)]

            def copy(ref, start, rows, target):
                for p in range(blocks):
                    source = ref.at[b, pl.ds(start, rows), own, pl.ds(WIDTH * p, WIDTH)]
                    plgpu.copy_gmem_to_smem(source, target.at[side, slot, p], barrier)

            copy(x_ref, (first + i) * CHUNK, CHUNK, x_s)
            # As a product, in which the compiler sees that it is a multiple of a tile's rows.
            before = ((first + i) * (CHUNK // HALO) - 1) * HALO
            pl.when(first + i > 0)(lambda: copy(x_ref, before, HALO, halo_s))
            pl.when(first + i == 0)(lambda: copy(carry_ref, 0, HALO, halo_s))

        if side == 0:
            for p in range(blocks):
                plgpu.copy_gmem_to_smem(phi_ref.at[h, pl.ds(WIDTH * p, WIDTH)], phi_s.at[p], parameters)
        plgpu.copy_gmem_to_smem(w_ref.at[h], w_s.at[side], parameters)
        for i in range(SLOTS):
            pl.when(i < steps)(functools.partial(load, jnp.int32(i)))
        plgpu.barrier_wait(parameters)

        @pl.loop(0, steps)
        def _(i):
            slot, start = slot_of(i), (first + i) * CHUNK
            begins = None
            if numbers_ref is not None:  # where each row's document begins, as a row of the tile
                numbers = plgpu.load(numbers_ref.at[b, pl.ds(start, CHUNK)], layout=tile.reduce(1), optimized=False)
                # conv_state comes before the document of number 0.
                begins = over_columns(jnp.where(numbers == 0, -HALO, numbers - 1 - start))
            plgpu.barrier_wait(loaded.at[side * SLOTS + slot])
            valid = None if lengths_ref is None else lengths_ref[b] - start
            if valid is not None:  # the products that shift rows would spread what padding holds
                for p in range(blocks):
                    keep_rows(x_s.at[side, slot, p], 0, valid)

            def tap(t, p):
                return over_rows(plgpu.load(w_s.at[side, t, pl.ds(WIDTH * p, WIDTH)], layout=tile.reduce(0)))

            def shifted(t, p):
                """P_t X: row r takes row r - (W - 1 - t), from the tile before where that is negative."""
                back = taps - 1 - t
                here = diagonal(CHUNK, -back)
                before = diagonal(HALO, HALO - back)
                return (CHUNK, WIDTH), (before, halo_s.at[side, slot, p]), (here, x_s.at[side, slot, p])

            us = []
            for p in range(blocks):
                u = plgpu.load(x_s.at[side, slot, p], layout=tile).astype(f32) * tap(taps - 1, p)
                for start in range(0, taps - 1, together):
                    which = range(start, min(start + together, taps - 1))
                    for t, x in zip(which, products(*(shifted(t, p) for t in which)), strict=True):
                        if begins is not None:
                            x = jnp.where(indices(CHUNK, WIDTH)[0] - (taps - 1 - t) >= begins, x, 0.0)
                        u += x * tap(t, p)
                us.append(u.astype(bf16))

            s = product((CHUNK, half), *((u, phi_s.at[p]) for p, u in enumerate(us)))
            s = s * LOG2E
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged = [out_s.at[side, n] for n in range(2)]
            for ref, x in zip(staged, (s, -s), strict=True):
                e = jnp.exp2(x - over_columns(jnp.max(x, axis=1), half))
                inverse = over_columns(1.0 / jnp.sum(e, axis=1), half)
                e = jnp.maximum(e * inverse, xla.FEATURE_FLOOR)
                if valid is not None:
                    e = jnp.where(indices(CHUNK, half)[0] < valid, e, 0.0)
                ref[...] = e.astype(bf16)
            plgpu.commit_smem()
            rows = pl.ds((first + i) * CHUNK, CHUNK)
            for n, ref in enumerate(staged):
                plgpu.copy_smem_to_gmem(ref, outputs[side].at[b, rows, h, pl.ds(n * half, half)])
            # Every thread has read its part of the tile.
            pl.when(i + SLOTS < steps)(functools.partial(load, i + SLOTS))

        plgpu.wait_smem_to_gmem(0)

    for side in range(2):
        pl.when(wg == side)(functools.partial(convolve, side))


def _carry(x: jax.Array, tail: jax.Array | None) -> jax.Array:
    """The 16 rows before the sequence: zeros, and conv_state's at the end."""
    if tail is None:
        return jnp.zeros((x.shape[0], HALO, *x.shape[2:]), x.dtype)
    return jnp.pad(tail.astype(x.dtype), ((0, 0), (HALO - tail.shape[1], 0), (0, 0), (0, 0)))


def features(
    q,
    k,
    gate_logits,
    conv_q,
    conv_k,
    phi,
    conv_state,
    *,
    gate_normalizer: float,
    gate_lower_bound: float | None,
    lengths,
    numbers,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See ``kernels_pallas.contract.LayerFeatures``: bfloat16, and float32 gates that are not bounded."""
    del gate_lower_bound
    numbers = None if numbers is None else to_whole_chunks(numbers, 1)
    q, k = fold_vmap(_launch, shared=(2, 3, 4))(q, k, conv_q, conv_k, phi, conv_state, lengths, numbers)
    valid = None if lengths is None else valid_tokens(lengths, q.shape[1])
    (log_g,) = without_padding(valid, xla.log_gate(gate_logits, gate_normalizer))
    return q, k, log_g


def _launch(q, k, conv_q, conv_k, phi, conv_state, lengths, numbers):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, heads, width = q.shape
    half, taps = phi.shape[-1], conv_q.shape[1]
    tails = (None, None) if conv_state is None else conv_state
    carries = [_carry(x, tail) for x, tail in zip((q, k), tails, strict=True)]
    q, k = padded(q, k)
    count, blocks = -(-length // CHUNK), width // WIDTH
    tiles = min(TILES, count)

    inputs = [*(x for x in (lengths, numbers) if x is not None), phi.astype(bf16)]
    for x, carry, w in zip((q, k), carries, (conv_q, conv_k), strict=True):
        inputs += [x, carry, w.astype(f32)]
    body = functools.partial(
        _features_kernel,
        tiles=tiles,
        count=count,
        taps=taps,
        blocks=blocks,
        half=half,
        groups=heads // k.shape[2],
        has_lengths=lengths is not None,
        has_numbers=numbers is not None,
    )
    scratch = [
        operand(blocks, WIDTH, half),
        plgpu.SMEM((2, taps, width), f32),
        operand(2, SLOTS, blocks, CHUNK, WIDTH),
        operand(2, SLOTS, blocks, HALO, WIDTH, line=HALO),
        operand(2, 2, CHUNK, half),
        plgpu.Barrier(num_arrivals=blocks + 2),
        plgpu.Barrier(num_arrivals=2 * blocks, num_barriers=2 * SLOTS),
    ]
    outputs = [((batch, q.shape[1], heads, 2 * half), bf16)] * 2
    grid = {"head": heads, "tiles": -(-count // tiles), "batch": batch}
    outs = launch(body, inputs, outputs, scratch, grid=grid, warpgroups=2)
    return tuple(x[:, :length] for x in outs)


def forward(
    q,
    k,
    v,
    gate_logits,
    conv_q,
    conv_k,
    phi,
    initial_state,
    conv_state,
    *,
    normalize: bool,
    gate_normalizer: float,
    gate_lower_bound: float | None,
    lengths,
    numbers,
) -> Any:
    """See ``kernels_pallas.contract.Layer``. T = 1 takes ``triton``'s decoding kernel."""
    front = {"gate_normalizer": gate_normalizer, "gate_lower_bound": gate_lower_bound}
    known = {"lengths": lengths, "numbers": numbers}
    if q.shape[1] == 1:
        state = (initial_state, conv_state)
        return triton.forward(q, k, v, gate_logits, conv_q, conv_k, phi, *state, normalize=normalize, **front, **known)
    q, k, log_g = features(q, k, gate_logits, conv_q, conv_k, phi, conv_state, **front, **known)
    options = {"normalize": normalize, "lower_bound": gate_lower_bound, "save_residuals": False}
    o, state, _ = gla.forward(q, k, v, log_g, initial_state, **options, **known)
    return o, state
