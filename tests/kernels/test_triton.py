"""The Triton kernels in Pallas' interpreter, against the float64 oracle; on a GPU the same tests run the compiled ones.

The interpreter takes seconds a case: a few cases cover every code path by default, the shared base runs as slow tests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas import chunking
from kernels_pallas.gated_linear_attention import block_sizes, triton
from kernels_pallas.gated_linear_attention.block_sizes import BlockSizes
from kernels_pallas.testing import cases, layer_cases, oracle
from kernels_pallas.testing.layer_cases import segment_ids

from . import base

ON_GPU = jax.default_backend() == "gpu"
SMALL = BlockSizes(16, 32, 4, 1, 64)
"""Small chunks and many segments: every branch of the driver at a length the interpreter can afford."""


QUICK = None if ON_GPU else base.QUICK


def interpreted():
    return contextlib.nullcontext() if ON_GPU else kp.interpret()


def run(case: cases.Case, sizes: BlockSizes | None = None) -> dict:
    overrides = {} if sizes is None else dict.fromkeys(block_sizes.KERNELS, sizes)
    with interpreted(), block_sizes.override(**overrides):
        # Not cases.run_vjp: its cache does not know the block sizes.
        options = case.options | {"implementation": "pallas_triton"}
        # Known to the compiler, numbers of documents would be folded into the kernels.
        ids = options.pop("segment_ids", None)
        call = functools.partial(cases.run_vjp.__wrapped__, **options)
        return jax.jit(lambda *x: call(*x[:3], segment_ids=x[3]), compiler_options=QUICK)(
            case.arrays, case.state, case.cotangents, ids
        )


def regime(name: str) -> cases.Regime:
    return next(r for r in cases.REGIMES if r.name == name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bound", {"length": 70, "value_heads": 1, "gate_heads": 1, "heads": 2}),
        ("gla", {"length": 40, "heads": 1, "K": 128, "V": 32, "state": False}),
        ("saturated", {"length": 33, "heads": 1, "normalize": False}),
        ("below", {"length": 1, "heads": 2, "batch": 2}),
        ("bound", {"length": 2, "heads": 4, "value_heads": 2, "state": False}),
        # No bound: a reference point for every level of a chunk.
        ("unbounded", {"length": 70, "heads": 2, "K": 32, "V": 32, "gate_heads": 1}),
        pytest.param("jumps", {"length": 130, "heads": 1, "K": 128, "normalize": False}, marks=pytest.mark.slow),
    ],
)
def test_bfloat16(name, options):
    base.assert_close(run(case := make(name, **options)), cases.expected(case), cases.BFLOAT16)


def make(name: str, **options) -> cases.Case:
    return cases.make_case(regime(name), **{"dtype": jnp.bfloat16, **options})


@pytest.mark.slow
def test_a_layer_without_a_bound_forgets_everything():
    """Gates of -inf, in a sequence and for one token."""
    arrays = lawcat_inputs(length=20, width=32)
    arrays["gate_logits"] = arrays["gate_logits"].at[:, 9].set(-jnp.inf)
    options = {"gate_lower_bound": None}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    want = kp.lawcat_attention(**wide, **options, implementation="scan")
    with interpreted():
        call = functools.partial(kp.lawcat_attention, **options, implementation="pallas_triton")
        got = jax.jit(lambda x: call(**x), compiler_options=QUICK)(arrays)
        one = arrays | {n: arrays[n][:, 9:10] for n in layer_cases.PER_TOKEN}
        o, (S, z), _ = jax.jit(lambda x: call(**x), compiler_options=QUICK)(one)
    assert_lawcat(got, want, (5e-3, 1e-2, 5e-3))
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in (o, S, z))
    assert float(jnp.max(jnp.abs(jnp.sum(z, axis=-1) - 2))) < 2e-2  # phi(k) alone: two softmaxes


def test_gradients_that_the_backend_refuses_come_from_another():
    arrays = lawcat_inputs(length=20, width=32, dtype=jnp.float32)

    def loss(arrays):
        o, _, _ = kp.lawcat_attention(**arrays, gate_lower_bound=None, implementation="pallas_triton")
        return jnp.sum(o)

    with interpreted():
        text = str(jax.make_jaxpr(jax.grad(loss))(arrays))
    assert "lawcat_features" in text
    assert "gla_chunk_vjp" not in text


def test_float32():
    case = make("gla", length=40, heads=2, gate_heads=1, dtype=jnp.float32)
    base.assert_close(run(case), cases.expected(case), cases.FLOAT32)


@pytest.mark.parametrize("segments", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_segments(monkeypatch, segments):
    """Both ways to combine segments: inside the program (few) and by a launch of its own (many)."""
    monkeypatch.setattr(chunking, "MIN_SEGMENT", 16)
    monkeypatch.setattr(triton, "PREFIX_SEGMENTS", 8)
    case = make("gla", length=32 * segments - 3, heads=1, K=32, V=32)
    sizes = BlockSizes(16, 32, 4, 1, segments)
    _, split = triton_split(case, sizes)
    assert split.segments == segments
    base.assert_close(run(case, sizes), cases.expected(case), cases.BFLOAT16)
    with interpreted(), block_sizes.override(forward=sizes, segment_state=sizes):
        o, state = jax.jit(
            lambda x, s: kp.gated_linear_attention(*x, initial_state=s, implementation="pallas_triton"),
            compiler_options=QUICK,
        )(case.arrays, case.state)
    base.assert_close({"o": o, "S": state[0], "z": state[1]}, cases.expected(case), cases.BFLOAT16)


@pytest.mark.parametrize(
    ("starts", "options", "programs"),
    [
        # Boundaries at and around chunk edges, and documents of one token; two segments for each head.
        ([[0, 16, 17, 31, 64], [0, 1, 2, 48, 74]], {"heads": 2, "value_heads": 1, "dtype": jnp.float32}, 8),
        # No boundary in one row, one at the last token of the other; features in two blocks.
        pytest.param(
            [[0], [0, 32, 74]], {"heads": 1, "K": 128, "normalize": False, "state": False}, 1, marks=pytest.mark.slow
        ),
    ],
)
def test_documents(monkeypatch, starts, options, programs):
    monkeypatch.setattr(chunking, "MIN_SEGMENT", 16)
    case = make("bound", **{"batch": 2, "length": 75, "K": 32, "V": 32, **options})
    case.options["segment_ids"] = segment_ids(starts, 75)
    exact = case.arrays[0].dtype == jnp.float32
    got = run(case, BlockSizes(16, 32, 4, 1, programs))
    base.assert_close(got, cases.expected(case), cases.FLOAT32 if exact else cases.BFLOAT16)


def triton_split(case: cases.Case, sizes: BlockSizes):
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
    assert "float32 gradients" in reason(dtype=jnp.float32, bound=-5.0)
    assert reason(dtype=jnp.float32, bound=-5.0, differentiated=False) is None


def test_rows_of_one_reference():
    bounds = (-5.0, -2.5, -1.25, -0.625, None)
    assert [chunking.reference_rows(b, 128) for b in bounds] == [16, 32, 64, 128, 1]


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


@pytest.mark.slow
def test_tuned_sizes_are_judged_by_the_oracle():
    # In a process of its own: tune defines flags whose names other command lines have as well.
    code = """
