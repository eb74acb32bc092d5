"""Pieces shared by the Triton kernels: tiles, products, exponents, block specs.

Everything here runs inside a Pallas kernel that is lowered through Triton, which has 2-D products, ``where``, reductions and ``exp2`` but
no slices or concatenation of values. So cumulative sums are products with constant matrices, and ragged tails are masked loads.
Pallas' Triton lowering is deprecated in JAX; this file and the ``*triton*.py`` beside it are the only ones that import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.common import interpret_mode
from kernels_pallas.gated_linear_attention.block_sizes import BlockSizes

f32 = jnp.float32


def compiler_params(sizes: BlockSizes) -> Any:
    """Triton's compiler parameters of ``sizes``. Every call passes them: on some JAX releases a ``pallas_call`` without them goes
    to another lowering."""
    from jax.experimental.pallas import triton as plgpu

    return plgpu.CompilerParams(num_warps=sizes.num_warps, num_stages=sizes.num_stages)


def dot(a: jax.Array, b: jax.Array, *, ta: bool = False, tb: bool = False) -> jax.Array:
    """a @ b, a.T @ b or a @ b.T in float32. float32 operands take three TF32 passes (2^-22), bfloat16 operands one."""
    precision: Any = None
    if a.dtype == f32:
        precision = lax.Precision.HIGHEST if interpret_mode() else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dims = (((0 if ta else 1,), (1 if tb else 0,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=f32)


def _special(instruction: str, x: jax.Array) -> jax.Array:
    from jax.experimental.pallas import triton as plgpu

    (y,) = plgpu.elementwise_inline_asm(
        f"{instruction} $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, f32)],
    )
    return y


def exp2(x: jax.Array) -> jax.Array:
    """2^x by one special-function instruction (2 ulp, subnormal results become 0), not the several of the library's."""
    return jnp.exp2(x) if interpret_mode() else _special("ex2.approx.ftz.f32", x)


def log2(x: jax.Array) -> jax.Array:
    """log2(x) by one special-function instruction: absolute error 2^-22 near 1."""
    return jnp.log2(x) if interpret_mode() else _special("lg2.approx.ftz.f32", x)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """int32 index along ``axis`` of every entry."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def causal(size: int) -> jax.Array:
    """[size, size] bool: true on and below the diagonal."""
    return iota((size, size), 0) >= iota((size, size), 1)


def centred(size: int, dtype: Any) -> jax.Array:
    """M with M @ lg = b - b_C / 2: cumulative sum and reference point in one exact product (entries +-1/2)."""
    return jnp.where(causal(size), 0.5, -0.5).astype(dtype)


def feature_blocks(features: int) -> tuple[tuple[int, int], ...]:
    """(offset, width) of the feature blocks of at most 64 columns.

    A product whose result feeds another product puts all warps along its rows, so a [64, 128] tile would take 64 registers of each
    thread however many warps there are; blocks of 64 keep every temporary at 32 with 4 warps.
    """
    width = min(features, 64)
    return tuple((offset, width) for offset in range(0, features, width))


def load_rows(ref: Any, start: Any, rows: int, limit: Any, block: tuple[int, int] | None = None) -> jax.Array:
    """Rows [start, start + rows), columns ``block`` = (offset, width) (None: all) of a [T, W] ref.

    ``limit``, a number or a scalar of the kernel up to T, masks the rows from it on to zero; None loads without a mask.
    """
    offset, width = block or (0, ref.shape[1])
    columns = slice(None) if width == ref.shape[1] else pl.ds(offset, width)
    if limit is None:
        return ref[pl.ds(start, rows), columns]
    from jax.experimental.pallas import triton as plgpu

    mask = start + iota((rows, width), 0) < limit
    return plgpu.load(ref.at[pl.ds(start, rows), columns], mask=mask, other=0.0)


def store_rows(ref: Any, start: Any, value: jax.Array, limit: int | None, block: tuple[int, int] | None = None) -> None:
    """The inverse of load_rows; casts to the ref's dtype."""
    rows = value.shape[0]
    offset, width = block or (0, ref.shape[1])
    columns = slice(None) if width == ref.shape[1] else pl.ds(offset, width)
    value = round_to(value, ref.dtype)
    if limit is None:
        ref[pl.ds(start, rows), columns] = value
        return
    from jax.experimental.pallas import triton as plgpu

    mask = start + iota(value.shape, 0) < limit
    plgpu.store(ref.at[pl.ds(start, rows), columns], value, mask=mask)


