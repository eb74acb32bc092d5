"""LAWCAT attention from raw projections in one or two launches, for NVIDIA GPUs through Pallas' Triton lowering.

The chunk loop of ``kernels_pallas.gla.triton`` with its loads replaced: convolutions (W row-shifted loads of the same
rows, which the first-level cache serves), Hedgehog features and gates are formed on the tile. K and V of a kv head are
read in place by the query heads that share it, which run side by side; nothing is repeated or stored in between. One
token (decoding) is a kernel of its own: convolution, features, gate, state update and read-out in one launch, the state
updated in place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import EPS, LOG2E, interpret_mode, out_struct
from kernels_pallas.gla import block_sizes
from kernels_pallas.gla import triton as gla
from kernels_pallas.gla.block_sizes import BlockSizes, Split
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
    log2,
    round_to,
    segment_spec,
    sequence_spec,
    state_spec,
    store_rows,
    token_spec,
)
from kernels_pallas.lawcat.xla import FEATURE_FLOOR

LN2 = 0.6931471805599453


def supports(
    q, k, v, gate_logits, conv_q, conv_k, phi, *, normalize: bool, gate_lower_bound: float | None
) -> str | None:
    """Why the fused kernels cannot run these arguments (the end of a sentence), or None."""
    del k, gate_logits, conv_k
    width, features, values = q.shape[-1], 2 * phi.shape[-1], v.shape[-1]
    if width & (width - 1) or not 16 <= width <= 256:
        return f"d must be a power of two from 16 to 256, got {width}"
    if conv_q.shape[1] < 2:
        return f"the convolutions need at least two taps, got {conv_q.shape[1]}"
    shaped = jax.ShapeDtypeStruct((*q.shape[:-1], features), q.dtype)
    del values
    return gla.supports(
        shaped, shaped, v, shaped, normalize=normalize, lower_bound=gate_lower_bound, differentiated=False
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """Static arguments of the tile functions."""

    split: Split
    features: int
    gate_normalizer: float
    bound: float | None
    carried: bool


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
    taps, length = w_ref.shape[0], options.split.length
    shape = (options.split.chunk, n)
    rows, columns = start + iota(shape, 0), at + iota(shape, 1)
    limit = length if options.split.ragged else None
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


def _softmax(s: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Over the columns of all blocks together; s in log2 units."""
    peak = functools.reduce(jnp.maximum, [jnp.max(x, axis=1) for x in s])
    p = [exp2(x - peak[:, None]) for x in s]
    inverse = 1.0 / functools.reduce(jnp.add, [jnp.sum(x, axis=1) for x in p])
    return tuple(jnp.maximum(x * inverse[:, None], FEATURE_FLOOR) for x in p)


