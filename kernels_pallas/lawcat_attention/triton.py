"""LAWCAT attention from raw projections for NVIDIA GPUs, through Pallas' Triton lowering.

A sequence takes two kernels in turn. ``_features_kernel`` forms what no token has to wait for (convolutions, Hedgehog features and
gates, one program for each head and tile of rows), then gated linear attention runs on them. K and V of a kv
head are read in place by the query heads that share it; only features are stored, in the operand type. One kernel for both
was measured and lost (docs/kernels.md): the state and the tiles of the feature map do not fit the registers together.

One token (decoding) is a single launch, of the kernel in ``triton_decode``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import interpret_mode, out_struct
from kernels_pallas.gated_linear_attention import block_sizes
from kernels_pallas.gated_linear_attention import triton as gla
from kernels_pallas.gated_linear_attention.triton_tiles import (
    Rows,
    compiler_params,
    dot,
    f32,
    feature_blocks,
    iota,
    load_rows,
    load_vector,
    round_to,
    store_rows,
    take_rows,
    token_spec,
)
from kernels_pallas.lawcat_attention.triton_decode import decode
from kernels_pallas.lawcat_attention.triton_tiles import FrontSpec, log_gates, softmax


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
    del k, gate_logits, conv_k
    if q.shape[1] == 1 and (lengths or segments):
        return "the kernel of one token takes neither lengths nor segment_ids"
    width, half = q.shape[-1], phi.shape[-1]
    if width & (width - 1) or not 16 <= width <= 256:
        return f"d must be a power of two from 16 to 256, got {width}"
    if half < 16:
        return f"f must be at least 16, got {half}"
    if conv_q.shape[1] < 2:
        return f"the convolutions need at least two taps, got {conv_q.shape[1]}"
    shaped = jax.ShapeDtypeStruct((*q.shape[:-1], 2 * half), q.dtype)
    return gla.supports(
        shaped, shaped, v, shaped, normalize=normalize, lower_bound=gate_lower_bound, differentiated=False
    )


def _multiply_add(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
    """x w + y in the operand type, bfloat16 two at a time and rounded once: four conversions an element would otherwise cost
    more than the convolution."""
    if x.dtype == f32:
        return x * w + y
    if interpret_mode():
        return round_to(x.astype(f32) * w.astype(f32) + y.astype(f32), x.dtype)
    from jax.experimental.pallas import triton as plgpu

    (out,) = plgpu.elementwise_inline_asm(
        "fma.rn.bf16x2 $0, $1, $2, $3;",
        args=[x, w, y],
        constraints="=r,r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return out


def convolved(
    x_ref: Any, w_ref: Any, extra_ref: Any, start: Any, block: tuple[int, int], front: FrontSpec, rows: Rows
) -> jax.Array:
    """Rows [start, start + C), channels ``block``, of the causal convolution of x [T, d] with taps w [W, d] (x's dtype).

    Oldest token first, so that the rounding of the partial sums is that of the smaller terms. Rows before the sequence, before
    the token's document and from its length on are masked; ``extra`` [W - 1, d] float32 is what the rows before the sequence
    (conv_state) add to the first W - 1 outputs.
    """
    from jax.experimental.pallas import triton as plgpu

    at, n = block
    taps, length, limit = w_ref.shape[0], front.length, rows.limit(front.limit)
    shape = (front.chunk, n)
    index, columns = start + iota(shape, 0), at + iota(shape, 1)
    numbers = None if rows.numbers is None else load_vector(rows.numbers, start, front.chunk, front.limit, 0)
    y = jnp.zeros(shape, x_ref.dtype)
    for j in range(taps):
        w = jnp.broadcast_to(w_ref[j, pl.ds(at, n)][None, :], shape)
        if j == taps - 1:
            x = load_rows(x_ref, start, shape[0], limit, block)
        else:
            back = taps - 1 - j
            shifted = index - back
            inside = shifted >= 0 if limit is None else (shifted >= 0) & (shifted < limit)
            # Index arrays, not a slice: the interpreter has no slices that begin before row 0.
            clipped = jnp.clip(shifted, 0, length - 1) if interpret_mode() else shifted
            x = plgpu.load(x_ref.at[clipped, columns], mask=inside, other=0.0)
            if numbers is not None:  # selected after the load, which then waits for nothing
                x = jnp.where(shifted >= numbers[:, None] - 1, x, jnp.zeros_like(x))
        y = _multiply_add(x, w, y)
    if front.carried:
        kept = jnp.minimum(index, taps - 2)
        extra = plgpu.load(extra_ref.at[kept, columns], mask=index < taps - 1, other=0.0)
        if numbers is not None:
            extra = jnp.where((numbers == 0)[:, None], extra, 0.0)
        y = round_to(y.astype(f32) + extra, y.dtype)
    return y


def _features_kernel(*refs, front: FrontSpec, group: int, given_rows: tuple[bool, ...]):
    """max([softmax(u phi) ; softmax(-u phi)], 1e-12) of a tile of q and of k, and once a group the gates."""
    refs = iter(refs)
    rows = take_rows(refs, given_rows)
    q_ref, k_ref, a_ref, wq_ref, wk_ref, phi_ref = (next(refs) for _ in range(6))
    extra = (next(refs), next(refs)) if front.carried else (None, None)
    q_out, k_out, g_out = refs
    start, limit, half = pl.program_id(2) * front.chunk, front.limit, phi_ref.shape[1]

    def store(out: Any, x: jax.Array, block: tuple[int, int]) -> None:
        if rows.lengths is not None:
            x = jnp.where(start + iota(x.shape, 0) < rows.lengths[0], x, 0.0)
        store_rows(out, start, x, limit, block)

    for x_ref, w_ref, extra_ref, out in ((k_ref, wk_ref, extra[1], k_out), (q_ref, wq_ref, extra[0], q_out)):
        s = jnp.zeros((front.chunk, half), f32)
        for at, n in feature_blocks(x_ref.shape[1]):
            u = convolved(x_ref, w_ref, extra_ref, start, (at, n), front, rows)
            s += dot(u, phi_ref[pl.ds(at, n), :])
        store(out, softmax(s, 1), (0, half))
        store(out, softmax(-s, 1), (half, half))

    @pl.when(lax.rem(pl.program_id(0), jnp.int32(group)) == 0)
    def _():
        for block in feature_blocks(a_ref.shape[1]):
            store(g_out, log_gates(load_rows(a_ref, start, front.chunk, limit, block), front), block)


def conv_carry(tail: jax.Array, w: jax.Array) -> jax.Array:
    """What the rows before the sequence add to its first W - 1 convolved rows.

    tail [B, W - 1, Hx, d]; w [H, W, d] -> [B, W - 1, H, d] float32.
    """
    heads, taps, width = w.shape
    batch, _, kv_heads, _ = tail.shape
    w = w.astype(f32).reshape(kv_heads, heads // kv_heads, taps, width)
    tail = tail.astype(f32)[:, :, :, None]
    rows = [sum(tail[:, t + j] * w[:, :, j] for j in range(taps - 1 - t)) for t in range(taps - 1)]
    return jnp.stack(rows, axis=1).reshape(batch, taps - 1, heads, width)


def _head_spec(x: Any) -> pl.BlockSpec:
    """All of one head's parameters [H, ., .]."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda h, *_: (h, 0, 0))


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
    """See ``kernels_pallas.contract.LayerFeatures``; all in q's dtype, the gates bounded."""
    batch, length, heads, _ = q.shape
    kv_heads, half = k.shape[2], phi.shape[-1]
    sizes = block_sizes.lookup("features", q.dtype, 2 * half, q.shape[-1])
    chunk = min(sizes.chunk, max(16, 1 << (length - 1).bit_length()))
    front = FrontSpec(chunk, length, gate_normalizer, gate_lower_bound, conv_state is not None)
    rows = Rows(lengths, numbers)
    carry = () if conv_state is None else (conv_carry(conv_state[0], conv_q), conv_carry(conv_state[1], conv_k))
    inputs = [*rows.inputs(), q, k, gate_logits, *(x.astype(q.dtype) for x in (conv_q, conv_k, phi)), *carry]

    specs = [
        *rows.specs(),
        *(token_spec(x, heads) for x in (q, k, gate_logits)),
        _head_spec(conv_q),
        _head_spec(conv_k),
        _head_spec(phi),
    ]
    specs += [token_spec(x, heads) for x in carry]
    shapes = ((batch, length, heads, 2 * half), (batch, length, heads, 2 * half), (batch, length, kv_heads, 2 * half))
    out_shape = [out_struct(shape, q.dtype, *inputs) for shape in shapes]
    return pl.pallas_call(
        functools.partial(_features_kernel, front=front, group=heads // kv_heads, given_rows=rows.given),
        grid=(heads, 1, -(-length // chunk), batch),
        in_specs=specs,
        out_specs=[token_spec(x, heads) for x in out_shape],
        out_shape=out_shape,
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="lawcat_features",
    )(*inputs)


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
    """See ``kernels_pallas.contract.Layer``: (o, (S, z)). T = 1 takes the decoding kernel, which returns the new
    conv_state as well."""
    if q.shape[1] == 1:
        return decode(
            q,
            k,
            v,
            gate_logits,
            conv_q,
            conv_k,
            phi,
            initial_state,
            conv_state,
            normalize=normalize,
            gate_normalizer=gate_normalizer,
            gate_lower_bound=gate_lower_bound,
        )
    front = {"gate_normalizer": gate_normalizer, "gate_lower_bound": gate_lower_bound}
    known = {"lengths": lengths, "numbers": numbers}
    q, k, log_g = features(q, k, gate_logits, conv_q, conv_k, phi, conv_state, **front, **known)
    options = {"normalize": normalize, "lower_bound": gate_lower_bound, "save_residuals": False}
    o, state, _ = gla.forward(q, k, v, log_g, initial_state, **options, **known)
    return o, state