import kernels_pallas
from kernels_pallas import tune
from kernels_pallas.gated_linear_attention import block_sizes
from kernels_pallas.testing import oracle
chosen = dict.fromkeys(block_sizes.KERNELS, block_sizes.BlockSizes(16, 32, 4, 1, 64))
with kernels_pallas.interpret():
    assert not tune.wrong(32, chosen, length=40, heads=1)
    oracle.EPS = 0.5
    assert "o" in tune.wrong(32, chosen, length=40, heads=1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def lawcat_inputs(*, length, batch=1, heads=2, kv_heads=1, width=64, state=True, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)

    def normal(*shape, kind=dtype, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, kind)

    f = width // 2
    arrays = {
        "q": normal(batch, length, heads, width),
        "k": normal(batch, length, kv_heads, width),
        "v": normal(batch, length, kv_heads, width),
        "gate_logits": normal(batch, length, kv_heads, 2 * f, kind=jnp.float32, scale=4),
        "conv_q": normal(heads, 4, width, kind=jnp.float32, scale=0.4),
        "conv_k": normal(heads, 4, width, kind=jnp.float32, scale=0.4),
        "phi": normal(heads, width, f, kind=jnp.float32, scale=0.2),
    }
    if state:
        S = jnp.abs(normal(batch, heads, 2 * f, width, kind=jnp.float32))
        arrays["initial_state"] = (S, jnp.abs(normal(batch, heads, 2 * f, kind=jnp.float32)) + 1)
        arrays["conv_state"] = (normal(batch, 3, heads, width), normal(batch, 3, kv_heads, width))
    return arrays


@pytest.mark.parametrize(
    ("options", "segments"),
    [
        pytest.param({"length": 45, "width": 32}, 1, marks=pytest.mark.slow),
        pytest.param({"length": 32, "width": 128, "state": False}, 1, marks=pytest.mark.slow),
        ({"length": 61, "width": 32}, 4),
    ],
)
def test_lawcat(monkeypatch, options, segments):
    monkeypatch.setattr(chunking, "MIN_SEGMENT", 16)
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


@pytest.mark.parametrize(
    ("options", "programs"),
    [
        ({"starts": [[0, 15, 16, 40], [0, 1, 33]], "lengths": [45, 17], "dtype": jnp.float32}, 1),
        pytest.param({"lengths": [45, 0, 32], "dtype": jnp.float32}, 1, marks=pytest.mark.slow),
        pytest.param({"starts": [[0, 15, 16, 40], [0]], "heads": 4, "kv_heads": 2}, 8, marks=pytest.mark.slow),
        pytest.param({"starts": [[0, 30], [0, 44]], "lengths": [31, 44], "heads": 1}, 4, marks=pytest.mark.slow),
    ],
)
def test_padded_and_packed_layer(monkeypatch, options, programs):
    """Outputs and every gradient; NaN and infinity at padding reach nothing."""
    monkeypatch.setattr(chunking, "MIN_SEGMENT", 16)
    case = layer_cases.make_case(**{"length": 45, "width": 32, "dtype": jnp.bfloat16, **options})
    sizes = BlockSizes(16, 32, 4, 1, programs)
    call = functools.partial(layer_cases.run_vjp.__wrapped__, implementation="pallas_triton")
    with interpreted(), block_sizes.override(**dict.fromkeys(block_sizes.KERNELS, sizes)):
        got = jax.jit(call, compiler_options=QUICK)(case.arrays, case.cotangents, case.lengths, case.segment_ids)
    bad, found = layer_cases.problems(case, got, layer_cases.TOLERANCES[case.arrays["q"].dtype.name])
    assert not bad, (bad, found)


def by_kernel(arrays: dict) -> tuple:
    """lawcat_attention by the layer kernels, (o, (S, z), tails)."""
    with interpreted():
        run = jax.jit(lambda x: kp.lawcat_attention(**x, implementation="pallas_triton"), compiler_options=QUICK)
        return run(arrays)


def assert_lawcat(got, want, limits) -> None:
    for a, b, limit in zip(jax.tree.leaves(got[:2]), jax.tree.leaves(want[:2]), limits, strict=True):
        assert oracle.error(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32))) < limit
    for a, b in zip(got[2], want[2], strict=True):
        np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))


