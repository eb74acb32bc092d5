"""LAWCAT attention from raw projections in one launch, on TPUs (Pallas, Mosaic).

Prefill is the chunk loop of ``kernels_pallas.gated_linear_attention.tpu`` with q, k and gates formed in VMEM: nothing but q, k, v, the gate
logits and o passes through HBM. A program holds the kv heads of its query heads once; each query head
convolves them with its own taps. A chunk takes two passes over its tiles:

1. convolution and scores u [phi, -phi] of q and k, kept in VMEM. Rows are shifted by loads that begin between tiles of
   eight rows, which is free for float32 tiles 128 lanes wide; a chunk leaves its last rows in front of the next one's.
2. softmaxes, gates, and the tile functions of the gated linear attention.

Between the passes stands the one branch: softmax needs no maximum subtracted while all scores of the chunk stay within
``LARGEST_SCORE``, and lane maxima are the most expensive part of a softmax here. Above it they are subtracted.

One token (decoding) is a launch of its own: convolution, features, gate, state update in place, read-out.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import LOG2E, out_struct
from kernels_pallas.gated_linear_attention import tpu as gla
from kernels_pallas.gated_linear_attention import tpu_decode
from kernels_pallas.gated_linear_attention.tpu_plan import (
    LANES,
    VMEM_BUDGET_BYTES,
    Plan,
    flat,
    gate_matrices,
    make_plan,
    pack_state,
    unflat,
    unpack_state,
    vmem_bytes,
)
from kernels_pallas.gated_linear_attention.tpu_tiles import TileInputs, clean, dot, spread_lanes, tile_heads, valid_rows
from kernels_pallas.lawcat_attention.tpu_tiles import (
    LARGEST_SCORE,
    below_peak,
    convolve,
    log_gates,
    softmax_ones,
    softmaxes,
)

HALO = 8
"""Rows kept in front of a chunk: one tile of float32, so up to nine taps."""

f32 = jnp.float32


class KernelSpec(NamedTuple):
    """Static arguments of the kernels: ``half`` features of each softmax (f), ``taps`` of the convolutions, the gate's
    normalizer and bound, and which optional inputs there are."""

    half: int
    taps: int
    gate_normalizer: float
    bound: float | None
    normalize: bool
    has_state: bool
    has_tails: bool
    has_lengths: bool


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
    del conv_k, normalize
    if segments:
        return "the convolution of the kernel crosses documents (segment_ids)"
    if q.shape[1] == 1 and lengths:
        return "the kernel of one token takes no lengths"
    features, width = 2 * phi.shape[-1], q.shape[-1]
    if conv_q.shape[1] - 1 > HALO:
        return f"the convolutions may have {HALO + 1} taps, got {conv_q.shape[1]}"
    if q.shape[1] == 1:
        return tpu_decode.refusal(_step(q, k, v, gate_logits))
    plan = _plan(q, v, gate_logits, features, gate_lower_bound)
    if plan.lanes > LANES or features != plan.width or width > features:
        # Softmaxes fill the lanes of a head, which spares every mask but their own.
        return (
            f"2 f must be a power of two from 16 to {LANES}, at least d and V, with heads that fill tiles of {LANES} "
            f"lanes; got d = {width}, f = {phi.shape[-1]}, V = {v.shape[-1]} and {q.shape[2]} heads"
        )
    need = vmem_bytes(plan, backward=False) + sum(4 * np.prod(x) for x in _scratch_shapes(plan))
    if need > VMEM_BUDGET_BYTES:
        return f"a program with {plan.heads_block} heads needs about {int(need) >> 20} MiB of VMEM"
    return None


def _plan(q, v, gate_logits, features: int, bound: float | None) -> Plan:
    return make_plan(jax.ShapeDtypeStruct((*q.shape[:-1], features), q.dtype), v, gate_logits, bound, forward=True)


# Prefill


def _key_heads(plan: Plan) -> list[list[int]]:
    """The different tiles of raw keys of a program: the kv head under each packed query head."""
    found = {tuple(tile_heads(plan, tile, plan.v_group)) for tile in range(plan.tiles)}
    return [list(heads) for heads in sorted(found)]


def _scratch_shapes(plan: Plan) -> list[tuple[int, ...]]:
    """Raw rows of q and of k behind their halo, and the scores of both: float32."""
    rows = (HALO + plan.chunk, plan.lanes)
    return [(plan.tiles, *rows), (len(_key_heads(plan)), *rows), (2, plan.tiles, plan.chunk, plan.lanes)]


def _move_halo(tails: Any, rows_ref: Any, heads: list[list[int]], plan: Plan) -> None:
    """Puts the last rows of the chunk before, or ``tails``, in front of tiles that hold ``heads``."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for tile, of in enumerate(heads):
            if tails is None:
                rows_ref[tile, plan.chunk :] = jnp.zeros((HALO, plan.lanes), f32)
            else:
                rows_ref[tile, plan.chunk :] = spread_lanes(tails[0].astype(f32), of, plan)

    rows_ref[:, :HALO] = rows_ref[:, plan.chunk :]