def load_vector(ref: Any, start: Any, rows: int, limit: int | None, other: float = 1) -> jax.Array:
    """Entries [start, start + rows) of a [T] ref, with ``limit`` as in load_rows, except that masked entries read as ``other``: 1
    for denominators."""
    if limit is None:
        return ref[pl.ds(start, rows)]
    from jax.experimental.pallas import triton as plgpu

    mask = start + lax.iota(jnp.int32, rows) < limit
    return plgpu.load(ref.at[pl.ds(start, rows)], mask=mask, other=other)


def store_vector(ref: Any, start: Any, value: jax.Array, limit: int | None) -> None:
    """The inverse of load_vector."""
    rows = value.shape[0]
    if limit is None:
        ref[pl.ds(start, rows)] = value
        return
    from jax.experimental.pallas import triton as plgpu

    plgpu.store(ref.at[pl.ds(start, rows)], value, mask=start + lax.iota(jnp.int32, rows) < limit)


LANES = 8
"""Columns of the narrow tiles that replace reductions: the narrowest product of the tensor cores."""


def lanes(x: jax.Array) -> jax.Array:
    """[n] as [n, 8], the same value in every column."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], LANES))


def column(x: jax.Array) -> jax.Array:
    """The inverse of lanes."""
    return jnp.max(x, axis=1)


def ones(rows: int, dtype: Any) -> jax.Array:
    """[rows, 8]: ``x @ ones`` sums the rows of x on the tensor cores, where a reduction would take a shuffle per element and step."""
    return jnp.ones((rows, LANES), dtype)


def dot_exact(a: jax.Array, x: jax.Array, *, ta: bool = False) -> jax.Array:
    """a @ x (or a.T @ x) for float32 x: bfloat16 a meets x as two bfloat16 parts (2^-17)."""
    if a.dtype == f32:
        return dot(a, x, ta=ta)
    high = round_to(x, a.dtype)
    return dot(a, round_to(x - high.astype(f32), a.dtype), ta=ta) + dot(a, high, ta=ta)


def round_to(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 ``x`` in ``dtype``, to nearest even.

    On the GPU one instruction converts two elements: conversions of one element run at the slow rate of special functions. In
    the interpreter XLA could drop a float32 -> bfloat16 -> float32 round trip, but it keeps reduce_precision.
    """
    if x.dtype != f32 or dtype != jnp.bfloat16:
        return x.astype(dtype)
    if interpret_mode():
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(dtype)
    from jax.experimental.pallas import triton as plgpu

    (y,) = plgpu.elementwise_inline_asm(
        "cvt.rn.bf16x2.f32 $0, $2, $1;",
        args=[x],
        constraints="=r,f,f",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, dtype)],
    )
    return y


class Documents(NamedTuple):
    """Where the document of every row of a chunk begins, as a row of the chunk [C] int32, negative if before it; and that
    of the last row.

    A state enters the rows of its own document only, and only what the last document holds leaves the chunk.
    """

    first: jax.Array
    last: jax.Array

    def same(self, mask: jax.Array) -> jax.Array:
        """``mask`` [C, C], which is causal, where both tokens are of one document."""
        return mask & (iota(mask.shape, 1) >= self.first[:, None])

    def entered(self, x: jax.Array) -> jax.Array:
        """x [C, .] in the rows that the state before the chunk reaches, else 0."""
        return jnp.where((self.first < 0)[:, None], x, jnp.zeros_like(x))

    def leaving(self, x: jax.Array) -> jax.Array:
        """x [C, .] in the rows that reach the state after the chunk, else 0."""
        return jnp.where(iota(x.shape, 0) >= self.last, x, jnp.zeros_like(x))

    def passing(self, x: jax.Array) -> jax.Array:
        """x, of any shape, if the state before the chunk reaches the state after it, else 0."""
        return jnp.where(self.last < 0, x, jnp.zeros_like(x))