DECODE_LIMITS = {jnp.bfloat16: (5e-3, 1e-2, 5e-3), jnp.float32: (1e-5, 1e-5, 1e-5)}


@pytest.mark.parametrize(
    ("options", "given", "sizes"),
    [
        ({"width": 32}, ("initial_state", "conv_state"), None),
        ({"width": 64, "heads": 4, "kv_heads": 2, "batch": 2}, ("initial_state", "conv_state"), None),
        ({"width": 64, "heads": 2, "kv_heads": 2}, ("initial_state", "conv_state"), None),
        ({"width": 64, "dtype": jnp.float32}, ("initial_state", "conv_state"), BlockSizes(block_v=32, num_stages=1)),
        ({"width": 128, "batch": 2}, ("initial_state", "conv_state"), None),
        ({"width": 128}, ("initial_state", "conv_state"), BlockSizes(block_v=128)),
        ({"width": 64}, ("initial_state",), None),
        ({"width": 64}, ("conv_state",), BlockSizes(block_v=32)),
        ({"width": 32}, (), None),
    ],
)
def test_decode(options, given, sizes):
    """One token: the state of every head, and tails that are the input's rows, however the columns are divided."""
    arrays = lawcat_inputs(length=1, **options)
    arrays = {n: x for n, x in arrays.items() if n not in ("initial_state", "conv_state") or n in given}
    with block_sizes.override(**({} if sizes is None else {"decode": sizes})):
        got = by_kernel(arrays)
    want = kp.lawcat_attention(**jax.tree.map(lambda x: x.astype(jnp.float32), arrays), implementation="scan")
    assert_lawcat(got, want, DECODE_LIMITS[arrays["q"].dtype.type])


