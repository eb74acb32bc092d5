"""TPU kernels of gated linear attention, in the Pallas interpreter against the float64 oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

import kernels_pallas as kp
from kernels_pallas.gated_linear_attention import tpu, tpu_plan
from kernels_pallas.testing.cases import BFLOAT16, REGIMES, expected, make_case, run_vjp

from .base import GlaBackend, LayerCases, RequiredCases, SegmentCases, assert_close

REGIME = {r.name: r for r in REGIMES}


def _check(case, tolerances=BFLOAT16):
    with kp.interpret():
        got = run_vjp(case.arrays, case.state, case.cotangents, **case.options, implementation="pallas_tpu")
    return assert_close(got, expected(case), tolerances)


class _Interpreted:
    implementation = "pallas_tpu"
    interpreted = True

    # jax's interpreter mixes varying and unvarying indices; test_tpu_aot compiles the real kernels with the check on.
    checks_varying = False


@pytest.mark.slow
class TestTpu(_Interpreted, GlaBackend):
    pass


@pytest.mark.slow
class TestTpu128(_Interpreted, GlaBackend):
    K = V = 128


@pytest.mark.slow
class TestTpuSegments(_Interpreted, SegmentCases, LayerCases):
    K = V = 64


@pytest.mark.slow
class TestTpuRequired(_Interpreted, RequiredCases):
    pass


# The default selection: every code path once, with as few compilations as that takes.


@pytest.mark.parametrize(
    ("regime", "sizes"),
    [
        # Two heads a tile, values and gates shared, ragged last chunk, initial state.
        ("gla", {"length": 150, "heads": 4, "value_heads": 2, "gate_heads": 1, "K": 64, "V": 64, "batch": 2}),
        # One head a tile; not shared; at the bound.
        pytest.param("bound", {"length": 300, "heads": 2, "K": 128, "V": 128, "state": False}, marks=pytest.mark.slow),
        # No bound: binary levels down to single rows.
        ("unbounded", {"length": 70, "heads": 2, "value_heads": 1, "K": 64, "V": 64, "normalize": False}),
    ],
)
def test_bfloat16_gradients(regime, sizes):
    _check(make_case(REGIME[regime], dtype=jnp.bfloat16, **sizes))


@pytest.mark.parametrize(
    ("regime", "sizes"),
    [
        ("below", {"length": 1, "heads": 3, "K": 40, "V": 24}),
        ("saturated", {"length": 65, "heads": 4, "gate_heads": 2, "K": 32, "V": 16}),
        # Where rounding of exponents, and of what cancels, shows most.
        ("bound", {"length": 65, "heads": 1, "K": 128, "V": 128, "normalize": False}),
        ("saturated", {"length": 2, "heads": 1, "K": 128, "V": 128, "state": False}),
    ],
)
def test_float32_gradients(regime, sizes):
    _check(make_case(REGIME[regime], **sizes), GlaBackend.dtypes["float32"])


@pytest.mark.slow
def test_uninitialised_memory_and_blocks_beyond_the_end_do_not_matter(monkeypatch):
    monkeypatch.setattr(tpu, "INTERPRET", pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True))
    _check(make_case(length=130, heads=2, value_heads=1, K=64, V=64, dtype=jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_head_counts_and_sizes(heads, size):
    for shared in (1, heads):
        case = make_case(length=40, heads=heads, value_heads=shared, gate_heads=shared, K=size, V=size)
        _check(case, GlaBackend.dtypes["float32"])


@pytest.mark.slow
def test_one_kv_head_read_by_several_programs():
    case = make_case(length=40, heads=32, value_heads=1, gate_heads=1, K=128, V=128, dtype=jnp.bfloat16)
    plan = tpu_plan.make_plan(case.arrays[0], case.arrays[2], case.arrays[3], -1.25)
    assert plan.v_group > plan.heads_block
    _check(case)


def test_support_is_answered_without_a_device():
    def support(K, V, H=4, Hv=4):
        q = jax.ShapeDtypeStruct((1, 8, H, K), jnp.bfloat16)
        v = jax.ShapeDtypeStruct((1, 8, Hv, V), jnp.bfloat16)
        return tpu.supports(q, q, v, q, normalize=True, lower_bound=-1.25, differentiated=True)

    assert support(64, 64) is None
    assert support(128, 16, Hv=2) is None
    assert "256" in support(512, 64)


def test_plan_packs_narrow_heads_and_keeps_blocks_of_whole_tiles():
    def plan(H, Hv, Hg, d, T=4096, bound=-1.25, **options):
        def struct(heads):
            return jax.ShapeDtypeStruct((1, T, heads, d), jnp.bfloat16)

        return tpu_plan.make_plan(struct(H), struct(Hv), struct(Hg), bound, **options)

    llama = plan(32, 8, 8, 64)
    assert (llama.pack, llama.heads_block, llama.chunk, llama.block) == (2, 16, 128, 64)
    mistral = plan(32, 8, 8, 128)
    assert (mistral.pack, mistral.heads_block, mistral.head_blocks) == (1, 8, 4)
    assert plan(32, 1, 1, 64).heads_block == 32
    assert plan(3, 3, 3, 64).width == 128
    assert [plan(32, 8, 8, 64, bound=b).block for b in (-0.5, -2.5, -5.0, None)] == [128, 32, 16, 1]
    assert plan(32, 8, 8, 64, T=17).chunk == 32
    assert plan(32, 8, 8, 64, forward=True).chunk == tpu_plan.FORWARD_CHUNK
    assert plan(32, 8, 8, 64, bound=-5.0, forward=True).chunk == tpu_plan.MAX_CHUNK
