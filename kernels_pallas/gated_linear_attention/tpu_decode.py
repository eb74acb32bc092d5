"""One decoding step of gated linear attention on TPUs: a launch that updates the state in place and reads it out.

Grid (blocks of sequences, blocks of heads), both parallel; the state keeps the layout of the interface, [B, H, K, V], so
that nothing is rearranged around the call. The step moves every state once each way and is bound by that; its arithmetic
is exact float32 on the VPU (a product with one row of keys would leave the matrix unit almost empty).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import EPS, out_struct
from kernels_pallas.gated_linear_attention.tpu_plan import LANES, VMEM_BUDGET_BYTES, VMEM_LIMIT_BYTES

SUBLANES = 8

f32 = jnp.float32


class Step(NamedTuple):
    """Sizes of one decode step; a program takes ``batch_block`` sequences and ``heads_block`` heads."""

    batch: int
    heads: int
    features: int
    values: int
    batch_block: int
    heads_block: int

    def rows(self, width: int, group: int = 1) -> pl.BlockSpec:
        """Block of an array [B, H / group * width]."""
        return pl.BlockSpec((self.batch_block, self.heads_block // group * width), lambda b, h: (b, h))

    def parameter(self, x: Any) -> pl.BlockSpec:
        """Block of an array [H, ...]."""
        rest = (0,) * (len(x.shape) - 1)
        return pl.BlockSpec((self.heads_block, *x.shape[1:]), lambda b, h: (h, *rest))


class Head(NamedTuple):
    """Inputs of one head, float32: q, k, decay [n, K] and v [n, V] of the n sequences of a program."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    decay: jax.Array