def test_prefill_and_decode_equal_the_whole():
    arrays = lawcat_inputs(length=6, width=32, heads=4, kv_heads=2, dtype=jnp.float32)
    whole = by_kernel(arrays)
    sequence = {n: arrays.pop(n) for n in ("q", "k", "v", "gate_logits")}
    start = {n: arrays.pop(n) for n in ("initial_state", "conv_state")}
    o, state, tails = by_kernel(arrays | start | {n: x[:, :3] for n, x in sequence.items()})
    parts = [o]
    for t in range(3, 6):
        one = {n: x[:, t : t + 1] for n, x in sequence.items()}
        o, state, tails = by_kernel(arrays | one | {"initial_state": state, "conv_state": tails})
        parts.append(o)
    assert_lawcat((jnp.concatenate(parts, axis=1), state, tails), whole, (1e-5, 1e-5, 1e-5))


def test_decode_gradient():
    """The gradient from all that a decode step returns, tails included, to all that it is given."""
    arrays = lawcat_inputs(length=1, width=32, heads=4, kv_heads=2, dtype=jnp.float32)

    def loss(implementation, arrays):
        leaves = jax.tree.leaves(kp.lawcat_attention(**arrays, implementation=implementation))
        return sum(jnp.sum(x * jnp.sin(jnp.arange(x.size)).reshape(x.shape)) for x in leaves)

    with interpreted():
        got = jax.jit(jax.grad(functools.partial(loss, "pallas_triton")), compiler_options=QUICK)(arrays)
    want = jax.jit(jax.grad(functools.partial(loss, "scan")))(arrays)
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (got, want)), strict=True):
        assert oracle.error(a, b) < 2e-5, path


class _Triton:
    implementation = "pallas_triton"
    interpreted = not ON_GPU
    checks_varying = ON_GPU  # the interpreter types the loops of a kernel without mesh axes
    dtypes: ClassVar = {"bfloat16": cases.BFLOAT16, "float32": cases.FLOAT32}

    def _skip(self, regime, dtype):
        super()._skip(regime, dtype)
        if dtype == "float32" and chunking.strong_gates(regime.bound):
            pytest.skip("float32 gradients need a bound of at least -1.25")


@pytest.mark.slow
class TestTriton(_Triton, base.GlaBackend, base.SegmentCases, base.LayerCases):
    pass


@pytest.mark.slow
class TestTritonRequired(_Triton, base.RequiredCases):
    pass