def _load_rows(block_ref: Any, rows_ref: Any, tile: int, heads: list[int], plan: Plan) -> None:
    # Rows of padding may hold anything: convolution, scores and softmaxes bring it to no row before them.
    rows_ref[tile, HALO:] = spread_lanes(block_ref[0], heads, plan).astype(f32)


def _convolved(rows_ref: Any, tile: int, w_ref: Any, lanes: slice, plan: Plan, spec: KernelSpec) -> jax.Array:
    first = HALO - (spec.taps - 1)
    rows = [rows_ref[tile, first + j : first + j + plan.chunk, :] for j in range(spec.taps)]
    return convolve(rows, [w_ref[j : j + 1, lanes] for j in range(spec.taps)], plan.dtype)


def _prefill_kernel(*refs, plan: Plan, spec: KernelSpec) -> None:
    refs = list(refs)
    q_ref, k_ref, v_ref, a_ref, m_ref, wq_ref, wk_ref, phi_ref = refs[:8]
    o_ref, S_ref, z_ref, q_rows, k_rows, scores_ref = refs[-6:]
    given = refs[8:-6]
    lengths_ref = given.pop(0) if spec.has_lengths else None
    tails = [given.pop(0) for _ in range(2)] if spec.has_tails else [None, None]
    gla.start_state(given, (S_ref, z_ref), spec.has_state)

    chunk, half = pl.program_id(2), spec.half
    # Features and gates of zero rows are not zero.
    length = None if lengths_ref is None else lengths_ref[0, :, :1]
    valid = valid_rows(plan, chunk, neutral_padding=False, length=length)
    keys = _key_heads(plan)
    key_of = [keys.index(tile_heads(plan, tile, plan.v_group)) for tile in range(plan.tiles)]
    queries = [tile_heads(plan, tile, 1) for tile in range(plan.tiles)]
    _move_halo(tails[0], q_rows, queries, plan)
    _move_halo(tails[1], k_rows, keys, plan)
    peak = None
    for tile in range(plan.tiles):
        lanes = slice(tile * plan.lanes, (tile + 1) * plan.lanes)
        key = key_of[tile]
        _load_rows(q_ref, q_rows, tile, queries[tile], plan)
        if key not in key_of[:tile]:
            _load_rows(k_ref, k_rows, key, keys[key], plan)
        for i, (rows, at, w_ref) in enumerate(((q_rows, tile, wq_ref), (k_rows, key, wk_ref))):
            scores = dot(_convolved(rows, at, w_ref, lanes, plan, spec), phi_ref[tile], "nn")
            scores_ref[i, tile] = scores
            # A tile holds the scores and their negatives, so its maximum bounds both signs.
            top = jnp.max(scores, axis=0, keepdims=True)
            peak = top if peak is None else jnp.maximum(peak, top)

    assert peak is not None  # a program has at least one tile

    # Not "above": what padding holds may be NaN.
    @pl.when(jnp.logical_not(jnp.max(peak) <= LARGEST_SCORE))
    def _():
        def of_valid_rows(tile, top):
            for i in range(2):
                top = jnp.maximum(top, jnp.max(clean(scores_ref[i, tile], valid), axis=0, keepdims=True))
            return top

        # What padding holds must not decide how the others are rounded.
        top = lax.fori_loop(0, plan.tiles, of_valid_rows, jnp.zeros((1, plan.lanes), f32))

        @pl.when(jnp.max(top) > LARGEST_SCORE)
        def _():
            def subtract(tile, _):
                for i in range(2):
                    scores_ref[i, tile] = below_peak(scores_ref[i, tile], half)

            lax.fori_loop(0, plan.tiles, subtract, None)

    ones = softmax_ones(plan.lanes, half, plan.dtype)
    gates = log_gates(a_ref[0].astype(f32), spec.gate_normalizer, spec.bound, plan.dtype)
    shared = TileInputs(valid, clean(v_ref[0], valid), clean(gates, valid), m_ref, {})
    for tile in range(plan.tiles):
        q, k = (softmaxes(scores_ref[i, tile], half, ones, plan.dtype) for i in range(2))
        if length is not None:  # then the outputs of padding are zero
            q = clean(q, valid)
        gla.attend_tile(tile, q, clean(k, valid), shared, o_ref, S_ref, z_ref, plan, spec.normalize)


