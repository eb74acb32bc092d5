"""Sizes of the TPU kernels of gated linear attention, and the layout of their arrays outside the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.chunking import MAX_NATS, reference_rows, strong_gates

LANES = 128
MAX_CHUNK = 128
FORWARD_CHUNK = 256
"""Chunk of the forward kernel in bfloat16 with at most four reference blocks: 8-20 % fewer bundles than 128
(docs/kernels.md); the backward kernel gains nothing from it."""

FLOAT32_NATS = 40.0
"""Instead of MAX_NATS in float32, where the rounding of the exponents is the largest error: it grows with them."""

MAX_PAIR_BLOCKS = 4
VMEM_LIMIT_BYTES = 48 * 2**20
"""Scoped VMEM asked for: below the 64 MiB of a v5p or v7x core."""

VMEM_BUDGET_BYTES = 40 * 2**20


class Plan(NamedTuple):
    """Static description of one call: ``heads`` query heads of padded width ``width``, ``pack`` of them to a tile."""

    batch: int
    length: int
    heads: int
    v_group: int
    g_group: int
    features: int
    values: int
    width: int
    pack: int
    heads_block: int
    chunk: int
    block: int
    dtype: Any
    strong_gates: bool

    @property
    def lanes(self) -> int:
        return self.width * self.pack

    @property
    def tiles(self) -> int:
        return self.heads_block // self.pack

    @property
    def head_blocks(self) -> int:
        return self.heads // self.heads_block

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def ragged(self) -> bool:
        return self.length % self.chunk != 0

    @property
    def by_pairs(self) -> bool:
        return self.chunk // self.block <= MAX_PAIR_BLOCKS

    def kv_heads(self, group: int) -> int:
        """How many kv heads (of ``group`` query heads each) one program reads."""
        return max(1, self.heads_block // group)


# Planning


def _block_rows(lower_bound: float | None, chunk: int, dtype) -> int:
    """Rows that one reference may span."""
    return reference_rows(lower_bound, chunk, FLOAT32_NATS if dtype == jnp.float32 else MAX_NATS)


def _heads_block_fits(heads: int, count: int, group: int, width: int) -> bool:
    """Whether a program of ``count`` query heads can read its kv heads as one block of whole 128-lane tiles."""
    if count % group == 0:
        return count == heads or (count // group * width) % LANES == 0
    return group % count == 0 and width % LANES == 0


def make_plan(q, v, log_g, lower_bound: float | None, *, forward: bool = False, max_heads: int = 8) -> Plan:
    """Sizes for q [B, T, H, K], v [B, T, Hv, V], log_g [B, T, Hg, K] (anything with shape and dtype), of the forward
    kernel or of the backward ones."""
    batch, length, heads, features = q.shape
    values = v.shape[-1]
    width = max(16, 1 << (max(features, values) - 1).bit_length())
    pack = max(1, LANES // width)
    while heads % pack:
        pack //= 2
    width = max(width, LANES // pack)
    v_group, g_group = heads // v.shape[2], heads // log_g.shape[2]
    fitting = [
        n
        for n in range(pack, heads + 1, pack)
        if heads % n == 0 and all(_heads_block_fits(heads, n, group, width) for group in (v_group, g_group))
    ]
    # An even number of programs along the heads keeps both cores of a chip with two busy at batch 1.
    small = [n for n in fitting if n * width <= max_heads * LANES and n <= 2 * max_heads]
    even = [n for n in small if (heads // n) % 2 == 0]
    count = max(even or small or fitting[:1])
    dtype = jnp.dtype(q.dtype)
    wide = forward and dtype == jnp.bfloat16
    wide = wide and _block_rows(lower_bound, FORWARD_CHUNK, dtype) * MAX_PAIR_BLOCKS >= FORWARD_CHUNK
    chunk = min(FORWARD_CHUNK if wide else MAX_CHUNK, max(16, 1 << (length - 1).bit_length()))
    block = _block_rows(lower_bound, chunk, dtype)
    strong = strong_gates(lower_bound)
    return Plan(
        batch, length, heads, v_group, g_group, features, values, width, pack, count, chunk, block, dtype, strong
    )


def vmem_bytes(plan: Plan, *, backward: bool) -> int:
    """Estimate of the VMEM of one kernel: double-buffered blocks, states, and room for temporaries."""
    size = plan.dtype.itemsize
    row = plan.heads_block * plan.width * plan.chunk
    kv = plan.width * plan.chunk * (plan.kv_heads(plan.v_group) * size + plan.kv_heads(plan.g_group) * 4)
    state = plan.heads_block * plan.width * plan.width * 4
    blocks = 2 * ((6 if backward else 3) * row * size + (2 if backward else 1) * kv) + 4 * state
    return blocks + 24 * plan.chunk * max(plan.chunk * plan.pack, plan.lanes) * 4


# Layout outside the kernels


def flat(x: jax.Array, plan: Plan) -> jax.Array:
    """[B, T, h, d] -> [B, T', h * width]: zero padding of narrow heads, and of sequences shorter than one chunk."""
    batch, length, heads, size = x.shape
    rows = max(0, plan.chunk - length)
    if rows or size < plan.width:
        x = jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, plan.width - size)))
    return x.reshape(batch, length + rows, heads * plan.width)


