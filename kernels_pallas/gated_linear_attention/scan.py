"""Gated linear attention in chunks, in plain XLA: batched matrix products inside chunks, an associative scan over chunk
summaries.

Notation of one chunk of C rows and one head: b is the inclusive cumulative sum of log_g, S and z the state at the
chunk's start, q^ = q e^(b - r) and k^ = k e^(r - b) for a reference r. Two ways to keep the exponents representable:

* one reference r = b_C / 2 when C |log_g| <= 80 (so always with the bound -1.25 and C = 64): operands stay within
  e^+-40;
* otherwise binary sub-chunks: rows in the second half of a block against columns in its first half with r at the
  border, so that every exponent is <= 0, down to diagonal blocks small enough for one reference (1 x 1 when there is no
  bound).

Exponents are sums of the gates they span (products with a 0/+-1/2 matrix), never differences of long cumulative sums.
bfloat16 inputs use bfloat16 operands with float32 accumulation; the denominator sums the same rounded scores that the
numerator uses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.chunking import MAX_NATS, reference_rows
from kernels_pallas.common import EPS, einsum, match_varying, target_platform

STATE_BUDGET_BYTES = 256 * 2**20
"""Chunk states of one group; longer sequences run as a ``lax.scan`` over groups of chunks."""

CPU_STATE_BUDGET_BYTES = 2**20
"""On a CPU a group that stays in the cache is what counts (measured: 1.5 times faster than one group at 8 x 2048)."""


class Plan(NamedTuple):
    """Static sizes: ``chunk`` rows, the diagonal ``block`` of rows that share a reference, ``group`` chunks that are computed
    together, and ``steps``, the number of groups."""

    chunk: int
    block: int
    group: int
    steps: int


def make_plan(q_shape, value_dim: int, lower_bound: float | None, platform: str) -> Plan:
    """Sizes for q [B, T, H, K]: chunks of 64 (fewer for a shorter T), the largest safe block, groups within the memory
    budget."""
    batch, length, heads, features = q_shape
    cpu = platform == "cpu"
    # Measured at d = 32 on a CPU: shorter chunks do less work within chunks, but one or two long ones win at T = 128.
    limit = 32 if cpu and length > 256 and max(features, value_dim) <= 64 else 64
    chunk = min(limit, 1 << max(0, length - 1).bit_length())
    if lower_bound is None or -lower_bound > MAX_NATS:
        # Not even one row may have a reference of its own: a chunk of one row would be a block of one reference.
        chunk = max(chunk, 2)
    block = reference_rows(lower_bound, chunk)
    chunks = -(-length // chunk)
    budget = CPU_STATE_BUDGET_BYTES if cpu else STATE_BUDGET_BYTES
    most = max(2 if cpu else 1, budget // (batch * heads * features * value_dim * 4))
    steps = -(-chunks // most)
    return Plan(chunk, block, -(-chunks // steps), steps)


# Small pieces. Arrays inside a group are [B, heads, n, C, width]; gates may have fewer heads than q, and so may values.


def _round(x: jax.Array, dtype) -> jax.Array:
    """``x`` in ``dtype``. reduce_precision because XLA may drop a float32 -> bfloat16 -> float32 round trip, and with
    it the agreement of numerator and denominator."""
    if dtype == jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def _grouped(x: jax.Array, heads: int) -> jax.Array:
    """[B, H, ...] -> [B, heads, H / heads, ...]."""
    return x.reshape(x.shape[0], heads, x.shape[1] // heads, *x.shape[2:])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _times(x: jax.Array, gate: jax.Array) -> jax.Array:
    """x [B, H, ...] times gate [B, Hg, ...], query head h with gate head h // (H / Hg)."""
    if x.shape[1] == gate.shape[1]:
        return x * gate
    return _flat(_grouped(x, gate.shape[1]) * gate[:, :, None])


