"""Backward pass of gated linear attention on TPUs: one kernel for the chunk states, one that walks the chunks from
last to first.

The reverse kernel recomputes scores, numerator and denominator from the same rounded operands as the forward kernel,
because the gradient of a diagonal score cancels against the gradient of the denominator. It keeps the cotangents of
the state in VMEM and anchors the gate gradient at every chunk: rounding never accumulates along the sequence.
Gradients of shared values and gates are summed over the query heads of a group in VMEM where a program holds the
whole group; else each program writes a float32 part and XLA adds them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import out_struct
from kernels_pallas.gated_linear_attention.tpu import call, chunk_states, specs, state_shapes, token_heads
from kernels_pallas.gated_linear_attention.tpu_plan import (
    Plan,
    flat,
    gate_matrices,
    make_plan,
    pack_state,
    unflat,
    unpack_state,
)
from kernels_pallas.gated_linear_attention.tpu_tiles import (
    Decays,
    Scores,
    TileInputs,
    clean,
    dot,
    head_sums,
    mask_scores,
    pick_heads,
    read_out,
    reciprocal,
    scaled,
    spread_columns,
    stack_heads,
    state_operand,
    tile_heads,
    tile_inputs,
    tile_of,
)


class _Rows:
    """Sums of row blocks that share a factor: the factor is applied once, at the end."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.parts: dict[tuple[int, int], tuple[jax.Array | None, int, jax.Array]] = {}

    def add(self, start: int, factor: jax.Array | None, x: jax.Array) -> None:
        """Adds factor * x to the rows from ``start`` on."""
        key = (id(factor), start)
        before = self.parts.get(key)
        self.parts[key] = (factor, start, x if before is None else before[2] + x)

    def total(self) -> jax.Array:
        """[C, lanes] float32."""
        plan = self.plan
        size = min(x.shape[0] for _, _, x in self.parts.values())
        blocks: list = [None] * (plan.chunk // size)
        for factor, start, x in self.parts.values():
            x = x if factor is None else x * factor
            for n in range(x.shape[0] // size):
                at, part = start // size + n, x[n * size : (n + 1) * size]
                blocks[at] = part if blocks[at] is None else blocks[at] + part
        return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=0)


class _TileGrads:
    """Gradients of one tile, float32 [C, lanes]. The gate gradient is ``dgate``, q dq - k dk within the chunk, summed
    over this row and the later ones, plus ``dgate_out`` (or None), k dk through the state at the end, over the earlier
    ones, plus ``anchor``, what goes from state to state."""

    def __init__(self, dq, dk, dv, dgate, dgate_out, anchor, dS, dz):
        self.dq, self.dk, self.dv, self.dS, self.dz = dq, dk, dv, dS, dz
        self.dgate, self.dgate_out, self.anchor = dgate, dgate_out, anchor


class _Cotangent(NamedTuple):
    """Cotangent of a tile's output in the compute dtype, exactly as it came: where it meets values and states, whose
    differences matter, it is not rounded again. 1 / den goes to the other operand; delta is -(do . o). Both [C, lanes],
    or [C, 1] for one head, or None when not normalised."""

    do: jax.Array
    inverse: jax.Array | None
    delta: jax.Array | None

    def over_den(self, x: jax.Array) -> jax.Array:
        """x [C, lanes] / den."""
        return x if self.inverse is None else x * self.inverse


def _cotangent(do: jax.Array, num: jax.Array, inverse: jax.Array | None, plan: Plan) -> _Cotangent:
    """do, num float32 [C, lanes]."""
    if inverse is None:
        return _Cotangent(do.astype(plan.dtype), None, None)
    delta = spread_columns(head_sums(do * num * -inverse, plan), plan)
    return _Cotangent(do.astype(plan.dtype), inverse, delta)


def _beside_scores(x: jax.Array, rows: slice, per_head: int, plan: Plan) -> jax.Array:
    """Rows of x, [C, lanes] with one value a head or [C, 1], laid out like scores [rows, pack * per_head]."""
    if plan.pack == 1 or per_head == plan.width:
        return x[rows]
    return spread_columns([x[rows, h * plan.width : h * plan.width + 1] for h in range(plan.pack)], plan, per_head)


def _own_apart(plan: Plan, normalize: bool) -> bool:
    """Whether the score of a token with itself goes apart.

    There are no gates in it, so its parts of q dq and k dk in dlog_g cancel; and where it is most of the denominator,
    v - o is small. With strong gates the rounding of such differences would be all that is left; without a
    denominator, or in float32, so it would with the layer's own bound. It costs a tenth of the kernel's bundles.
    """
    return plan.strong_gates or not normalize or plan.dtype == jnp.float32


def _score_grads(score: Scores, decay_columns, y: _Cotangent, v, dq: _Rows, dk: _Rows, plan: Plan, *, own: bool):
    """Adds what one block of columns contributes to dq and dk; returns its part of dv [size, lanes]."""
    start, size = decay_columns.start, decay_columns.size
    rows, columns = slice(start, plan.chunk), slice(start, start + size)
    grad, weights = dot(y.do[rows], stack_heads(v[columns], plan), "nt"), score.a
    if y.inverse is not None and y.delta is not None:
        inverse = _beside_scores(y.inverse, rows, size, plan)
        grad = (grad + _beside_scores(y.delta, rows, size, plan)) * inverse
        weights = (weights.astype(jnp.float32) * inverse).astype(plan.dtype)
    for term, (left, right) in zip(decay_columns.used(own=own), score.operands, strict=True):
        masked = mask_scores(grad, term.mask, decay_columns, plan, own=own).astype(plan.dtype)
        dq.add(start, term.q, dot(masked, right, "nn"))
        dk.add(start, term.k, pick_heads(dot(masked, left, "tn"), plan))
    return pick_heads(dot(weights, y.do[rows], "tn"), plan)


def _tile_grads(q, k, v, do, S, z, dS, dz, decay: Decays, plan: Plan, normalize: bool) -> _TileGrads:
    """Gradients of a tile; S, z the state at the chunk's start, dS, dz the cotangents (compact, float32) of the state
    at its end."""
    apart = _own_apart(plan, normalize)
    num, before, q_in, found = read_out(q, k, v, S, z, decay, plan, normalize, own=not apart)
    own = spread_columns(head_sums(q * k, plan), plan) if apart else 0.0
    inverse, difference = None, v.astype(jnp.float32)
    if before is not None:
        inverse = reciprocal(before + own, plan)
        if apart:
            num, difference = num + own * difference, (difference * before - num) * inverse
    y = _cotangent(do, num, inverse, plan)

    dq, dk = _Rows(plan), _Rows(plan)
    into = dot(y.do, state_operand(S, decay.into, plan), "nn")
    if y.delta is not None:
        into = into + y.delta * (z if decay.into is None else z * decay.into)
    dq.add(0, decay.into_rows, y.over_den(into))
    parts = [
        _score_grads(score, columns, y, v, dq, dk, plan, own=not apart)
        for score, columns in zip(found, decay.columns, strict=True)
    ]
    dq = dq.total()

    # Through the state: dk* = out_rows * (dS v + dz).
    scale = 1.0 if decay.out is None else decay.out
    out = dot(v, state_operand(dS, decay.out, plan), "nn") + dz * scale
    dk_state = out * decay.out_rows
    dk = dk.total()
    anchor = decay.total * (jnp.sum(S.astype(jnp.float32) * dS, axis=0, keepdims=True) + z * dz)
    dgate, dgate_out = q * dq - k * dk, k * dk_state
    if not apart:
        # One sum instead of two: what all rows write, less what the later ones do.
        dgate, anchor, dgate_out = dgate - dgate_out, anchor + jnp.sum(dgate_out, axis=0, keepdims=True), None
    k_out = scaled(k, decay.out_rows, plan)
    dv = jnp.concatenate(parts, axis=0) if len(parts) > 1 else parts[0]
    dv = dv + dot(k_out, state_operand(dS, decay.out, plan), "nt")

    q_in = y.over_den(q_in.astype(jnp.float32)).astype(plan.dtype)
    update = pick_heads(dot(y.do, q_in, "tn"), plan)
    factor = 1.0 if decay.into is None else decay.into
    dS = decay.total * dS + factor * update
    dz = decay.total * dz
    if y.delta is not None:
        dz = dz + factor * jnp.sum(y.delta * q_in.astype(jnp.float32), axis=0, keepdims=True)
    dk = dk + dk_state
    if apart:
        grad = y.do.astype(jnp.float32)
        own_grad = y.over_den(spread_columns(head_sums(grad * difference, plan), plan))
        dq, dk, dv = dq + own_grad * k, dk + own_grad * q, dv + y.over_den(own * grad)
    return _TileGrads(dq, dk, dv, dgate, dgate_out, anchor, dS, dz)


def _add_group(total: dict[tuple[int, ...], jax.Array], x: jax.Array, heads: list[int]) -> None:
    """Adds a tile to the sum of the tiles that see the same kv heads."""
    key = tuple(heads)
    total[key] = total[key] + x if key in total else x


def _by_head(total: dict[tuple[int, ...], jax.Array], plan: Plan) -> dict[int, jax.Array]:
    """Sums per kv head [C, width], by head; a tile of distinct heads stays whole under its first head."""
    summed: dict[int, jax.Array] = {}
    for heads, x in total.items():
        if len(set(heads)) == plan.pack:
            summed[heads[0]] = x
            continue
        for packed, head in enumerate(heads):
            part = x[:, packed * plan.width : (packed + 1) * plan.width]
            summed[head] = summed[head] + part if head in summed else part
    return summed


def _store(ref, summed: dict[int, jax.Array], plan: Plan) -> None:
    for head, x in summed.items():
        lanes = slice(head * plan.width, head * plan.width + x.shape[1])
        ref[(0,) * (len(ref.shape) - 2) + (slice(None), lanes)] = x.astype(ref.dtype)


def _gate_sums(within: jax.Array, out: jax.Array | None, plan: Plan) -> jax.Array:
    """``within`` summed over this row and the later ones of the chunk, ``out`` over the earlier ones; float32, of
    bfloat16 operands in two halves."""
    i = lax.broadcasted_iota(jnp.int32, (plan.chunk, plan.chunk), 0)
    j = lax.broadcasted_iota(jnp.int32, (plan.chunk, plan.chunk), 1)

    def product(matrix: jax.Array, x: jax.Array) -> jax.Array:
        matrix, high = jnp.where(matrix, 1.0, 0.0).astype(plan.dtype), x.astype(plan.dtype)
        if plan.dtype == jnp.float32:
            return dot(matrix, high, "nn")
        low = (x - high.astype(jnp.float32)).astype(plan.dtype)
        return dot(matrix, high, "nn") + dot(matrix, low, "nn")

    later = product(j >= i, within)
    return later if out is None else later + product(j < i, out)


def _backward_kernel(*refs, plan: Plan, normalize: bool):
    q_ref, k_ref, v_ref, g_ref, m_ref, do_ref, states_ref, zs_ref, dSN_ref, dzN_ref, *out = refs
    dq_ref, dk_ref, dv_ref, dg_ref, dS_ref, dz_ref = out

    @pl.when(pl.program_id(2) == 0)
    def _():
        dS_ref[...] = dSN_ref[...]
        dz_ref[...] = dzN_ref[...]

    shared: TileInputs = tile_inputs(v_ref, g_ref, m_ref, plan.chunks - 1 - pl.program_id(2), plan)
    dv, dgate, dgate_out, anchor = {}, {}, {}, {}
    for tile in range(plan.tiles):
        lanes = slice(tile * plan.lanes, (tile + 1) * plan.lanes)
        q, k = tile_of(q_ref, tile, shared.valid, plan), tile_of(k_ref, tile, shared.valid, plan)
        grads = _tile_grads(
            q,
            k,
            shared.values(tile, plan),
            clean(do_ref[0, :, lanes], shared.valid).astype(jnp.float32),
            states_ref[0, 0, tile],
            zs_ref[0, 0, 0, tile : tile + 1],
            dS_ref[0, tile],
            dz_ref[0, 0, tile : tile + 1],
            shared.decays(tile, plan),
            plan,
            normalize,
        )
        dq_ref[0, :, lanes] = grads.dq.astype(dq_ref.dtype)
        dk_ref[0, :, lanes] = grads.dk.astype(dk_ref.dtype)
        dS_ref[0, tile], dz_ref[0, 0, tile : tile + 1] = grads.dS, grads.dz
        _add_group(dv, grads.dv, tile_heads(plan, tile, plan.v_group))
        _add_group(dgate, grads.dgate, tile_heads(plan, tile, plan.g_group))
        if grads.dgate_out is not None:
            _add_group(dgate_out, grads.dgate_out, tile_heads(plan, tile, plan.g_group))
        _add_group(anchor, grads.anchor, tile_heads(plan, tile, plan.g_group))
    _store(dv_ref, _by_head(dv, plan), plan)
    dg = {heads: _gate_sums(x, dgate_out.get(heads), plan) + anchor[heads] for heads, x in dgate.items()}
    _store(dg_ref, _by_head(dg, plan), plan)


def _group_output(group: int, dtype, plan: Plan, time: int, like) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    """Where dv or dlog_g goes: [B, T', heads * width], or float32 parts [parts, B, T', ...] when several programs
    share a kv head."""
    count, last = plan.kv_heads(group), plan.chunks - 1
    share = max(1, group // plan.heads_block)
    width = plan.heads // group * plan.width
    block = (plan.chunk, count * plan.width)
    if share == 1:
        return out_struct((plan.batch, time, width), dtype, *like), pl.BlockSpec(
            (1, *block), lambda b, h, t: (b, last - t, h)
        )

    def index(b, h, t):
        part = lax.rem(h, np.int32(share))
        return part, b, last - t, lax.div(h, np.int32(share))

    return out_struct((share, plan.batch, time, width), jnp.float32, *like), pl.BlockSpec((1, 1, *block), index)


def backward(residuals, do, dstate, *, normalize: bool, lower_bound: float | None):
    """See ``kernels_pallas.contract``."""
    q, k, v, log_g, initial_state = residuals
    plan = make_plan(q, v, log_g, lower_bound)
    packed = None if initial_state is None else pack_state(*initial_state, plan=plan)
    matrices = jnp.asarray(gate_matrices(plan), plan.dtype)
    q_, k_, v_, g_, do_ = (flat(x, plan) for x in (q, k, v, log_g, do))
    states, zs = chunk_states([k_, v_, g_, matrices], packed, plan)

    sp = specs(plan, reverse=True)
    inputs = [q_, k_, v_, g_, matrices, do_, states, zs, *pack_state(*dstate, plan=plan)]
    dv_shape, dv_spec = _group_output(plan.v_group, v.dtype, plan, q_.shape[1], inputs)
    dg_shape, dg_spec = _group_output(plan.g_group, log_g.dtype, plan, q_.shape[1], inputs)
    row = out_struct(q_.shape, q.dtype, *inputs)
    count = token_heads(plan)
    dq, dk, dv, dg, dS, dz = call(
        lambda *refs: _backward_kernel(*refs, plan=plan, normalize=normalize),
        plan,
        in_specs=[sp.row, sp.row, sp.v, sp.gate, sp.matrices, sp.row, sp.states, sp.zs, sp.S, sp.z],
        out_specs=[sp.row, sp.row, dv_spec, dg_spec, sp.S, sp.z],
        out_shape=[row, row, dv_shape, dg_shape, *state_shapes(plan, *inputs)],
        inputs=inputs,
        flops=2 * count * (5 * plan.chunk * plan.width + 6 * plan.width**2),
        exponentials=2 * count * plan.width // plan.g_group,
        name="gla_backward",
    )
    dv = dv if dv.ndim == 3 else jnp.sum(dv, axis=0)
    dg = dg if dg.ndim == 3 else jnp.sum(dg, axis=0)
    dinitial = (None, None) if initial_state is None else unpack_state(dS, dz, plan)
    return (
        unflat(dq, plan.heads, plan.features, plan),
        unflat(dk, plan.heads, plan.features, plan),
        unflat(dv, v.shape[2], plan.values, plan).astype(v.dtype),
        unflat(dg, log_g.shape[2], plan.features, plan).astype(log_g.dtype),
        dinitial,
    )
