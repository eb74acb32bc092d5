"""Pieces shared by the Mosaic GPU kernels: tiles in shared memory, products of warpgroups, padding, the launch.

Only these files import Mosaic GPU, and only when a kernel is traced: not every installation has it, and its interface changes
from release to release.
"""

# Pallas for Mosaic GPU as of jax 0.11 and newer: pyright may see an older one, with other signatures and names.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import interpret_mode, match_varying

f32, bf16 = jnp.float32, jnp.bfloat16

CHUNK = 64
"""Tokens of a chunk: the rows of one wgmma, and what one reference point allows within a gate bound of -1.25."""

WIDTH = 64
"""Features, or value columns, that a warpgroup owns: 128 bytes of bfloat16, one swizzled row."""

ROWS = 8
"""Rows of a tile in shared memory. TMA takes sequences whose length is a multiple of them; others are padded first, which
copies them."""


def operand(*shape: int, line: int | None = None) -> Any:
    """Shared memory for bfloat16 operands: ``line`` columns (None: all) of a row form one swizzled line. The depth of a product
    must be a multiple of it, and two operands in shared memory must have lines of one length."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    line = line or shape[-1]
    transforms = (plgpu.TilingTransform((ROWS, line)), plgpu.SwizzleTransform(2 * line))
    return plgpu.SMEM(shape, bf16, transforms=transforms)


def tiles(*lead: int) -> Any:
    """Shared memory for operands [*lead, CHUNK, WIDTH]."""
    return operand(*lead, CHUNK, WIDTH)


def transposed(ref: Any) -> Any:
    """A tile in shared memory, as its transpose."""
    return ref.transpose((1, 0))


def products(*sums: Any) -> list[jax.Array]:
    """One float32 result for each argument (shape, (a, b), ...): the sum of its products a @ b. All are waited for together. b is
    in shared memory, a there or in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if interpret_mode() and any(isinstance(x, jax.Array) for _, *pairs in sums for x, _ in pairs):
        # The interpreter has no products of operands in registers. Its loads, unlike the products, must end before a copy.
        def load(x):
            return (x if isinstance(x, jax.Array) else plgpu.load(x)).astype(f32)

        results: list[Any] = [sum(lax.dot(load(x), load(y)) for x, y in pairs) for _, *pairs in sums]
        plgpu.commit_smem()
        return results

    def body(*accs):
        for acc, (_, *pairs) in zip(accs, sums, strict=True):
            for x, y in pairs:
                plgpu.wgmma(acc, x, y)
        return [acc[...] for acc in accs]

    return pl.run_scoped(body, *(plgpu.WGMMAAccumulatorRef(shape, f32) for shape, *_ in sums))


def over_columns(x: jax.Array, columns: int = WIDTH) -> jax.Array:
    """[rows] -> [rows, columns], the same in every column."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def over_rows(x: jax.Array) -> jax.Array:
    """[columns] -> [CHUNK, columns], the same in every row."""
    return lax.broadcast_in_dim(x, (CHUNK, x.shape[0]), [1])


def indices(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """(row, column) of every entry of a tile in registers, int32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape, layout = (rows, columns), plgpu.Layout.WGMMA
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout) for axis in (0, 1))
    return row, column


def keep_rows(tile: Any, first: Any, count: Any) -> None:
    """Zeros the rows of a tile in shared memory before ``first`` and from ``count`` on; nothing where that is none."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @pl.when((first > 0) | (count < CHUNK))
    def _():
        row, _ = indices(*tile.shape)
        x = plgpu.load(tile, layout=plgpu.Layout.WGMMA).astype(f32)
        tile[...] = jnp.where((row >= first) & (row < count), x, 0.0).astype(tile.dtype)
        plgpu.commit_smem()


class ChunkDocuments:
    """Where the documents of a chunk begin, as rows of the chunk, negative if before it: from ``numbers`` [B, n C] in device
    memory (``kernels_pallas.common.segment_numbers``), loaded where they are asked for."""

    def __init__(self, numbers: Any, batch: Any, start: Any):
        self.numbers, self.batch, self.start = numbers, batch, start

    def last(self) -> jax.Array:
        """Of the last row's: what precedes it does not leave the chunk."""
        return self.numbers[self.batch, self.start + CHUNK - 1] - 1 - self.start

    def first(self) -> jax.Array:
        """[C] int32 of every row's: the state before the chunk reaches rows where it is negative."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        rows = self.numbers.at[self.batch, pl.ds(self.start, CHUNK)]
        return plgpu.load(rows, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False) - 1 - self.start


def passing(last: jax.Array) -> jax.Array:
    """1 where the state before a chunk reaches the state after it, else 0. A factor: the lowering has no select of whole tiles."""
    return jnp.where(last < 0, 1.0, 0.0)


def to_whole_chunks(x: jax.Array, axis: int) -> jax.Array:
    """x with its last entry along ``axis``, the tokens, repeated up to whole chunks: copies that are no TMA have no bounds."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % CHUNK)
    return jnp.pad(x, widths, mode="edge")


def padded(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] with T a multiple of ROWS, zeros at the end: keys and gates of zero leave the state alone."""
    missing = -arrays[0].shape[1] % ROWS
    if not missing:
        return arrays
    return tuple(jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))) for x in arrays)


def launch(
    body: Callable[..., None],
    inputs: Sequence[jax.Array],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    scratch: Sequence[Any],
    *,
    grid: dict[str, int],
    warpgroups: int,
) -> tuple[jax.Array, ...]:
    """Runs a kernel whose programs have ``warpgroups`` warpgroups; outputs as (shape, dtype), grid axes by name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    outs = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
        scratch_types=list(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret_mode() else None,
    )(*inputs)
    # The types of the results do not say over which mesh axes the inputs vary.
    return tuple(match_varying(x, *inputs) for x in outs)
