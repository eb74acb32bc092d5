"""The Triton kernels in Pallas' interpreter, against the float64 oracle; on a GPU the same tests run the compiled ones.

The interpreter takes seconds a case: a few cases cover every code path by default, the shared base runs as slow tests.
"""

from __future__ import annotations

import contextlib
import functools
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas.gla import block_sizes, triton
from kernels_pallas.gla.block_sizes import BlockSizes

from . import base, oracle

ON_GPU = jax.default_backend() == "gpu"
SMALL = BlockSizes(16, 32, 4, 1, 64)
"""Small chunks and many segments: every branch of the driver at a length the interpreter can afford."""


QUICK = None if ON_GPU else {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Interpreted kernels compile for longer than they run."""


def interpreted():
    return contextlib.nullcontext() if ON_GPU else kp.interpret()


def run(case: base.Case, sizes: BlockSizes | None = None) -> dict:
    overrides = {} if sizes is None else dict.fromkeys(block_sizes.KERNELS, sizes)
    with interpreted(), block_sizes.override(**overrides):
        # Not base.run_vjp: its cache does not know the block sizes.
        options = case.options | {"implementation": "pallas_triton"}
        return jax.jit(functools.partial(base.run_vjp.__wrapped__, **options), compiler_options=QUICK)(
            case.arrays, case.state, case.cotangents
        )


def regime(name: str) -> base.Regime:
    return next(r for r in base.REGIMES if r.name == name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bound", {"length": 70, "value_heads": 1, "gate_heads": 1, "heads": 2}),
        ("gla", {"length": 40, "heads": 1, "K": 128, "V": 32, "state": False}),
        ("saturated", {"length": 33, "heads": 1, "normalize": False}),
        ("below", {"length": 1, "heads": 2, "batch": 2}),
    ],
)
def test_bfloat16(name, options):
    base.assert_close(run(case := make(name, **options)), base.expected(case), base.BFLOAT16)


def make(name: str, **options) -> base.Case:
    return base.make_case(regime(name), **{"dtype": jnp.bfloat16, **options})


def test_float32():
    case = make("gla", length=40, heads=2, gate_heads=1, dtype=jnp.float32)
    base.assert_close(run(case), base.expected(case), base.FLOAT32)


@pytest.mark.parametrize("segments", [4, 16])
def test_segments(monkeypatch, segments):
    """Both ways to combine segments: inside the program (few) and by a launch of its own (many)."""
    monkeypatch.setattr(block_sizes, "MIN_SEGMENT", 16)
    monkeypatch.setattr(triton, "PREFIX_SEGMENTS", 8)
    case = make("gla", length=32 * segments - 3, heads=1, K=32, V=32)
    sizes = BlockSizes(16, 32, 4, 1, segments)
    _, split = triton_split(case, sizes)
    assert split.segments == segments
    base.assert_close(run(case, sizes), base.expected(case), base.BFLOAT16)
    with interpreted(), block_sizes.override(forward=sizes, segment_state=sizes):
        o, state = jax.jit(
            lambda x, s: kp.gated_linear_attention(*x, initial_state=s, implementation="pallas_triton"),
            compiler_options=QUICK,
        )(case.arrays, case.state)
    base.assert_close({"o": o, "S": state[0], "z": state[1]}, base.expected(case), base.BFLOAT16)


def triton_split(case: base.Case, sizes: BlockSizes):
    with block_sizes.override(forward=sizes):
        return triton.plan_forward(case.arrays[0], case.arrays[2], -1.25)


def test_reasons():
    def reason(K=64, V=64, dtype=jnp.bfloat16, bound=-1.25, differentiated=True):
        q, v = jax.ShapeDtypeStruct((1, 8, 2, K), dtype), jax.ShapeDtypeStruct((1, 8, 2, V), dtype)
        return triton.supports(q, q, v, q, normalize=True, lower_bound=bound, differentiated=differentiated)

    assert reason() is None
    assert "K must be a power of two" in reason(K=48)
    assert "up to 128" in reason(V=256)
    assert reason(V=256, differentiated=False) is None
    assert "float16" in reason(dtype=jnp.float16)


def test_block_sizes(tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    entry = {"chunk": 32, "block_v": 64, "num_warps": 8, "num_stages": 3, "programs": 99}
    table.write_text(json.dumps({"default": {"forward": {"bfloat16:64x64": entry}}}))
    monkeypatch.setattr(block_sizes, "TABLE", table)
    monkeypatch.setattr(block_sizes.read_table, "__defaults__", (table,))
    assert block_sizes.lookup("forward", jnp.bfloat16, 64, 64) == BlockSizes(32, 64, 8, 3, 99)
    assert block_sizes.lookup("forward", jnp.bfloat16, 128, 128).num_warps == 4
    with block_sizes.override(forward=SMALL):
        assert block_sizes.lookup("forward", jnp.bfloat16, 64, 64) == SMALL
    with pytest.raises(ValueError, match="unknown kernel 'nothing'"), block_sizes.override(nothing=SMALL):
        pass
    assert [block_sizes.single_reference_limit(b) for b in (-5.0, -2.5, -1.25, -0.625, None)] == [16, 32, 64, 128, 1]


def lawcat_inputs(*, length, heads=2, kv_heads=1, width=64, state=True, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)

    def normal(*shape, kind=dtype, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, kind)

    f = width // 2
    arrays = {
        "q": normal(1, length, heads, width),
        "k": normal(1, length, kv_heads, width),
        "v": normal(1, length, kv_heads, width),
        "gate_logits": normal(1, length, kv_heads, 2 * f, kind=jnp.float32, scale=4),
        "conv_q": normal(heads, 4, width, kind=jnp.float32, scale=0.4),
        "conv_k": normal(heads, 4, width, kind=jnp.float32, scale=0.4),
        "phi": normal(heads, width, f, kind=jnp.float32, scale=0.2),
    }
    if state:
        S = jnp.abs(normal(1, heads, 2 * f, width, kind=jnp.float32))
        arrays["initial_state"] = (S, jnp.abs(normal(1, heads, 2 * f, kind=jnp.float32)) + 1)
        arrays["conv_state"] = (normal(1, 3, heads, width), normal(1, 3, kv_heads, width))
    return arrays


@pytest.mark.parametrize(
    ("options", "segments"),
    [
        ({"length": 45, "width": 32}, 1),
        ({"length": 1, "width": 64}, 1),
        ({"length": 32, "width": 128, "state": False}, 1),
        ({"length": 61, "width": 32}, 4),
    ],
)
def test_lawcat(monkeypatch, options, segments):
    monkeypatch.setattr(block_sizes, "MIN_SEGMENT", 16)
    arrays = lawcat_inputs(**options)
    sizes = BlockSizes(16, 32, 4, 1, 2 * segments)
    with interpreted(), block_sizes.override(features=sizes, forward=sizes, segment_state=sizes):
        got = jax.jit(lambda x: kp.lawcat_attention(**x, implementation="pallas_triton"), compiler_options=QUICK)(
            arrays
        )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    want = kp.lawcat_attention(**wide, implementation="scan")
    limits = (5e-3, 1e-2, 5e-3, 1e-6, 1e-6)
    for a, b, limit in zip(jax.tree.leaves(got), jax.tree.leaves(want), limits, strict=True):
        assert oracle.error(np.asarray(a.astype(jnp.float32)), np.asarray(b)) < limit


@pytest.mark.slow
class TestTriton(base.GlaBackend):
    implementation = "pallas_triton"
    interpreted = not ON_GPU
    supports_unbounded = False
    dtypes: ClassVar = {"bfloat16": base.BFLOAT16, "float32": base.FLOAT32}
