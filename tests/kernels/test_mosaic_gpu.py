"""The Mosaic GPU kernels in their interpreter, against the float64 oracle; on a Hopper GPU the same tests run the compiled
ones. They need jax 0.11, which needs Python 3.12."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp
from kernels_pallas import chunking
from kernels_pallas.gated_linear_attention import mosaic_gpu
from kernels_pallas.lawcat_attention import mosaic_gpu as lawcat
from kernels_pallas.lawcat_attention.xla import prepare
from kernels_pallas.testing import cases, layer_cases, oracle
from kernels_pallas.testing.layer_cases import segment_ids

from . import base
from .test_triton import lawcat_inputs
from .test_triton_lowering import cuda_module, lawcat_arrays

ON_GPU = jax.default_backend() == "gpu"
supported = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU's interpreter came with jax 0.11")


def interpreted():
    return contextlib.nullcontext() if ON_GPU else kp.interpret()


def forward(case: cases.Case, save_residuals: bool = False, lengths=None):
    run = functools.partial(
        mosaic_gpu.forward,
        normalize=case.options["normalize"],
        lower_bound=case.options["gate_lower_bound"],
        save_residuals=save_residuals,
    )
    with interpreted():
        return jax.jit(lambda *x: run(*x, lengths=lengths))(*case.arrays, case.state)


def make(name: str, **options) -> cases.Case:
    regime = next(r for r in cases.REGIMES if r.name == name)
    return cases.make_case(regime, **{"dtype": jnp.bfloat16, **options})


def check(case: cases.Case) -> None:
    o, (S, z), _ = forward(case)
    base.assert_close({"o": o, "S": S, "z": z}, cases.expected(case), cases.BFLOAT16)


@supported
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gla", {"length": 330, "heads": 2}),  # more chunks than slots
        ("gla", {"length": 330, "heads": 1, "K": 128}),
        ("below", {"length": 100, "heads": 2, "gate_heads": 1, "value_heads": 1}),
        ("bound", {"length": 70, "heads": 1, "K": 128, "V": 128, "state": False}),
        ("one", {"length": 1, "heads": 1, "V": 128, "normalize": False}),
    ],
)
def test_forward(name, options):
    check(make(name, **options))


@supported
@pytest.mark.parametrize(("length", "shortest", "segments"), [(260, 64, 3), (650, 320, 2)])
def test_segments_equal_one_pass(monkeypatch, length, shortest, segments):
    monkeypatch.setattr(chunking, "MIN_SEGMENT", shortest)
    monkeypatch.setattr(mosaic_gpu, "PROGRAMS", 6)
    case = make("gla", length=length, heads=4, value_heads=2)
    assert mosaic_gpu.plan(case.arrays[0], case.arrays[2])[1].segments == segments
    check(case)


@supported
@pytest.mark.parametrize(
    ("starts", "options"),
    [
        # Two heads a program and three segments of a head, with boundaries at and around their edges.
        ([[0, 63, 64, 128, 129, 259], [0, 1, 2, 191, 192]], {"heads": 2, "value_heads": 1}),
        ([[0, 100, 250]], {"heads": 1, "K": 128, "V": 128, "normalize": False, "state": False}),
    ],
)
def test_documents(monkeypatch, starts, options):
    monkeypatch.setattr(chunking, "MIN_SEGMENT", 64)
    monkeypatch.setattr(mosaic_gpu, "PROGRAMS", 6)
    case = make("bound", batch=len(starts), length=260, **options)
    case.options["segment_ids"] = segment_ids(starts, 260)
    assert mosaic_gpu.plan(case.arrays[0], case.arrays[2])[1].segments > 1
    with interpreted():
        got = cases.run_vjp.__wrapped__(
            case.arrays, case.state, case.cotangents, **case.options, implementation="pallas_mosaic_gpu"
        )
    base.assert_close(got, cases.expected(case), cases.BFLOAT16)


@pytest.fixture
def races(monkeypatch):
    """Lets the interpreter look for races; gives the function that says whether there were any."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter  # no public name yet
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(plgpu, "InterpretGPUParams", functools.partial(plgpu.InterpretGPUParams, detect_races=True))
    return lambda: interpreter.get_races().races_found


@supported
@pytest.mark.skipif(ON_GPU, reason="races are detected in the interpreter")
@pytest.mark.parametrize("options", [{"heads": 2}, {"heads": 1, "K": 128, "V": 128}])
@pytest.mark.parametrize("length", [None, 100])
def test_no_slot_is_loaded_again_while_it_is_read(races, options, length):
    forward(make("gla", length=330, **options), lengths=None if length is None else jnp.asarray([length]))
    assert not races()


@supported
@pytest.mark.skipif(ON_GPU, reason="races are detected in the interpreter")
@pytest.mark.parametrize("width", [64, 128])
def test_no_tile_is_formed_while_it_is_masked(races, width):
    case = layer_cases.make_case(length=330, width=width, lengths=[150], starts=[[0, 70, 140]], dtype=jnp.bfloat16)
    with interpreted():
        jax.jit(
            lambda x: kp.lawcat_attention(
                **x, lengths=case.lengths, segment_ids=case.segment_ids, implementation="pallas_mosaic_gpu"
            )
        )(case.arrays)
    assert not races()