class Rows(NamedTuple):
    """What a call knows about its rows of tokens, None where it does not: arrays outside a kernel, their refs inside.

    ``lengths`` [B] int32, within 0 .. T: v is read up to there only, where q, k and log_g are zeros from there on.
    ``numbers`` [B, T] int32: the documents, see :func:`kernels_pallas.common.segment_numbers`.
    """

    lengths: Any = None
    numbers: Any = None

    @property
    def given(self) -> tuple[bool, ...]:
        """Which of them there are: what a kernel is told."""
        return tuple(x is not None for x in self)

    def inputs(self) -> list[jax.Array]:
        """The first inputs of a kernel."""
        return [x for x in self if x is not None]

    def specs(self) -> list[pl.BlockSpec]:
        """Block specs of :meth:`inputs`."""
        of_batch = pl.BlockSpec((1,), lambda h, c, s, b: (b,))
        found = [] if self.lengths is None else [of_batch]
        if self.numbers is not None:
            found.append(pl.BlockSpec((None, self.numbers.shape[1]), lambda h, c, s, b: (b, 0)))
        return found

    def limit(self, otherwise: int | None) -> Any:
        """Inside a kernel: up to where v is read."""
        return otherwise if self.lengths is None else self.lengths[0]

    def last_begins(self, start: Any, count: Any, length: int) -> jax.Array:
        """Inside a kernel: where the document of the last of rows [start, start + count) begins, counted from ``start``."""
        return self.numbers[jnp.minimum(start + count, length) - 1] - 1 - start

    def documents(self, start: Any, chunk: int, length: int) -> Documents | None:
        """Inside a kernel: the documents of a chunk; None where all tokens are of one."""
        if self.numbers is None:
            return None
        numbers = load_vector(self.numbers, start, chunk, length if length % chunk else None, 0)
        return Documents(numbers - 1 - start, self.last_begins(start, chunk, length))


def take_rows(refs: Iterator[Any], given: tuple[bool, ...]) -> Rows:
    """The refs of :meth:`Rows.inputs`, taken from the front of ``refs``."""
    return Rows(*(next(refs) if there else None for there in given))


def token_spec(x: Any, heads: int, width: int | None = None) -> pl.BlockSpec:
    """All tokens of one head (or of the group head that query head h reads) of x [B, T, Hx, W]; ``width`` splits W by the grid.

    Grid order (h, column block, segment, b): the query heads of a group run side by side and share its tiles in L2.
    """
    group = heads // x.shape[2]
    if width is None or width == x.shape[3]:
        return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda h, c, s, b: (b, 0, _over(h, group), 0))
    return pl.BlockSpec((None, x.shape[1], None, width), lambda h, c, s, b: (b, 0, _over(h, group), c))


def _over(h: Any, group: int) -> Any:
    return h if group == 1 else lax.div(h, jnp.int32(group))


def segment_spec(shape: tuple[int, ...], width: int | None = None) -> pl.BlockSpec:
    """The entry of this program's segment in [B, H, n, K, V] (``width`` columns of V) or [B, H, n, K]."""
    if len(shape) == 4:
        return pl.BlockSpec((None, None, None, shape[3]), lambda h, c, s, b: (b, h, s, 0))
    return pl.BlockSpec((None, None, None, shape[3], width or shape[4]), lambda h, c, s, b: (b, h, s, 0, c))


def sequence_spec(shape: tuple[int, ...], width: int | None = None) -> pl.BlockSpec:
    """All n entries of this program's head in [B, H, n, K, V] (``width`` columns of V) or [B, H, n, K]."""
    if len(shape) == 4:
        return pl.BlockSpec((None, None, shape[2], shape[3]), lambda h, c, s, b: (b, h, 0, 0))
    return pl.BlockSpec((None, None, shape[2], shape[3], width or shape[4]), lambda h, c, s, b: (b, h, 0, 0, c))


def state_spec(shape: tuple[int, ...], width: int | None = None) -> pl.BlockSpec:
    """One head's state in [B, H, K, V] (``width`` columns of V) or [B, H, K]."""
    if len(shape) == 3:
        return pl.BlockSpec((None, None, shape[2]), lambda h, c, s, b: (b, h, 0))
    return pl.BlockSpec((None, None, shape[2], width or shape[3]), lambda h, c, s, b: (b, h, 0, c))
