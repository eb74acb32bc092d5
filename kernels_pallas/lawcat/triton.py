"""LAWCAT attention from raw projections for NVIDIA GPUs, through Pallas' Triton lowering.

A sequence takes two steps. ``_features_kernel`` forms what no token has to wait for (convolutions, Hedgehog features and
gates, one program a head and tile of rows), then gated linear attention of the given backend runs on them. K and V of a kv
head are read in place by the query heads that share it; only features are stored, in the operand type. One kernel for both
was measured and lost (BENCHMARKS.md): the state and the tiles of the feature map do not fit the registers together.

One token (decoding) is a single launch: convolution, features, gate, state update and read-out, the state updated in place.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import EPS, LOG2E, interpret_mode, out_struct
from kernels_pallas.gla import block_sizes
from kernels_pallas.gla import triton as gla
from kernels_pallas.gla.block_sizes import BlockSizes
from kernels_pallas.gla.triton_tiles import (
    compiler_params,
    dot,
    exp2,
    f32,
    feature_blocks,
    iota,
    load_rows,
    log2,
    round_to,
    store_rows,
    token_spec,
)
from kernels_pallas.lawcat.xla import FEATURE_FLOOR

LN2 = 0.6931471805599453


def supports(
    q, k, v, gate_logits, conv_q, conv_k, phi, *, normalize: bool, gate_lower_bound: float | None
) -> str | None:
    """Why these kernels cannot run these arguments (the end of a sentence), or None."""
    del k, gate_logits, conv_k
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


@dataclasses.dataclass(frozen=True)
class Options:
    """Static arguments of the kernels: rows of a tile, tokens in all, the gate, whether rows come before the sequence."""

    chunk: int
    length: int
    gate_normalizer: float
    bound: float | None
    carried: bool

    @property
    def limit(self) -> int | None:
        return self.length if self.length % self.chunk else None


def log_gates(a: jax.Array, options: Options) -> jax.Array:
    """logsigmoid(a) / normalizer, bounded below; natural log. log(1 + u) by its series where 1 + u would lose u."""
    a = a.astype(f32)
    u = exp2(-jnp.abs(a) * LOG2E)
    softplus = jnp.where(u < 2.0**-6, u * (1.0 - u * (0.5 - u * (1.0 / 3.0))), LN2 * log2(1.0 + u)) + jnp.maximum(
        -a, 0.0
    )
    g = softplus * (-1.0 / options.gate_normalizer)
    return g if options.bound is None else jnp.maximum(g, options.bound)


def convolved(
    x_ref: Any, w_ref: Any, extra_ref: Any, start: Any, block: tuple[int, int], options: Options
) -> jax.Array:
    """Rows [start, start + C), channels ``block``, of the causal convolution of x [T, d] with taps w [W, d]; float32.

    Rows before the sequence are masked; ``extra`` [W - 1, d] float32 is what the rows before it (conv_state) add to the
    first W - 1 outputs.
    """
    from jax.experimental.pallas import triton as plgpu

    at, n = block
    taps, length, limit = w_ref.shape[0], options.length, options.limit
    shape = (options.chunk, n)
    rows, columns = start + iota(shape, 0), at + iota(shape, 1)
    y = load_rows(x_ref, start, shape[0], limit, block).astype(f32) * w_ref[taps - 1, pl.ds(at, n)].astype(f32)[None, :]
    for j in range(taps - 1):
        shifted = rows - (taps - 1 - j)
        inside = shifted >= 0 if limit is None else (shifted >= 0) & (shifted < length)
        # Index arrays, not a slice: the interpreter has no slices that begin before row 0.
        clipped = jnp.clip(shifted, 0, length - 1) if interpret_mode() else shifted
        x = plgpu.load(x_ref.at[clipped, columns], mask=inside, other=0.0)
        y += x.astype(f32) * w_ref[j, pl.ds(at, n)].astype(f32)[None, :]
    if options.carried:
        kept = jnp.minimum(rows, taps - 2)
        y += plgpu.load(extra_ref.at[kept, columns], mask=rows < taps - 1, other=0.0)
    return y


def softmax(s: jax.Array, axis: int) -> jax.Array:
    """Of scores in log2 units, raised to the feature floor."""
    p = exp2(s - jnp.max(s, axis=axis, keepdims=True))
    return jnp.maximum(p * (1.0 / jnp.sum(p, axis=axis, keepdims=True)), FEATURE_FLOOR)


def _features_kernel(*refs, options: Options, group: int):
    """max([softmax(u phi) ; softmax(-u phi)], 1e-12) of a tile of q and of k, and once a group the gates."""
    refs = iter(refs)
    q_ref, k_ref, a_ref, wq_ref, wk_ref, phi_ref = (next(refs) for _ in range(6))
    extra = (next(refs), next(refs)) if options.carried else (None, None)
    q_out, k_out, g_out = refs
    start, limit, half = pl.program_id(1) * options.chunk, options.limit, phi_ref.shape[1]

    for x_ref, w_ref, extra_ref, out in ((k_ref, wk_ref, extra[1], k_out), (q_ref, wq_ref, extra[0], q_out)):
        s = jnp.zeros((options.chunk, half), f32)
        for at, n in feature_blocks(x_ref.shape[1]):
            u = round_to(convolved(x_ref, w_ref, extra_ref, start, (at, n), options), x_ref.dtype)
            s += dot(u, phi_ref[pl.ds(at, n), :])
        s *= LOG2E
        store_rows(out, start, softmax(s, 1), limit, (0, half))
        store_rows(out, start, softmax(-s, 1), limit, (half, half))

    @pl.when(lax.rem(pl.program_id(0), jnp.int32(group)) == 0)
    def _():
        for block in feature_blocks(a_ref.shape[1]):
            g = log_gates(load_rows(a_ref, start, options.chunk, limit, block), options)
            store_rows(g_out, start, g, limit, block)


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
    q, k, gate_logits, conv_q, conv_k, phi, conv_state, gate_normalizer: float, bound: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """phi(q), phi(k) [B, T, H, K] and log_g [B, T, Hkv, K] in q's dtype, the gates bounded: what the gated linear
    attention takes."""
    batch, length, heads, _ = q.shape
    kv_heads, half = k.shape[2], phi.shape[-1]
    sizes = block_sizes.lookup("features", q.dtype, 2 * half, q.shape[-1])
    chunk = min(sizes.chunk, max(16, 1 << (length - 1).bit_length()))
    options = Options(chunk, length, gate_normalizer, bound, conv_state is not None)
    carry = () if conv_state is None else (conv_carry(conv_state[0], conv_q), conv_carry(conv_state[1], conv_k))
    inputs = [q, k, gate_logits, conv_q, conv_k, phi.astype(q.dtype), *carry]

    def tokens(x: Any) -> pl.BlockSpec:
        spec = token_spec(x, heads)
        return pl.BlockSpec(spec.block_shape, lambda h, c, b: spec.index_map(h, 0, c, b))

    specs = [tokens(q), tokens(k), tokens(gate_logits), _head_spec(conv_q), _head_spec(conv_k), _head_spec(phi)]
    specs += [tokens(x) for x in carry]
    shapes = ((batch, length, heads, 2 * half), (batch, length, heads, 2 * half), (batch, length, kv_heads, 2 * half))
    out_shape = [out_struct(shape, q.dtype, *inputs) for shape in shapes]
    return pl.pallas_call(
        functools.partial(_features_kernel, options=options, group=heads // kv_heads),
        grid=(heads, -(-length // chunk), batch),
        in_specs=specs,
        out_specs=[tokens(x) for x in out_shape],
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
    backend: ModuleType = gla,
) -> Any:
    """See ``kernels_pallas.gla`` for the signature: (o, (S, z)). T = 1 takes the decoding kernel; ``backend`` is the module
    whose gated linear attention runs on the features."""
    if q.shape[1] == 1:
        return _decode(
            q,
            k,
            v,
            gate_logits,
            conv_q,
            conv_k,
            phi.astype(q.dtype),
            initial_state,
            conv_state,
            normalize,
            gate_normalizer,
            gate_lower_bound,
        )
    q, k, log_g = features(q, k, gate_logits, conv_q, conv_k, phi, conv_state, gate_normalizer, gate_lower_bound)
    o, state, _ = backend.forward(
        q, k, v, log_g, initial_state, normalize=normalize, lower_bound=gate_lower_bound, save_residuals=False
    )
    return o, state


def _decode_kernel(*refs, options: Options, normalize: bool):
    refs = iter(refs)
    q_ref, k_ref, v_ref, a_ref, wq_ref, wk_ref, phi_ref = (next(refs) for _ in range(7))
    tails = (next(refs), next(refs)) if options.carried else (None, None)
    S_in, z_in, o_ref, S_ref, z_ref = refs
    half = phi_ref.shape[1]
    # Both halves of the features as rows of their own: vectors cannot be joined. The state is on its way from memory while
    # the features are formed.
    halves = [pl.ds(0, half), pl.ds(half, half)]
    states = [S_in[rows, :] for rows in halves]

    def scores(x_ref, w_ref, tail_ref):
        taps = w_ref.shape[0]
        u = x_ref[:].astype(f32) * w_ref[taps - 1, :].astype(f32)
        if tail_ref is not None:
            for j in range(taps - 1):
                u += tail_ref[j, :].astype(f32) * w_ref[j, :].astype(f32)
        # Rounded as the prefill rounds it, so that decoding continues what prefill began.
        u = round_to(u, x_ref.dtype).astype(f32)
        return jnp.sum(u[:, None] * phi_ref[:, :].astype(f32), axis=0) * LOG2E

    sq, sk = scores(q_ref, wq_ref, tails[0]), scores(k_ref, wk_ref, tails[1])
    v = v_ref[:].astype(f32)
    o = jnp.zeros_like(v)
    den = jnp.float32(EPS)
    for rows, S, sign in zip(halves, states, (1.0, -1.0), strict=True):
        q, k = (round_to(softmax(sign * s, 0), q_ref.dtype).astype(f32) for s in (sq, sk))
        decay = exp2(round_to(log_gates(a_ref[rows], options), q_ref.dtype).astype(f32) * LOG2E)
        S = decay[:, None] * S + k[:, None] * v[None, :]
        z = decay * z_in[rows] + k
        o += jnp.sum(q[:, None] * S, axis=0)
        den += jnp.sum(q * z)
        S_ref[rows, :], z_ref[rows] = S, z
    o_ref[:] = (o / den if normalize else o).astype(o_ref.dtype)


def _decode(q, k, v, a, conv_q, conv_k, phi, state, conv_state, normalize, gate_normalizer, bound) -> Any:
    """One token: everything in one launch; the state is updated in place (when the caller donates it)."""
    batch, _, heads, _ = q.shape
    features, values = 2 * phi.shape[-1], v.shape[-1]
    if state is None:
        state = (jnp.zeros((batch, heads, features, values), f32), jnp.zeros((batch, heads, features), f32))
    options = Options(1, 1, gate_normalizer, bound, conv_state is not None)

    def vector(x):
        group = heads // x.shape[2]
        return pl.BlockSpec((None, None, None, x.shape[3]), lambda h, b: (b, 0, lax.div(h, jnp.int32(group)), 0))

    def rows(x):
        group = heads // x.shape[2]
        return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda h, b: (b, 0, lax.div(h, jnp.int32(group)), 0))

    parameter = [_head_spec(x) for x in (conv_q, conv_k, phi)]
    tails = () if conv_state is None else tuple(conv_state)
    inputs = [q, k, v, a, conv_q, conv_k, phi, *tails, *state]
    matrix = pl.BlockSpec((None, None, features, values), lambda h, b: (b, h, 0, 0))
    line = pl.BlockSpec((None, None, features), lambda h, b: (b, h, 0))
    o = out_struct((batch, 1, heads, values), v.dtype, *inputs)
    sizes = BlockSizes(num_warps=4 if features * values <= 64 * 64 else 8, num_stages=1)
    o, S, z = pl.pallas_call(
        functools.partial(_decode_kernel, options=options, normalize=normalize),
        grid=(heads, batch),
        in_specs=[*(vector(x) for x in (q, k, v, a)), *parameter, *(rows(x) for x in tails), matrix, line],
        out_specs=[vector(o), matrix, line],
        out_shape=[o, *(out_struct(x.shape, f32, *inputs) for x in state)],
        input_output_aliases={len(inputs) - 2: 1, len(inputs) - 1: 2},
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="lawcat_decode",
    )(*inputs)
    return o, (S, z)