def _rows(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """matrix [i, j] times x [..., j, c], exactly enough: the matrix holds 0, +-1/2, 1."""
    return jnp.einsum("ij,...jc->...ic", jnp.asarray(matrix, jnp.float32), x, precision=lax.Precision.HIGHEST)


def _centred(size: int) -> np.ndarray:
    """b - b_C / 2 as a matrix product."""
    return np.tril(np.ones((size, size), np.float32)) - 0.5


def _lower(size: int) -> np.ndarray:
    return np.tril(np.ones((size, size), np.float32))


def _after(size: int) -> np.ndarray:
    """b_C - b: the sum over later rows."""
    return np.triu(np.ones((size, size), np.float32), 1)


class _Decay(NamedTuple):
    """Factors of one group of chunks, per gate head. q_in = q * rows meets the state scaled by ``into``; k_out = k *
    cols scaled by ``out`` adds to it; ``total`` is e^(b_C). ``diagonal`` and ``levels`` hold (row factor, column
    factor) of the score blocks."""

    rows: jax.Array
    cols: jax.Array
    into: jax.Array | None
    out: jax.Array | None
    total: jax.Array
    diagonal: tuple[jax.Array, jax.Array] | None
    levels: tuple[tuple[jax.Array, jax.Array], ...]


def _decay(log_g: jax.Array, plan: Plan) -> _Decay:
    """log_g float32 [B, Hg, n, C, K] -> factors."""
    chunk, block = plan.chunk, plan.block
    if block == chunk:
        rows = jnp.exp(_rows(_centred(chunk), log_g))
        half = jnp.exp(0.5 * jnp.sum(log_g, axis=-2))
        return _Decay(rows, 1.0 / rows, half, half, half * half, None, ())
    diagonal = None
    if block > 1:
        row = jnp.exp(_rows(_centred(block), log_g.reshape(*log_g.shape[:-2], chunk // block, block, -1)))
        diagonal = (row, 1.0 / row)
    levels = []
    size = block
    while size < chunk:
        halves = log_g.reshape(*log_g.shape[:-2], chunk // (2 * size), 2, size, -1)
        first, second = halves[..., 0, :, :], halves[..., 1, :, :]
        levels.append((jnp.exp(_rows(_lower(size), second)), jnp.exp(_rows(_after(size), first))))
        size *= 2
    rows, cols = jnp.exp(_rows(_lower(chunk), log_g)), jnp.exp(_rows(_after(chunk), log_g))
    return _Decay(rows, cols, None, None, jnp.exp(jnp.sum(log_g, axis=-2)), diagonal, tuple(levels))


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[..., C, width] -> [..., C / size, size, width]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1])


def _half(x: jax.Array, size: int, which: int) -> jax.Array:
    """First or second halves of the blocks of 2 * size rows."""
    return x.reshape(*x.shape[:-2], x.shape[-2] // (2 * size), 2, size, x.shape[-1])[..., which, :, :]


def _into_half(x: jax.Array, which: int) -> jax.Array:
    """The inverse of _half, zeros in the other half; [..., n, size, width] -> [..., n * 2 * size, width]."""
    zeros = jnp.zeros_like(x)
    pair = jnp.stack([x, zeros] if which == 0 else [zeros, x], axis=-3)
    return pair.reshape(*pair.shape[:-4], -1, pair.shape[-1])


def _masked(x: jax.Array, diagonal: int = 0) -> jax.Array:
    """Zero above the ``diagonal``, by ``where``: the entries there may be inf."""
    return jnp.where(np.tri(x.shape[-1], k=diagonal) > 0, x, 0.0)


def _scores(q, k, q_in, k_out, decay: _Decay, plan: Plan, dtype) -> jax.Array:
    """A [B, H, n, C, C] float32, zero above the diagonal. q, k float32; q_in, k_out the rounded tiles of the chunk."""
    if plan.block == plan.chunk:
        return _masked(einsum("bhnic,bhnjc->bhnij", q_in, k_out))
    if decay.diagonal is None:
        scores = jnp.sum(q * k, axis=-1)[..., None, None]
    else:
        row, col = decay.diagonal
        left = _round(_times(_blocks(q, plan.block), row), dtype)
        right = _round(_times(_blocks(k, plan.block), col), dtype)
        scores = _masked(einsum("bhnmic,bhnmjc->bhnmij", left, right))
    size = plan.block
    for row, col in decay.levels:
        left = _round(_times(_half(q, size, 1), row), dtype)
        right = _round(_times(_half(k, size, 0), col), dtype)
        cross = einsum("bhnmic,bhnmjc->bhnmij", left, right)
        pair = scores.reshape(*scores.shape[:-3], -1, 2, size, size)
        top = jnp.concatenate([pair[..., 0, :, :], jnp.zeros_like(cross)], axis=-1)
        bottom = jnp.concatenate([cross, pair[..., 1, :, :]], axis=-1)
        scores = jnp.concatenate([top, bottom], axis=-2)
        size *= 2
    return scores[..., 0, :, :]


def _scores_vjp(dA, q, k, q_in, k_out, decay: _Decay, plan: Plan, dtype) -> tuple[jax.Array, jax.Array]:
    """Sum_j dA_ij k_j e^(b_i - b_j) and Sum_i dA_ij q_i e^(b_i - b_j) for dA below the diagonal. Where a chunk has one
    reference, the factor of a result's own row is left to the caller."""
    if plan.block == plan.chunk:
        return einsum("bhnij,bhnjc->bhnic", dA, k_out), einsum("bhnij,bhnic->bhnjc", dA, q_in)
    dq, dk = jnp.zeros_like(q), jnp.zeros_like(k)
    grad, size = dA[..., None, :, :], plan.chunk // 2
    for row, col in reversed(decay.levels):
        cross = grad[..., size:, :size]
        left = _round(_times(_half(q, size, 1), row), dtype)
        right = _round(_times(_half(k, size, 0), col), dtype)
        dq += _into_half(_times(einsum("bhnmij,bhnmjc->bhnmic", cross, right), row), 1)
        dk += _into_half(_times(einsum("bhnmij,bhnmic->bhnmjc", cross, left), col), 0)
        grad = jnp.stack([grad[..., :size, :size], grad[..., size:, size:]], axis=-3)
        grad = grad.reshape(*grad.shape[:-4], -1, size, size)
        size //= 2
    if decay.diagonal is None:
        return dq, dk
    row, col = decay.diagonal
    left = _round(_times(_blocks(q, plan.block), row), dtype)
    right = _round(_times(_blocks(k, plan.block), col), dtype)
    dq += _times(einsum("bhnmij,bhnmjc->bhnmic", grad, right), row).reshape(q.shape)
    dk += _times(einsum("bhnmij,bhnmic->bhnmjc", grad, left), col).reshape(k.shape)
    return dq, dk


def _scan_states(total, S, z, S0, z0, *, reverse: bool = False):
    """States *before* every chunk, and the state after all of them, from S0, z0 and the chunk summaries.

    total [B, Hg, n, K]; S [B, H, n, K, V]; z [B, H, n, K]. ``reverse`` runs from the last chunk to the first.
    """
    heads = total.shape[1]
    S, z = _grouped(S, heads), _grouped(z, heads)
    total = total[:, :, None]

    def combine(earlier, later):
        total_a, S_a, z_a = earlier
        total_b, S_b, z_b = later
        return total_a * total_b, total_b[..., None] * S_a + S_b, total_b * z_a + z_b

    # The initial state enters as a chunk of its own, so that one scan yields both the states before and the state
    # after.
    S0, z0 = _grouped(S0, heads)[:, :, :, None], _grouped(z0, heads)[:, :, :, None]
    ones = jnp.ones_like(total[:, :, :, :1])
    order = (lambda first, rest: [rest, first]) if reverse else (lambda first, rest: [first, rest])
    elements = (
        jnp.concatenate(order(ones, total), axis=3),
        jnp.concatenate(order(S0, S), axis=3),
        jnp.concatenate(order(z0, z), axis=3),
    )
    _, S, z = lax.associative_scan(combine, elements, reverse=reverse, axis=3)
    S, z = _flat(S), _flat(z)
    if reverse:
        return S[:, :, 1:], z[:, :, 1:], S[:, :, 0], z[:, :, 0]
    return S[:, :, :-1], z[:, :, :-1], S[:, :, -1], z[:, :, -1]


def _summaries(k_out, v, decay: _Decay) -> tuple[jax.Array, jax.Array]:
    """What every chunk adds to the state at its end: S [B, H, n, K, V], z [B, H, n, K]."""
    S = _flat(einsum("bhgnjc,bhnjv->bhgncv", _grouped(k_out, v.shape[1]), v))
    z = jnp.sum(k_out.astype(jnp.float32), axis=-2)
    if decay.out is not None:
        S, z = _times(S, decay.out[..., None]), _times(z, decay.out)
    return S, z


def _scaled_state(S, z, factor, dtype):
    if factor is not None:
        S, z = _times(S, factor[..., None]), _times(z, factor)
    return _round(S, dtype), z


def _outputs(scores, q_in, v, S_in, z_in, normalize: bool):
    """Numerator [B, H, n, C, V] and denominator [B, H, n, C] (None when not normalised); scores rounded already."""
    num = _flat(einsum("bhgnij,bhnjv->bhgniv", _grouped(scores, v.shape[1]), v)) + einsum(
        "bhnic,bhncv->bhniv", q_in, S_in
    )
    if not normalize:
        return num, None
    den = jnp.sum(scores.astype(jnp.float32), axis=-1)
    return num, den + jnp.sum(q_in.astype(jnp.float32) * z_in[..., None, :], axis=-1) + EPS


def _forward_group(q, k, v, log_g, S0, z0, plan: Plan, normalize: bool):
    dtype = q.dtype
    decay = _decay(log_g.astype(jnp.float32), plan)
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    q_in, k_out = _round(_times(q, decay.rows), dtype), _round(_times(k, decay.cols), dtype)
    S, z, S_end, z_end = _scan_states(decay.total, *_summaries(k_out, v, decay), S0, z0)
    scores = _round(_scores(q, k, q_in, k_out, decay, plan, dtype), dtype)
    num, den = _outputs(scores, q_in, v, *_scaled_state(S, z, decay.into, dtype), normalize)
    return num if den is None else num / den[..., None], S_end, z_end


def _backward_group(q, k, v, log_g, do, S0, z0, dS_end, dz_end, plan: Plan, normalize: bool):
    dtype, gate_heads, value_heads = q.dtype, log_g.shape[1], v.shape[1]
    decay = _decay(log_g.astype(jnp.float32), plan)
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    q_in, k_out = _round(_times(q, decay.rows), dtype), _round(_times(k, decay.cols), dtype)
    S, z, _, _ = _scan_states(decay.total, *_summaries(k_out, v, decay), S0, z0)
    S_in, z_in = _scaled_state(S, z, decay.into, dtype)
    scores = _round(_scores(q, k, q_in, k_out, decay, plan, dtype), dtype)
    # A token's score with itself goes apart: it has no gates in it, so its parts of q dq and k dk in dlog_g cancel.
    # Where it is most of the denominator v - o is small too, and comes from the other scores: with strong gates the
    # rounding of differences would be all that is left.
    own = jnp.diagonal(scores, axis1=-2, axis2=-1).astype(jnp.float32)[..., None]
    earlier = _masked(scores, -1)
    values = v.astype(jnp.float32)[:, :, None]

    # Rows of dq, and the own scores, see the cotangent as it came and are divided by the denominator at the end. What goes
    # into the state and into dv takes dn = do / den, rounded; either way delta matches, because the two cancel.
    do = _round(do.astype(jnp.float32), dtype)
    if normalize:
        num, before = _outputs(earlier, q_in, v, S_in, z_in, True)
        assert before is not None  # only without normalize
        before = before[..., None]
        den = before + own
        num, before, own, by_value = (_grouped(x, value_heads) for x in (num, before, own, den))
        difference = (values * before - num) / by_value
        o = _flat(num + own * values) / den
        dn = _round(do.astype(jnp.float32) / den, dtype)
        delta, delta_rows = (-jnp.sum(x.astype(jnp.float32) * o, axis=-1) for x in (dn, do))
    else:
        dn, den, delta, delta_rows, difference = do, 1.0, None, None, values
    own = jnp.sum(_flat(_grouped(do.astype(jnp.float32), value_heads) * difference), axis=-1, keepdims=True) / den

    # Cotangents of the state at the end of every chunk.
    dS_chunk = einsum("bhnic,bhniv->bhncv", q_in, dn)
    if delta is None:
        dz_chunk = jnp.zeros_like(z)
    else:
        dz_chunk = jnp.sum(q_in.astype(jnp.float32) * delta[..., None], axis=-2)
    if decay.into is not None:
        dS_chunk, dz_chunk = _times(dS_chunk, decay.into[..., None]), _times(dz_chunk, decay.into)
    dS, dz, dS0, dz0 = _scan_states(decay.total, dS_chunk, dz_chunk, dS_end, dz_end, reverse=True)
    dS_out, dz_out = _scaled_state(dS, dz, decay.out, dtype)

    dA = _flat(einsum("bhgniv,bhnjv->bhgnij", _grouped(do, value_heads), v))
    dq_state = einsum("bhniv,bhncv->bhnic", do, S_in)
    if delta_rows is not None:
        dA += delta_rows[..., None]
        dq_state += delta_rows[..., None] * z_in[..., None, :]
    dA, dq_state = _round(_masked(dA / den, -1), dtype), dq_state / den
    dq_local, dk_local = _scores_vjp(dA, q, k, q_in, k_out, decay, plan, dtype)
    dk_state = _flat(einsum("bhnjv,bhgncv->bhgnjc", v, _grouped(dS_out, value_heads))) + dz_out[..., None, :]
    dk_state = _times(dk_state, decay.cols)
    if plan.block == plan.chunk:
        dq, dk = _times(dq_local + dq_state, decay.rows), _times(dk_local, decay.cols)
    else:
        dq, dk = dq_local + _times(dq_state, decay.rows), dk_local
    dv = einsum("bhgnij,bhgniv->bhnjv", _grouped(scores, value_heads), _grouped(dn, value_heads))
    dv += einsum("bhgnjc,bhgncv->bhnjv", _grouped(k_out, value_heads), _grouped(dS_out, value_heads))

    # A gate acts on what was written before it and is read from it on: by rows of the chunk, or from its end. Sums reach
    # no further than the chunk, so that the error does not grow with the length of the sequence.
    def of_gates(x):
        return jnp.sum(_grouped(x, gate_heads), axis=2)

    through = of_gates(_times(jnp.sum(S * dS, axis=-1) + z * dz, decay.total))
    dlog_g = _rows(_lower(plan.chunk).T, of_gates(q * dq - k * dk)) + through[..., None, :]
    dlog_g += _rows(_after(plan.chunk).T, of_gates(k * dk_state))
    dk += dk_state
    return dq + own * k, dk + own * q, dv, dlog_g, dS0, dz0


def _pad(x: jax.Array, plan: Plan) -> jax.Array:
    """Zero rows at the end: k = 0 and log_g = 0 leave the state alone."""
    rows = plan.chunk * plan.group * plan.steps - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, 0))) if rows else x


def _chunks(x: jax.Array, step, plan: Plan) -> jax.Array:
    """Group ``step`` of x [B, T, heads, width] as [B, heads, n, C, width]."""
    size = plan.group * plan.chunk
    if plan.steps > 1:
        x = lax.dynamic_slice_in_dim(x, step * size, size, axis=1)
    return x.reshape(x.shape[0], plan.group, plan.chunk, *x.shape[2:]).transpose(0, 3, 1, 2, 4)


def _tokens(x: jax.Array, length: int, dtype) -> jax.Array:
    """[steps, B, heads, n, C, width] -> [B, T, heads, width]."""
    steps, batch, heads, group, chunk, width = x.shape
    x = x.transpose(1, 0, 3, 4, 2, 5).reshape(batch, steps * group * chunk, heads, width)
    return x[:, :length].astype(dtype)


def _initial(q, k, v, log_g, state):
    batch, _, heads, features = q.shape
    if state is None:
        state = (
            jnp.zeros((batch, heads, features, v.shape[-1]), jnp.float32),
            jnp.zeros((batch, heads, features), jnp.float32),
        )
    return tuple(match_varying(x, q, k, v, log_g) for x in state)


def supports(q, k, v, log_g, *, normalize: bool, lower_bound: float | None, differentiated: bool) -> str | None:
    """None: it takes every call."""
    return None


def forward(q, k, v, log_g, initial_state, *, normalize: bool, lower_bound: float | None, save_residuals: bool) -> Any:
    """See ``kernels_pallas.contract``."""
    plan = make_plan(q.shape, v.shape[-1], lower_bound, target_platform(q))
    padded = tuple(_pad(x, plan) for x in (q, k, v, log_g))

    def body(state, step):
        # float32 group outputs would double the traffic of a bfloat16 call: cast before they are stacked.
        S, z = state
        chunks = (_chunks(x, step, plan) for x in padded)
        o, S, z = _forward_group(*chunks, S0=S, z0=z, plan=plan, normalize=normalize)
        return (S, z), (o.astype(v.dtype), state if save_residuals else None)

    state = _initial(q, k, v, log_g, initial_state)
    if plan.steps == 1:
        start = state
        state, (o, _) = body(state, 0)
        o, starts = o[None], jax.tree.map(lambda x: x[None], start)
    else:
        state, (o, starts) = lax.scan(body, state, jnp.arange(plan.steps))
    o = _tokens(o, q.shape[1], v.dtype)
    return o, state, (q, k, v, log_g, starts) if save_residuals else None


def backward(residuals, do, dstate, *, normalize: bool, lower_bound: float | None) -> Any:
    """See ``kernels_pallas.contract``. Chunk states are recomputed from the state at the start of each
    group."""
    q, k, v, log_g, starts = residuals
    plan = make_plan(q.shape, v.shape[-1], lower_bound, target_platform(q))
    steps = starts[0].shape[0]  # the forward's, should the platform have been named only around the forward
    plan = plan._replace(steps=steps, group=-(-q.shape[1] // (plan.chunk * steps)))
    padded = tuple(_pad(x, plan) for x in (q, k, v, log_g, do))

    def body(dstate, xs):
        step, (S0, z0) = xs
        chunks, (dS, dz) = (_chunks(x, step, plan) for x in padded), dstate
        *grads, dS0, dz0 = _backward_group(*chunks, S0=S0, z0=z0, dS_end=dS, dz_end=dz, plan=plan, normalize=normalize)
        return (dS0, dz0), tuple(g.astype(x.dtype) for g, x in zip(grads, (q, k, v, log_g), strict=True))

    dstate = tuple(match_varying(x, q, k, v, log_g, do, *starts) for x in dstate)
    if plan.steps == 1:
        dstate, grads = body(dstate, (0, jax.tree.map(lambda x: x[0], starts)))
        grads = tuple(g[None] for g in grads)
    else:
        dstate, grads = lax.scan(body, dstate, (jnp.arange(plan.steps), starts), reverse=True)
    grads = (_tokens(g, q.shape[1], x.dtype) for g, x in zip(grads, (q, k, v, log_g), strict=True))
    return *grads, dstate


def segment_state(k, v, log_g, *, lower_bound: float | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state after these tokens alone, and the sum of their log_g: (L [B, Hg, K], S [B, H, K, V], z [B, H, K]), float32.

    A forward pass of which XLA keeps only the state.
    """
    _, (S, z), _ = forward(k, k, v, log_g, None, normalize=False, lower_bound=lower_bound, save_residuals=False)
    return jnp.sum(log_g.astype(jnp.float32), axis=1), S, z
