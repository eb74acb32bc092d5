"""One token of LAWCAT attention (decoding) for NVIDIA GPUs, through Pallas' Triton lowering: a single launch.

A program owns one head of one sequence and ``block_v`` columns of its state, and computes the features by itself. It moves
the state once in and once out; all else has to stay small beside that:

- q and k share one product, [16, d] @ [d, f]: rows 0-7 repeat the convolved q, rows 8-15 the convolved k, and every second
  quarter of the rows becomes the negative half of the feature map, so that one softmax serves all four. On the tensor cores
  this takes fewer instructions, and fewer exchanges between warps, than two matrix-vector products.
- No more threads than features, so that a thread computes one gate: with more, Triton computes every gate where it is used,
  once for each thread that holds a column of its row.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import EPS, LOG2E, interpret_mode, out_struct
from kernels_pallas.gated_linear_attention import block_sizes
from kernels_pallas.gated_linear_attention.triton_tiles import compiler_params, dot, exp2, f32, iota, round_to
from kernels_pallas.lawcat_attention.triton_tiles import FrontSpec, log_gates, softmax


def _decode_kernel(*refs: Any, front: FrontSpec, group: int, normalize: bool, early: bool) -> None:
    """refs, as one program sees them: q, k [d], v [BV], gate logits [K], taps [W, d] of q and k, phi [f, d], tails
    [W - 1, d] of q and k, S [K, BV], z [K]; out: o [BV], S, z, tails. ``early``: the state is loaded before the features are
    formed."""
    q_ref, k_ref, v_ref, a_ref, wq_ref, wk_ref, phi_ref, tq_ref, tk_ref, S_in, z_in = refs[:11]
    o_ref, S_out, z_out, tq_out, tk_out = refs[11:]
    (half, width), taps, dtype = phi_ref.shape, wq_ref.shape[0], q_ref.dtype

    def state():
        return S_in[:, :], z_in[:], a_ref[:]

    loaded = state() if early else None
    rows, convolved = [], []
    for x_ref, tail_ref, w_ref in ((q_ref, tq_ref, wq_ref), (k_ref, tk_ref, wk_ref)):
        x = [*(tail_ref[j, :] for j in range(taps - 1)), x_ref[:]]
        rows.append(x[1:])
        convolved.append(sum(x[j].astype(f32) * w_ref[j, :].astype(f32) for j in range(taps)))
    u = jnp.where(iota((16, width), 0) < 8, convolved[0][None, :], convolved[1][None, :])
    s = dot(round_to(u, dtype), phi_ref[:, :], tb=True)
    S, z, a = state() if loaded is None else loaded

    p = softmax(jnp.where((iota(s.shape, 0) & 4) == 0, s, -s), 1)
    # Rounded as the prefill rounds features and gates, so that decoding continues what prefill began.
    p = round_to(p, dtype).astype(f32)
    # [q or k, half of the features, repetition, f] -> [q or k, K]; Triton has no slices.
    p = jnp.max(p.reshape(2, 2, 4, half), axis=2).reshape(2, 2 * half)
    of_q = iota(p.shape, 0) == 0
    q, k = jnp.sum(jnp.where(of_q, p, 0.0), axis=0), jnp.sum(jnp.where(of_q, 0.0, p), axis=0)
    decay = exp2(round_to(log_gates(a, front), dtype).astype(f32) * LOG2E)

    z = decay * z + k
    den = jnp.sum(q * z) + EPS
    S = decay[:, None] * S + k[:, None] * v_ref[:].astype(f32)[None, :]
    o = jnp.sum(q[:, None] * S, axis=0)
    # Stores come last: the sums above wait for all warps, hence for every load from what is overwritten in place.
    S_out[:, :] = S
    o_ref[:] = (o / den if normalize else o).astype(o_ref.dtype)

    def store_tail(out, x):
        for j in range(taps - 1):
            out[j, :] = x[j].astype(out.dtype)

    head, first = pl.program_id(0), pl.program_id(1) == 0

    @pl.when(first)
    def _():
        z_out[:] = z
        store_tail(tq_out, rows[0])

    @pl.when(first & (lax.rem(head, jnp.int32(group)) == 0))
    def _():
        store_tail(tk_out, rows[1])


def decode(
    q,
    k,
    v,
    gate_logits,
    conv_q,
    conv_k,
    phi,
    state,
    conv_state,
    *,
    normalize: bool,
    gate_normalizer: float,
    gate_lower_bound: float | None,
) -> Any:
    """One token, T = 1: (o, (S, z), (q tail, k tail)), shapes as in ``kernels_pallas.contract.Layer``.

    S is updated in place when the caller donates it. The rest is not: other programs may still read the old z and rows, and
    in a loop XLA answered those aliases with copies that cost more than they saved (18 instead of 10 us per step, docs/kernels.md).

    Sizes of the kernel "decode": block_v, num_warps, and num_stages 2 to load the state before the features are formed, 1
    to load it after their scores, which takes fewer registers.
    """
    batch, _, heads, _ = q.shape
    group, taps = heads // k.shape[2], conv_q.shape[1]
    features, values = 2 * phi.shape[-1], v.shape[-1]
    if state is None:
        state = (jnp.zeros((batch, heads, features, values), f32), jnp.zeros((batch, heads, features), f32))
    if conv_state is None:
        conv_state = tuple(jnp.zeros((batch, taps - 1, *x.shape[2:]), x.dtype) for x in (q, k))
    # [H, f, d]: a shape that the state never has. Triton gives operands of one shape one layout, and that of a bfloat16
    # matrix does not suit the state's float32.
    phi = phi.astype(q.dtype).swapaxes(1, 2)
    sizes = block_sizes.lookup("decode", q.dtype, features, values)
    width = min(sizes.block_v, values)
    front = FrontSpec(chunk=1, length=1, gate_normalizer=gate_normalizer, bound=gate_lower_bound, carried=True)

    def of_head(h, x):
        share = heads // x.shape[2]
        return h if share == 1 else lax.div(h, jnp.int32(share))

    def vector(x):
        return pl.BlockSpec((None, None, None, x.shape[3]), lambda h, c, b: (b, 0, of_head(h, x), 0))

    def columns(x):
        return pl.BlockSpec((None, None, None, width), lambda h, c, b: (b, 0, of_head(h, x), c))

    def tail(x):
        return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda h, c, b: (b, 0, of_head(h, x), 0))

    def parameter(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda h, c, b: (h, 0, 0))

    matrix = pl.BlockSpec((None, None, features, width), lambda h, c, b: (b, h, 0, c))
    line = pl.BlockSpec((None, None, features), lambda h, c, b: (b, h, 0))
    inputs = [q, k, v, gate_logits, conv_q, conv_k, phi, *conv_state, *state]
    specs = [vector(q), vector(k), columns(v), vector(gate_logits), *(parameter(x) for x in inputs[4:7])]
    specs += [*(tail(x) for x in conv_state), matrix, line]
    shapes = [((batch, 1, heads, values), v.dtype), (state[0].shape, f32), (state[1].shape, f32)]
    shapes += [(old.shape, x.dtype) for old, x in zip(conv_state, (q, k), strict=True)]
    out_shape = [out_struct(*shape, *inputs) for shape in shapes]
    kernel = functools.partial(
        _decode_kernel, front=front, group=group, normalize=normalize, early=sizes.num_stages > 1
    )
    o, S, z, tail_q, tail_k = pl.pallas_call(
        kernel,
        grid=(heads, values // width, batch),
        in_specs=specs,
        out_specs=[columns(out_shape[0]), matrix, line, *(tail(x) for x in conv_state)],
        out_shape=out_shape,
        input_output_aliases={9: 1},
        # There is no loop for Triton to pipeline.
        compiler_params=compiler_params(dataclasses.replace(sizes, num_stages=1)),
        interpret=interpret_mode(),
        name="lawcat_decode",
    )(*inputs)
    return o, (S, z), (tail_q, tail_k)