def feature_tiles(u: tuple[jax.Array, ...], phi_ref: Any, options: Options) -> tuple[jax.Array, ...]:
    """max([softmax(u phi) ; softmax(-u phi)], 1e-12) in feature blocks, float32. phi_ref [d, K] holds [phi, -phi]."""
    blocks, half = feature_blocks(options.features), options.features // 2
    channels = feature_blocks(phi_ref.shape[0])

    def score(block: tuple[int, int]) -> jax.Array:
        parts = [dot(x, phi_ref[pl.ds(at, n), pl.ds(*block)]) for x, (at, n) in zip(u, channels, strict=True)]
        return functools.reduce(jnp.add, parts) * LOG2E

    if len(blocks) == 1:
        # Both halves share one tile: maximum and sum of each half by masks, as tiles cannot be cut.
        s = score(blocks[0])
        low = iota(s.shape, 1) < half
        peaks = (jnp.max(jnp.where(low, s, -jnp.inf), axis=1), jnp.max(jnp.where(low, -jnp.inf, s), axis=1))
        p = exp2(s - jnp.where(low, peaks[0][:, None], peaks[1][:, None]))
        first, both = jnp.sum(jnp.where(low, p, 0.0), axis=1), jnp.sum(jnp.where(low, 0.0, p), axis=1)
        inverse = jnp.where(low, (1.0 / first)[:, None], (1.0 / both)[:, None])
        return (jnp.maximum(p * inverse, FEATURE_FLOOR),)
    s = tuple(score(block) for block in blocks[: len(blocks) // 2])
    return *_softmax(s), *_softmax(tuple(-x for x in s))


def conv_features(x_ref, w_ref, extra_ref, phi_ref, start, options: Options) -> tuple[jax.Array, ...]:
    u = tuple(
        round_to(convolved(x_ref, w_ref, extra_ref, start, block, options), x_ref.dtype)
        for block in feature_blocks(x_ref.shape[1])
    )
    return feature_tiles(u, phi_ref, options)


def _keys_and_gates(k_ref, a_ref, wk_ref, extra_ref, phi_ref, start, matrix, options: Options):
    """k^ (rounded), b - r and r [K, 8] of a chunk, by feature blocks."""
    split, dtype = options.split, k_ref.dtype
    limit = split.length if split.ragged else None
    features = conv_features(k_ref, wk_ref, extra_ref, phi_ref, start, options)
    ks, xs, rs = [], [], []
    for block, k in zip(feature_blocks(options.features), features, strict=True):
        g = log_gates(load_rows(a_ref, start, split.chunk, limit, block), options)
        if limit is not None:
            # Padding must leave the state alone: neither decay nor keys.
            valid = start + iota(k.shape, 0) < limit
            g, k = jnp.where(valid, g, 0.0), jnp.where(valid, k, 0.0)
        g = round_to(g, dtype)
        x = gla.exponents(g, matrix)
        ks.append(round_to(k * exp2(-x), dtype))
        xs.append(x)
        rs.append(gla.half_total(g))
    return tuple(ks), xs, rs


def _state_kernel(*refs, options: Options):
    """P1 of ``gla.triton`` from raw k, v and gate logits."""
    refs = iter(refs)
    k_ref, v_ref, a_ref, wk_ref, phi_ref = (next(refs) for _ in range(5))
    extra_ref = next(refs) if options.carried else None
    L_ref, S_ref, z_ref = refs
    split, segment = options.split, pl.program_id(2)
    matrix = centred(split.chunk, k_ref.dtype)
    limit = split.length if split.ragged else None

    def step(i, carry):
        state, L = carry
        start = (segment * split.per_segment + i) * split.chunk
        k, _, r = _keys_and_gates(k_ref, a_ref, wk_ref, extra_ref, phi_ref, start, matrix, options)
        v = load_rows(v_ref, start, split.chunk, limit)
        return gla.add_chunk(gla.scaled(state, tuple(r)), k, v, tuple(r)), tuple(
            a + 2.0 * b for a, b in zip(L, r, strict=True)
        )

    features, values = S_ref.shape
    state, L = lax.fori_loop(
        0, gla.chunks_of(split, segment), step, (gla.zero_state(values, features), gla.zero_totals(features))
    )
    gla.write_state(S_ref, z_ref, gla.settled(state))
    gla.write_totals(L_ref, L)


def _out_kernel(*refs, options: Options, normalize: bool, states: str, initial: bool):
    """P2 of ``gla.triton`` from raw q, k, v and gate logits."""
    refs = iter(refs)
    q_ref, k_ref, v_ref, a_ref, wq_ref, wk_ref, phi_ref = (next(refs) for _ in range(7))
    extra_q, extra_k = (next(refs), next(refs)) if options.carried else (None, None)
    given = tuple(next(refs) for _ in range(2)) if initial or states == "given" else None
    summaries = tuple(next(refs) for _ in range(3)) if states == "prefix" else None
    o_ref, S_ref, z_ref = refs
    split, segment, dtype = options.split, pl.program_id(2), q_ref.dtype
    matrix, mask = centred(split.chunk, dtype), causal(split.chunk)
    limit = split.length if split.ragged else None
    features, values = S_ref.shape
    state = gla.zero_state(values, features) if given is None else gla.read_state(*given)
    if summaries is not None:
        state = gla._prefix(state, *summaries, segment)

    def step(i, state):
        start = (segment * split.per_segment + i) * split.chunk
        k, x, r = _keys_and_gates(k_ref, a_ref, wk_ref, extra_k, phi_ref, start, matrix, options)
        v = load_rows(v_ref, start, split.chunk, limit)
        # The state before q: its operands are gone before the tiles of q and of the output come up.
        before = gla.scaled(state, tuple(r))
        rounded = tuple(round_to(a, dtype) for a in before[0])
        state = gla.add_chunk(before, k, v, tuple(r))
        q = conv_features(q_ref, wq_ref, extra_q, phi_ref, start, options)
        q = tuple(round_to(a * exp2(b), dtype) for a, b in zip(q, x, strict=True))
        o, _ = gla.chunk_out(q, k, v, rounded, before[1], mask, normalize)
        store_rows(o_ref, start, o, limit)
        return state

    state = lax.fori_loop(0, gla.chunks_of(split, segment), step, state)

    @pl.when(segment == split.segments - 1)
    def _():
        gla.write_state(S_ref, z_ref, gla.settled(state))


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
    return pl.BlockSpec((None, *x.shape[1:]), lambda h, c, s, b: (h, 0, 0))


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
) -> Any:
    """See ``kernels_pallas.gla`` for the signature: (o, (S, z)). T = 1 takes the decoding kernel."""
    batch, length, heads, _ = q.shape
    features, values = 2 * phi.shape[-1], v.shape[-1]
    doubled = jnp.concatenate([phi, -phi], axis=-1).astype(q.dtype)
    if length == 1:
        return _decode(
            q,
            k,
            v,
            gate_logits,
            conv_q,
            conv_k,
            doubled,
            initial_state,
            conv_state,
            normalize,
            gate_normalizer,
            gate_lower_bound,
        )
    sizes = _sizes("prefill", q.dtype, length, features, values, gate_lower_bound)
    width = sizes.block_v
    programs = batch * heads * (values // width)
    split = block_sizes.split_sequence(length, sizes.chunk, programs, sizes.programs)
    options = Options(split, features, gate_normalizer, gate_lower_bound, conv_state is not None)
    carry = () if conv_state is None else (conv_carry(conv_state[0], conv_q), conv_carry(conv_state[1], conv_k))
    states, summaries, given = "zero", (), initial_state
    if split.segments > 1:
        own = dataclasses.replace(block_sizes.lookup("prefill_state", q.dtype, features, values), chunk=sizes.chunk)
        summaries = _segment_states(k, v, gate_logits, conv_k, doubled, carry[1:], options, heads, own)
        states = "prefix"
        if split.segments > gla.PREFIX_SEGMENTS:
            given, summaries, states = gla.combine(*summaries, initial_state), (), "given"

    inputs = [q, k, v, gate_logits, conv_q, conv_k, doubled, *carry]
    specs = [token_spec(q, heads), token_spec(k, heads), token_spec(v, heads, width), token_spec(gate_logits, heads)]
    specs += [_head_spec(conv_q), _head_spec(conv_k), _head_spec(doubled)]
    specs += [token_spec(x, heads) for x in carry]
    if given is not None:
        inputs += list(given)
        spec = segment_spec if states == "given" else state_spec
        specs += [spec(given[0].shape, width), spec(given[1].shape)]
    if summaries:
        inputs += list(summaries)
        L, S, z = summaries
        specs += [sequence_spec(L.shape), sequence_spec(S.shape, width), sequence_spec(z.shape)]
    shapes = ((batch, length, heads, values), (batch, heads, features, values), (batch, heads, features))
    out_shape = [out_struct(shapes[0], v.dtype, *inputs), *(out_struct(s, f32, *inputs) for s in shapes[1:])]
    o, S, z = pl.pallas_call(
        functools.partial(_out_kernel, options=options, normalize=normalize, states=states, initial=given is not None),
        grid=(heads, values // width, split.segments, batch),
        in_specs=specs,
        out_specs=[token_spec(out_shape[0], heads, width), state_spec(shapes[1], width), state_spec(shapes[2])],
        out_shape=out_shape,
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="lawcat_prefill",
    )(*inputs)
    return o, (S, z)


def _sizes(kernel: str, dtype: Any, length: int, features: int, values: int, bound: float | None) -> BlockSizes:
    sizes = block_sizes.lookup(kernel, dtype, features, values)
    limit = min(block_sizes.single_reference_limit(bound), max(16, 1 << (length - 1).bit_length()))
    return dataclasses.replace(sizes, chunk=min(sizes.chunk, limit), block_v=min(sizes.block_v, values))


def _segment_states(k, v, gate_logits, conv_k, doubled, carry, options: Options, heads: int, sizes: BlockSizes):
    batch, values, count = k.shape[0], v.shape[-1], options.split.segments
    width = min(sizes.block_v, values)
    vectors = (batch, heads, count, options.features)
    matrices = (*vectors, values)
    inputs = [k, v, gate_logits, conv_k, doubled, *carry]
    return pl.pallas_call(
        functools.partial(_state_kernel, options=options),
        grid=(heads, values // width, count - 1, batch),
        in_specs=[
            token_spec(k, heads),
            token_spec(v, heads, width),
            token_spec(gate_logits, heads),
            _head_spec(conv_k),
            _head_spec(doubled),
            *(token_spec(x, heads) for x in carry),
        ],
        out_specs=[segment_spec(vectors), segment_spec(matrices, width), segment_spec(vectors)],
        out_shape=[out_struct(s, f32, *inputs) for s in (vectors, matrices, vectors)],
        compiler_params=compiler_params(sizes),
        interpret=interpret_mode(),
        name="lawcat_segment_state",
    )(*inputs)


def _decode_kernel(*refs, options: Options, normalize: bool):
    refs = iter(refs)
    q_ref, k_ref, v_ref, a_ref, wq_ref, wk_ref, phi_ref = (next(refs) for _ in range(7))
    tails = (next(refs), next(refs)) if options.carried else (None, None)
    S_in, z_in, o_ref, S_ref, z_ref = refs
    half = options.features // 2

    def features(x_ref, w_ref, tail_ref):
        taps = w_ref.shape[0]
        u = x_ref[:].astype(f32) * w_ref[taps - 1, :].astype(f32)
        if tail_ref is not None:
            for j in range(taps - 1):
                u += tail_ref[j, :].astype(f32) * w_ref[j, :].astype(f32)
        # Rounded as the prefill rounds it, so that decoding continues what prefill began.
        u = round_to(u, x_ref.dtype).astype(f32)
        s = jnp.sum(u[:, None] * phi_ref[:, :].astype(f32), axis=0) * LOG2E
        low = lax.iota(jnp.int32, options.features) < half
        peak = jnp.where(low, jnp.max(jnp.where(low, s, -jnp.inf)), jnp.max(jnp.where(low, -jnp.inf, s)))
        p = exp2(s - peak)
        total = jnp.where(low, jnp.sum(jnp.where(low, p, 0.0)), jnp.sum(jnp.where(low, 0.0, p)))
        return jnp.maximum(p / total, FEATURE_FLOOR)

    q, k = features(q_ref, wq_ref, tails[0]), features(k_ref, wk_ref, tails[1])
    decay = exp2(log_gates(a_ref[:], options) * LOG2E)
    S = decay[:, None] * S_in[:, :] + k[:, None] * v_ref[:].astype(f32)[None, :]
    z = decay * z_in[:] + k
    o = jnp.sum(q[:, None] * S, axis=0)
    if normalize:
        o = o / (jnp.sum(q * z) + EPS)
    o_ref[:] = o.astype(o_ref.dtype)
    S_ref[:, :], z_ref[:] = S, z


def _decode(q, k, v, a, conv_q, conv_k, doubled, state, conv_state, normalize, gate_normalizer, bound) -> Any:
    """One token: everything in one launch; the state is updated in place (when the caller donates it)."""
    batch, _, heads, _ = q.shape
    features, values = doubled.shape[-1], v.shape[-1]
    if state is None:
        state = (jnp.zeros((batch, heads, features, values), f32), jnp.zeros((batch, heads, features), f32))
    options = Options(Split(1, 1, 1, 1), features, gate_normalizer, bound, conv_state is not None)

    def vector(x):
        group = heads // x.shape[2]
        return pl.BlockSpec((None, None, None, x.shape[3]), lambda h, b: (b, 0, lax.div(h, jnp.int32(group)), 0))

    def rows(x):
        group = heads // x.shape[2]
        return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda h, b: (b, 0, lax.div(h, jnp.int32(group)), 0))

    parameter = [pl.BlockSpec((None, *x.shape[1:]), lambda h, b: (h, 0, 0)) for x in (conv_q, conv_k, doubled)]
    tails = () if conv_state is None else tuple(conv_state)
    inputs = [q, k, v, a, conv_q, conv_k, doubled, *tails, *state]
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