@supported
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_a_padded_layer_lowers(d, segments):
    """For Hopper, on a machine without one: masks of rows, whole tiles and scalars included."""
    known = (jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1, 1000), jnp.int32) if segments else None)

    def gradient(arrays, lengths, ids):
        options = {"lengths": lengths, "segment_ids": ids, "implementation": "pallas_mosaic_gpu"}
        out, pullback = jax.vjp(lambda x: kp.lawcat_attention(**x, **options), arrays)
        return pullback(out)

    text = cuda_module(gradient, lawcat_arrays(1, 1000, d), *known)
    # Features twice, the states of segments, outputs, and the gradients of the chunks.
    assert text.count("custom_call @mosaic_gpu") == 5
    assert (
        len(re.findall(r"custom_call @__gpu\$xla.gpu.triton", text)) == 5
    )  # two sweeps, one of them twice, and what joins them


@supported
@pytest.mark.parametrize(
    "options",
    [
        {"length": 100, "width": 64, "heads": 4, "kv_heads": 2},
        {"length": 130, "width": 128, "heads": 1, "state": False},
        {"length": 3, "width": 64, "heads": 3, "kv_heads": 3},
    ],
)
def test_features(options):
    """Convolution and feature map of q and k, whatever comes before the sequence."""
    x = lawcat_inputs(**options)
    with interpreted():
        front = {"gate_normalizer": 16.0, "gate_lower_bound": -1.25, "lengths": None, "numbers": None}
        names = ("q", "k", "gate_logits", "conv_q", "conv_k", "phi")
        got = jax.jit(functools.partial(lawcat.features, **front))(*(x[n] for n in names), x.get("conv_state"))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), x)
    inputs = (wide[n] for n in ("q", "k", "gate_logits", "conv_q", "conv_k", "phi"))
    want = prepare(*inputs, wide.get("conv_state"), None, 16.0)
    for a, b in zip(got, want, strict=True):
        assert oracle.error(a.astype(jnp.float32), b) < 5e-3


@supported
def test_gradients_of_a_chunk():
    """The kernel of the gradients inside the whole backward pass, states between segments and padding included."""
    case = make("below", length=70, heads=2, gate_heads=1, value_heads=1)
    with interpreted():
        got = cases.run_vjp.__wrapped__(
            case.arrays, case.state, case.cotangents, **case.options, implementation="pallas_mosaic_gpu"
        )
    base.assert_close(got, cases.expected(case), cases.BFLOAT16)


@supported
def test_residuals_are_what_the_backward_pass_takes():
    case = make("gla", length=70, heads=2)
    o, _, residuals = forward(case, save_residuals=True)
    saved, den, segment, _ = residuals[5:]
    assert segment is None
    assert bool(jnp.array_equal(saved, o))
    assert den.shape == (1, 70, 2)


def test_reasons():
    def reason(K=64, V=64, dtype=jnp.bfloat16, bound=-1.25):
        q, v = jax.ShapeDtypeStruct((1, 8, 2, K), dtype), jax.ShapeDtypeStruct((1, 8, 2, V), dtype)
        return mosaic_gpu.supports(q, q, v, q, normalize=True, lower_bound=bound, differentiated=True)

    if jax.__version_info__ < (0, 11):
        assert "jax 0.11" in reason()
        return
    assert reason() is None
    assert "K must be 64 or 128, got 32" in reason(K=32)
    assert "V must be 64 or 128, got 256" in reason(V=256)
    assert "float32" in reason(dtype=jnp.float32)
    assert "gate_lower_bound" in reason(bound=-5.0)


class _MosaicGpu:
    implementation = "pallas_mosaic_gpu"
    interpreted = not ON_GPU
    supports_unbounded = False
    rematerialises = ON_GPU  # the interpreter's callbacks have effects, which jax.checkpoint refuses
    dtypes: ClassVar = {"bfloat16": cases.BFLOAT16}

    def _skip(self, regime, dtype):
        super()._skip(regime, dtype)
        if regime.bound < -1.25:
            pytest.skip("it needs a bound of at least -1.25")


@supported
@pytest.mark.slow
class TestMosaicGpuRequired(_MosaicGpu, base.RequiredCases):
    pass


@supported
@pytest.mark.slow
class TestMosaicGpu(_MosaicGpu, base.GlaBackend, base.SegmentCases, base.LayerCases):
    def test_shard_map_over_batch_and_heads(self):
        """Types only: the interpreter has one device's memory."""
        case = make("gla", batch=2, length=65, heads=4, value_heads=2, gate_heads=2)
        mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        rows, state = P("data", None, "model"), (P("data", "model"), P("data", "model"))

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=((rows,) * 4, state), out_specs=(rows, state))
        def run(arrays, state):
            return kp.gated_linear_attention(*arrays, initial_state=state, implementation=self.implementation)

        o, (S, z) = jax.eval_shape(run, case.arrays, case.state)
        assert (o.shape, S.shape, z.shape) == ((2, 65, 4, 64), (2, 4, 64, 64), (2, 4, 64))