def make_step(
    batch: int, heads: int, features: int, values: int, groups: tuple[int, ...], widths: tuple[int, ...]
) -> Step:
    """A step with the smallest block of heads that cuts its arrays [B, H / group * width] at whole tiles, and at most eight
    sequences, whose rows fill a tile."""

    def fits(count: int) -> bool:
        whole = all(count % g == 0 and count // g * w % LANES == 0 for g in groups for w in widths)
        return count == heads or (count % SUBLANES == 0 and heads % count == 0 and whole)

    count = next(n for n in range(1, heads + 1) if fits(n))
    return Step(batch, heads, features, values, min(batch, SUBLANES), count)


def refusal(step: Step) -> str | None:
    """Why a step is too large (the end of a sentence), or None."""
    # The state in and out, each double-buffered; a tile in VMEM is 128 lanes wide.
    lanes = -(-step.values // LANES) * LANES
    need = 4 * step.batch_block * step.heads_block * step.features * lanes * 4
    if need > VMEM_BUDGET_BYTES // 2:
        return (
            f"a program of {step.batch_block} sequences and {step.heads_block} heads of {step.features} x {step.values} "
            f"needs {need >> 20} MiB of VMEM"
        )
    if step.features % SUBLANES or step.values % SUBLANES:
        return f"K and V must be multiples of {SUBLANES}, got {step.features} and {step.values}"
    return None


def head_rows(ref: Any, head: int, width: int) -> jax.Array:
    """[n, width] float32: one head of a block [n, heads * width]."""
    return ref[:, head * width : (head + 1) * width].astype(f32)


def update(heads: list[Head], state_in, o_ref, S_ref, z_ref, rows_ref, *, normalize: bool) -> None:
    """Writes the states after the token and the outputs of a program's heads."""
    S_in, z_in = state_in
    count, n = len(heads), heads[0].q.shape[0]
    for h, head in enumerate(heads):
        for i, x in enumerate((head.q, head.k, head.decay)):
            rows_ref[(i * count + h) * n : (i * count + h + 1) * n] = x
    # Features run down the rows of a state, so a vector of them must become a column, the same in all lanes. A
    # transposition of equal rows does that in fewer passes than a transposition and a lane broadcast, until it makes the
    # transposition unit the limit.
    replicate = n == 1 or rows_ref.shape[1] < LANES
    columns = None if replicate else rows_ref[...].T

    def column(row: int, lanes: int) -> jax.Array:
        if columns is not None:
            return columns[:, row : row + 1]
        return jnp.broadcast_to(rows_ref[row : row + 1], (lanes, rows_ref.shape[1])).T

    for h, head in enumerate(heads):
        z = head.decay * z_in[:, h, :] + head.k
        z_ref[:, h, :] = z
        out = []
        for b in range(n):
            q, k, decay = (column((i * count + h) * n + b, head.v.shape[1]) for i in range(3))
            S = decay * S_in[b, h] + k * head.v[b : b + 1]
            S_ref[b, h] = S
            out.append(jnp.sum(q * S, axis=0, keepdims=True))
        o = out[0] if n == 1 else jnp.concatenate(out, axis=0)
        if normalize:
            o = o / (jnp.sum(head.q * z, axis=1, keepdims=True) + EPS)
        o_ref[:, h * o.shape[1] : (h + 1) * o.shape[1]] = o.astype(o_ref.dtype)


def launch(
    kernel: Callable[..., None],
    step: Step,
    inputs: list,
    in_specs: list,
    state: tuple,
    dtype: Any,
    name: str,
    interpret,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(o [B, H * V] of ``dtype``, state). ``kernel`` takes the inputs, S and z before, then o, S, z after, and scratch
    rows."""
    matrix = (step.batch_block, step.heads_block, step.features, step.values)
    S = pl.BlockSpec(matrix, lambda b, h: (b, h, 0, 0))
    z = pl.BlockSpec(matrix[:3], lambda b, h: (b, h, 0))
    given = len(inputs)
    inputs = [*inputs, *state]
    o = out_struct((step.batch, step.heads * step.values), dtype, *inputs)
    out_shape = [o, *(out_struct(x.shape, f32, *inputs) for x in state)]
    moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *out_shape))
    elements = state[0].size
    rows = 3 * step.heads_block * step.batch_block
    o, new_S, new_z = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(step.batch, step.batch_block), step.heads // step.heads_block),
        in_specs=[*in_specs, S, z],
        out_specs=[step.rows(step.values), S, z],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((-(-rows // SUBLANES) * SUBLANES, step.features), f32)],
        input_output_aliases={given: 1, given + 1: 2},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=5 * elements, bytes_accessed=moved, transcendentals=step.batch * step.heads * step.features
        ),
        interpret=interpret,
        name=name,
    )(*inputs)
    return o, (new_S, new_z)


def _kernel(
    q_ref, k_ref, v_ref, g_ref, S_in, z_in, *out, step: Step, v_group: int, g_group: int, normalize: bool
) -> None:
    features, values = step.features, step.values
    heads = [
        Head(
            head_rows(q_ref, h, features),
            head_rows(k_ref, h, features),
            head_rows(v_ref, h // v_group, values),
            jnp.exp(head_rows(g_ref, h // g_group, features)),
        )
        for h in range(step.heads_block)
    ]
    update(heads, (S_in, z_in), *out, normalize=normalize)


def step_of(q, v, log_g) -> Step:
    """Sizes for q [B, H, K], v [B, Hv, V], log_g [B, Hg, K]."""
    batch, heads, features = q.shape
    groups = (1, heads // v.shape[1], heads // log_g.shape[1])
    return make_step(batch, heads, features, v.shape[-1], groups, (features, v.shape[-1]))


def decode(q, k, v, log_g, state, *, normalize: bool, interpret):
    """S <- e^g S + k v^T; z <- e^g z + k; o = S^T q / (z.q + eps); shapes as in ``kernels_pallas.contract``."""
    step = step_of(q, v, log_g)
    batch, heads, features = q.shape
    v_group, g_group = heads // v.shape[1], heads // log_g.shape[1]
    o, state = launch(
        functools.partial(_kernel, step=step, v_group=v_group, g_group=g_group, normalize=normalize),
        step,
        [x.reshape(batch, -1) for x in (q, k, v, log_g)],
        [
            step.rows(features),
            step.rows(features),
            step.rows(step.values, v_group),
            step.rows(features, g_group),
        ],
        state,
        v.dtype,
        "gla_decode",
        interpret,
    )
    return o.reshape(batch, heads, step.values), state