def unflat(x: jax.Array, heads: int, size: int, plan: Plan) -> jax.Array:
    """[B, T', heads * width] -> [B, T, heads, size]."""
    x = x.reshape(x.shape[0], x.shape[1], heads, plan.width)
    return x[:, : plan.length, :, :size]


def pack_state(S: jax.Array, z: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """(S [B, H, K, V], z [B, H, K]) -> [B, H / pack, width, lanes] (compact, transposed), [B, blocks, tiles, lanes]."""
    features, values = S.shape[2:]
    S = jnp.pad(S, ((0, 0), (0, 0), (0, plan.width - features), (0, plan.width - values)))
    S = S.reshape(plan.batch, plan.heads // plan.pack, plan.pack, plan.width, plan.width)
    S = S.transpose(0, 1, 4, 2, 3).reshape(plan.batch, plan.heads // plan.pack, plan.width, plan.lanes)
    z = jnp.pad(z, ((0, 0), (0, 0), (0, plan.width - features)))
    return S, z.reshape(plan.batch, plan.head_blocks, plan.tiles, plan.lanes)


def unpack_state(S: jax.Array, z: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The inverse of :func:`pack_state`."""
    S = S.reshape(plan.batch, plan.heads // plan.pack, plan.width, plan.pack, plan.width).transpose(0, 1, 3, 4, 2)
    S = S.reshape(plan.batch, plan.heads, plan.width, plan.width)[:, :, : plan.features, : plan.values]
    return S, z.reshape(plan.batch, plan.heads, plan.width)[:, :, : plan.features]


def gate_matrices(plan: Plan) -> np.ndarray:
    """Matrices [n, C, C] whose products with the log2-gates are the exponents, in the order of :func:`decays`."""
    chunk, block = plan.chunk, plan.block
    i, t = np.arange(chunk)[:, None], np.arange(chunk)[None, :]
    centred = np.where(i // block == t // block, np.where(t <= i, 0.5, -0.5), 0.0)
    if plan.by_pairs:
        return centred[None].astype(np.float32)
    found = [centred] if block > 1 else []
    for size in level_sizes(plan):
        border = (i // (2 * size)) * 2 * size + size - 1
        found.append(np.where(i > border, (border < t) & (t <= i), (i < t) & (t <= border)))
    found += [t <= i, t > i]
    return np.stack([np.asarray(x, np.float32) for x in found])


def level_sizes(plan: Plan) -> list[int]:
    """Rows of the half blocks, smallest first."""
    sizes, size = [], plan.block
    while size < plan.chunk:
        sizes.append(size)
        size *= 2
    return sizes