def _taps(w: jax.Array, plan: Plan) -> jax.Array:
    """[H, W, d] -> [W', H * width] float32, times log2(e), rows padded to whole tiles."""
    heads, taps, width = w.shape
    w = jnp.pad(w.astype(f32) * LOG2E, ((0, 0), (0, -taps % 8), (0, plan.width - width)))
    return w.swapaxes(0, 1).reshape(w.shape[1], heads * plan.width)


def _feature_matrices(phi: jax.Array, plan: Plan) -> jax.Array:
    """[H, d, f] -> [H / pack, lanes, lanes]: block diagonal, [phi, -phi] for each head of a tile."""
    heads, width, _ = phi.shape
    both = jnp.concatenate([phi, -phi], axis=-1).astype(plan.dtype)
    both = jnp.pad(both, ((0, 0), (0, plan.width - width), (0, 0)))
    both = both.reshape(heads // plan.pack, plan.pack, plan.width, 1, plan.width)
    apart = jnp.eye(plan.pack, dtype=plan.dtype)[:, None, :, None]
    return (both * apart).reshape(heads // plan.pack, plan.lanes, plan.lanes)


def _tails(conv_state: tuple[jax.Array, jax.Array], plan: Plan) -> list[jax.Array]:
    """[B, W - 1, heads, d] -> [B, HALO, heads * width], the rows at the end."""
    out = []
    for x in conv_state:
        batch, rows, heads, width = x.shape
        x = jnp.pad(x, ((0, 0), (HALO - rows, 0), (0, 0), (0, plan.width - width)))
        out.append(x.reshape(batch, HALO, heads * plan.width))
    return out


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
    """See ``kernels_pallas.contract.Layer``: (o, (S, z)). T = 1 takes the decoding kernel."""
    assert numbers is None  # supports() has refused them
    spec = KernelSpec(
        half=phi.shape[-1],
        taps=conv_q.shape[1],
        gate_normalizer=gate_normalizer,
        bound=gate_lower_bound,
        normalize=normalize,
        has_state=initial_state is not None,
        has_tails=conv_state is not None,
        has_lengths=lengths is not None,
    )
    if q.shape[1] == 1:
        return _decode(q, k, v, gate_logits, conv_q, conv_k, phi, initial_state, conv_state, spec)
    plan = _plan(q, v, gate_logits, 2 * phi.shape[-1], gate_lower_bound)
    sp = gla.specs(plan)
    inputs = [flat(x, plan) for x in (q, k, v, gate_logits)]
    inputs.append(jnp.asarray(gate_matrices(plan), plan.dtype))
    inputs += [_taps(conv_q, plan), _taps(conv_k, plan), _feature_matrices(phi, plan)]
    taps = pl.BlockSpec((inputs[5].shape[0], plan.heads_block * plan.width), lambda b, h, t: (0, h))
    matrices = pl.BlockSpec((plan.tiles, plan.lanes, plan.lanes), lambda b, h, t: (h, 0, 0))
    in_specs = [sp.row, sp.v, sp.v, sp.gate, sp.matrices, taps, taps, matrices]
    if lengths is not None:
        # As a vector: scalars in SMEM would cost vmap over the batch.
        inputs.append(jnp.broadcast_to(lengths[:, None, None], (plan.batch, 1, LANES)))
        in_specs.append(pl.BlockSpec((1, 1, LANES), lambda b, h, t: (b, 0, 0)))
    if conv_state is not None:
        inputs += _tails(conv_state, plan)
        for row in (sp.row, sp.v):
            assert row.block_shape is not None  # specs() gives every block a shape
            index = functools.partial(_first_rows, row.index_map)
            in_specs.append(pl.BlockSpec((1, HALO, row.block_shape[2]), index))
    if initial_state is not None:
        inputs += pack_state(*initial_state, plan=plan)
        in_specs += [sp.S, sp.z]

    count = gla.token_heads(plan)
    o, S, z = gla.call(
        functools.partial(_prefill_kernel, plan=plan, spec=spec),
        plan,
        in_specs=in_specs,
        out_specs=[sp.row, sp.S, sp.z],
        out_shape=[out_struct(inputs[0].shape, v.dtype, *inputs), *gla.state_shapes(plan, *inputs)],
        inputs=inputs,
        flops=2 * count * (2 * plan.chunk * plan.width + 4 * plan.width**2 + 2 * spec.taps * plan.width),
        exponentials=count * plan.width * (2 + 4 / plan.g_group),
        name="lawcat_prefill",
        scratch=[pltpu.VMEM(shape, f32) for shape in _scratch_shapes(plan)],
    )
    return unflat(o, plan.heads, plan.values, plan), unpack_state(S, z, plan)


def _first_rows(index_map, b, h, t):
    """The index map of a block over heads, for an array with one block of rows."""
    b, _, h = index_map(b, h, t)
    return b, 0, h


# Decoding


def _step(q, k, v, gate_logits) -> tpu_decode.Step:
    batch, _, heads, width = q.shape
    features, values = gate_logits.shape[-1], v.shape[-1]
    group = heads // k.shape[2]
    return tpu_decode.make_step(batch, heads, features, values, (1, group), (width, features, values))


def _decode_kernel(*refs, step: tpu_decode.Step, group: int, width: int, spec: KernelSpec) -> None:
    refs = list(refs)
    q_ref, k_ref, v_ref, a_ref, wq_ref, wk_ref, phi_ref = refs[:7]
    tails = refs[7:9] if spec.has_tails else [None, None]
    S_in, z_in, *out = refs[-6:]
    dtype, rows = q_ref.dtype, tpu_decode.head_rows

    def features(x_ref: Any, tail_ref: Any, head: int, w_ref: Any, query_head: int) -> jax.Array:
        lanes = slice(head * width, (head + 1) * width)
        shifted, first = [rows(x_ref, head, width)], spec.taps - 1
        if tail_ref is not None:
            shifted = [tail_ref[:, j, lanes].astype(f32) for j in range(first)] + shifted
            first = 0
        taps = [w_ref[query_head, j : j + 1, :].astype(f32) * LOG2E for j in range(first, spec.taps)]
        scores = dot(convolve(shifted, taps, dtype), phi_ref[query_head].astype(dtype), "nt")
        scores = jnp.concatenate([scores, -scores], axis=1)
        return softmaxes(below_peak(scores, spec.half), spec.half, None, f32)

    heads = []
    for h in range(step.heads_block):
        gates = log_gates(rows(a_ref, h // group, step.features), spec.gate_normalizer, spec.bound, f32)
        q, k = features(q_ref, tails[0], h, wq_ref, h), features(k_ref, tails[1], h // group, wk_ref, h)
        heads.append(tpu_decode.Head(q, k, rows(v_ref, h // group, step.values), jnp.exp(gates)))
    tpu_decode.update(heads, (S_in, z_in), *out, normalize=spec.normalize)


def _decode(q, k, v, a, conv_q, conv_k, phi, state, conv_state, spec: KernelSpec) -> Any:
    """One token: everything in one launch; the state is updated in place (when the caller donates it)."""
    step = _step(q, k, v, a)
    batch, heads, width, group = step.batch, step.heads, q.shape[-1], step.heads // k.shape[2]
    if state is None:
        state = (
            jnp.zeros((batch, heads, step.features, step.values), f32),
            jnp.zeros((batch, heads, step.features), f32),
        )
    # [H, f, d]: the layout that XLA gives to a narrow f, so that reading it takes no copy.
    inputs = [*(x.reshape(batch, -1) for x in (q, k, v, a)), conv_q, conv_k, phi.swapaxes(1, 2)]
    specs = [
        step.rows(width),
        step.rows(width, group),
        step.rows(step.values, group),
        step.rows(step.features, group),
        *(step.parameter(x) for x in inputs[4:]),
    ]
    if conv_state is not None:
        for x, share in zip(conv_state, (1, group), strict=True):
            inputs.append(x.reshape(batch, x.shape[1], -1))
            block = (step.batch_block, x.shape[1], step.heads_block // share * width)
            specs.append(pl.BlockSpec(block, lambda b, h: (b, 0, h)))
    kernel = functools.partial(_decode_kernel, step=step, group=group, width=width, spec=spec)
    o, state = tpu_decode.launch(kernel, step, inputs, specs, state, v.dtype, "lawcat_decode", gla.interpreter())
    return o.reshape(batch, 1, heads, step.values), state
