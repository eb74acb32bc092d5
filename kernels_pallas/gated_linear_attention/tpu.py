"""Gated linear attention on TPUs (Pallas, Mosaic): forward kernel, chunk states, and what the backward kernel shares.

Grid (batch, blocks of heads, chunks); chunks run in order and the state stays in VMEM. Blocks are cut from
[B, T, heads * width], so nothing is transposed in HBM. Arrays inside a kernel are *tiles* of 128 lanes: one head of 128
features, or ``pack`` narrower heads side by side. Heads of a tile share every elementwise operation; their scores come
out side by side, [A_a | A_b], because the keys are stacked once per head with the other heads' lanes set to zero. The
state of a tile is kept transposed (rows: value dimensions, lanes: features), so that a decay per feature is a row
broadcast, and compact: ``width`` rows, where every lane belongs to the head of that lane.

Exponents (b is the inclusive cumulative sum of the log2-gates, C rows a chunk):

* pairs: blocks of c rows with c |log_g| <= 80 nats take their own middle r = b_end / 2 as the reference, so operands
  stay within e^+-40; a later block meets an earlier one after a row factor 2^(r_m - r_n), with no further exponentials;
* levels (weak or no bound): binary sub-blocks, each with the border between its halves as the reference, so that no
  exponent is positive.

All exponents are products of a 0/+-1/2/1 matrix with the gates (exact in bfloat16, on the MXU); no long cumulative sums
are subtracted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import interpret_mode, out_struct
from kernels_pallas.gated_linear_attention import decode as decode_xla
from kernels_pallas.gated_linear_attention import tpu_decode
from kernels_pallas.gated_linear_attention.tpu_plan import (
    VMEM_BUDGET_BYTES,
    VMEM_LIMIT_BYTES,
    Plan,
    flat,
    gate_matrices,
    make_plan,
    pack_state,
    unflat,
    unpack_state,
    vmem_bytes,
)
from kernels_pallas.gated_linear_attention.tpu_tiles import (
    TileInputs,
    next_state,
    read_out,
    reciprocal,
    tile_inputs,
    tile_of,
)

INTERPRET: Any = True
"""What ``pallas_call`` gets in interpret mode; tests set ``pltpu.InterpretParams`` here."""


def interpreter() -> Any:
    """What to pass to ``pallas_call`` as ``interpret``."""
    return INTERPRET if interpret_mode() else False


def supports(q, k, v, log_g, *, normalize: bool, lower_bound: float | None, differentiated: bool) -> str | None:
    """Why these kernels cannot serve, or None (see ``kernels_pallas.contract``)."""
    del k, normalize
    widest = max(q.shape[-1], v.shape[-1])
    if widest > 256:
        return f"head sizes above 256 are not supported, got K = {q.shape[-1]} and V = {v.shape[-1]}"
    plan = make_plan(q, v, log_g, lower_bound, forward=not differentiated)
    need = vmem_bytes(plan, backward=differentiated)
    if need > VMEM_BUDGET_BYTES:
        return (
            f"{plan.heads_block} heads of width {plan.width} a program need about {need >> 20} MiB of VMEM, more than "
            f"{VMEM_BUDGET_BYTES >> 20} MiB "
            f"(Hv = {v.shape[2]}, Hg = {log_g.shape[2]} of H = {plan.heads} heads leave no smaller block)"
        )
    return None


# Kernels


def start_state(refs, state, has_state: bool) -> None:
    """Before the first chunk: the initial state, or zeros. Called at the start of every program."""
    S_ref, z_ref = state

    @pl.when(pl.program_id(2) == 0)
    def _():
        def load(tile, _):
            S_ref[0, tile] = refs[0][0, tile] if has_state else jnp.zeros(S_ref.shape[2:], jnp.float32)

        # A loop, not one assignment: this runs once, and unrolled it would fill the instruction memory.
        lax.fori_loop(0, S_ref.shape[1], load, None)
        z_ref[...] = refs[1][...] if has_state else jnp.zeros_like(z_ref)


def attend_tile(tile: int, q, k, shared: TileInputs, o_ref, S_ref, z_ref, plan: Plan, normalize: bool) -> None:
    """One tile of the chunk: writes its outputs, moves its state on. q, k float32 [C, lanes]."""
    v, decay = shared.values(tile, plan), shared.decays(tile, plan)
    S, z = S_ref[0, tile], z_ref[0, 0, tile : tile + 1]
    num, den, _, _ = read_out(q, k, v, S, z, decay, plan, normalize)
    out = num if den is None else num * reciprocal(den, plan)
    o_ref[0, :, tile * plan.lanes : (tile + 1) * plan.lanes] = out.astype(o_ref.dtype)
    S_ref[0, tile], z_ref[0, 0, tile : tile + 1] = next_state(k, v, S, z, decay, plan)


def _forward_kernel(*refs, plan: Plan, normalize: bool, has_state: bool):
    q_ref, k_ref, v_ref, g_ref, m_ref, *initial, o_ref, S_ref, z_ref = refs
    start_state(initial, (S_ref, z_ref), has_state)
    shared = tile_inputs(v_ref, g_ref, m_ref, pl.program_id(2), plan)
    for tile in range(plan.tiles):
        q, k = tile_of(q_ref, tile, shared.valid, plan), tile_of(k_ref, tile, shared.valid, plan)
        attend_tile(tile, q, k, shared, o_ref, S_ref, z_ref, plan, normalize)


def _states_kernel(*refs, plan: Plan, has_state: bool):
    """The states at the start of every chunk, for the backward pass."""
    k_ref, v_ref, g_ref, m_ref, *initial, states_ref, zs_ref, S_ref, z_ref = refs
    start_state(initial, (S_ref, z_ref), has_state)
    shared = tile_inputs(v_ref, g_ref, m_ref, pl.program_id(2), plan)
    zs_ref[0, 0] = z_ref[0]
    for tile in range(plan.tiles):
        S, z = S_ref[0, tile], z_ref[0, 0, tile : tile + 1]
        states_ref[0, 0, tile] = S.astype(states_ref.dtype)
        k = tile_of(k_ref, tile, shared.valid, plan)
        v, decay = shared.values(tile, plan), shared.decays(tile, plan)
        S_ref[0, tile], z_ref[0, 0, tile : tile + 1] = next_state(k, v, S, z, decay, plan)


# Calls


class Specs(NamedTuple):
    """BlockSpecs of one call, by kind of array."""

    row: pl.BlockSpec
    v: pl.BlockSpec
    gate: pl.BlockSpec
    matrices: pl.BlockSpec
    S: pl.BlockSpec
    z: pl.BlockSpec
    states: pl.BlockSpec
    zs: pl.BlockSpec


def specs(plan: Plan, *, reverse: bool = False) -> Specs:
    """Blocks on [B, T, heads * width]; ``reverse`` walks the chunks from the last to the first."""
    last = plan.chunks - 1

    def time(t):
        return last - t if reverse else t

    def kv(group: int) -> pl.BlockSpec:
        count = plan.kv_heads(group)
        # Several programs may read one kv head; plain lax.div, as // adds a sign correction that needs the device kind.
        share = max(1, group // plan.heads_block)
        block = (1, plan.chunk, count * plan.width)
        return pl.BlockSpec(block, lambda b, h, t: (b, time(t), h if share == 1 else lax.div(h, np.int32(share))))

    count = gate_matrices(plan).shape[0]
    tile = (plan.tiles, plan.width, plan.lanes)
    return Specs(
        row=pl.BlockSpec((1, plan.chunk, plan.heads_block * plan.width), lambda b, h, t: (b, time(t), h)),
        v=kv(plan.v_group),
        gate=kv(plan.g_group),
        matrices=pl.BlockSpec((count, plan.chunk, plan.chunk), lambda b, h, t: (0, 0, 0)),
        S=pl.BlockSpec((1, *tile), lambda b, h, t: (b, h, 0, 0)),
        z=pl.BlockSpec((1, 1, plan.tiles, plan.lanes), lambda b, h, t: (b, h, 0, 0)),
        states=pl.BlockSpec((1, 1, *tile), lambda b, h, t: (b, time(t), h, 0, 0)),
        zs=pl.BlockSpec((1, 1, 1, plan.tiles, plan.lanes), lambda b, h, t: (b, time(t), h, 0, 0)),
    )


def call(
    kernel,
    plan: Plan,
    *,
    in_specs,
    out_specs,
    out_shape,
    inputs,
    flops: float,
    exponentials: float,
    name: str,
    scratch=(),
):
    """One ``pallas_call`` over (batch, blocks of heads, chunks)."""
    moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *out_shape))
    return pl.pallas_call(
        kernel,
        grid=(plan.batch, plan.head_blocks, plan.chunks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=list(scratch),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=pl.CostEstimate(flops=int(flops), bytes_accessed=int(moved), transcendentals=int(exponentials)),
        interpret=interpreter(),
        name=name,
    )(*inputs)


def state_shapes(plan: Plan, *like) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of a packed state."""
    S = (plan.batch, plan.heads // plan.pack, plan.width, plan.lanes)
    z = (plan.batch, plan.head_blocks, plan.tiles, plan.lanes)
    return out_struct(S, jnp.float32, *like), out_struct(z, jnp.float32, *like)


def token_heads(plan: Plan) -> int:
    return plan.batch * plan.chunks * plan.chunk * plan.heads


def forward(q, k, v, log_g, initial_state, *, normalize: bool, lower_bound: float | None, save_residuals: bool):
    """See ``kernels_pallas.contract``. Residuals are the inputs: backward recomputes everything else, chunk states
    included."""
    plan = make_plan(q, v, log_g, lower_bound, forward=True)
    sp = specs(plan)
    inputs = [flat(x, plan) for x in (q, k, v, log_g)]
    inputs.append(jnp.asarray(gate_matrices(plan), plan.dtype))
    in_specs = [sp.row, sp.row, sp.v, sp.gate, sp.matrices]
    if initial_state is not None:
        inputs += pack_state(*initial_state, plan=plan)
        in_specs += [sp.S, sp.z]

    count = token_heads(plan)
    o, S, z = call(
        lambda *refs: _forward_kernel(*refs, plan=plan, normalize=normalize, has_state=initial_state is not None),
        plan,
        in_specs=in_specs,
        out_specs=[sp.row, sp.S, sp.z],
        out_shape=[out_struct(inputs[0].shape, v.dtype, *inputs), *state_shapes(plan, *inputs)],
        inputs=inputs,
        flops=2 * count * (2 * plan.chunk * plan.width + 2 * plan.width**2),
        exponentials=2 * count * plan.width // plan.g_group,
        name="gla_forward",
    )
    residuals = (q, k, v, log_g, initial_state) if save_residuals else None
    return unflat(o, plan.heads, plan.values, plan), unpack_state(S, z, plan), residuals


def chunk_states(inputs, packed_state, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """States at every chunk start: [B, chunks, H / pack, width, lanes] (compute dtype), [B, chunks, blocks, tiles,
    lanes].

    ``inputs``: flat k, v, log_g and the gate matrices.
    """
    sp = specs(plan)
    in_specs = [sp.row, sp.v, sp.gate, sp.matrices]
    if packed_state is not None:
        inputs = [*inputs, *packed_state]
        in_specs += [sp.S, sp.z]
    S, z = state_shapes(plan, *inputs)
    count = token_heads(plan)
    stacked = [
        out_struct((plan.batch, plan.chunks, *S.shape[1:]), plan.dtype, *inputs),
        out_struct((plan.batch, plan.chunks, *z.shape[1:]), jnp.float32, *inputs),
    ]
    tile = (1, plan.tiles, plan.width, plan.lanes)
    states, zs = call(
        lambda *refs: _states_kernel(*refs, plan=plan, has_state=packed_state is not None),
        plan,
        in_specs=in_specs,
        out_specs=[sp.states, sp.zs],
        out_shape=stacked,
        inputs=inputs,
        flops=2 * count * plan.width**2,
        exponentials=count * plan.width // plan.g_group,
        name="gla_states",
        scratch=[pltpu.VMEM(tile, jnp.float32), pltpu.VMEM((1, 1, plan.tiles, plan.lanes), jnp.float32)],
    )
    return states, zs


def decode(q, k, v, log_g, state, *, normalize: bool):
    """See ``kernels_pallas.contract``. Plain XLA takes states too large, or too oddly shaped, for the kernel."""
    if tpu_decode.refusal(tpu_decode.step_of(q, v, log_g)) is not None:
        return decode_xla.decode(q, k, v, log_g, state, normalize=normalize)
    return tpu_decode.decode(q, k, v, log_g, state, normalize=normalize, interpret=interpreter())
