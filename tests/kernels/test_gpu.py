"""Padding, packed documents and gates without a bound on a real NVIDIA GPU, against the float64 oracle, gradients included.

    XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_PLATFORMS=cuda python -m pytest -m gpu tests/kernels/test_gpu.py -q -n 6

The errors of every case are printed at the end, whether it passed or not. Elsewhere nothing here runs: the same kernels go
through the shared cases in the interpreter.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas as kp
from kernels_pallas.lawcat_attention.api import kernel_for
from kernels_pallas.testing import cases, layer_cases
from kernels_pallas.testing.layer_cases import segment_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

TRITON, MOSAIC = "pallas_triton", "pallas_mosaic_gpu"

# Around chunk edges, of one token, within one chunk; and a row of one document that lacks but its last token.
STARTS = [[0, 63, 64, 65, 128, 500, 510, 640], [0, 1, 2, 3, 699], [0, 699]]
LONG = [[0, 255, 256, 770, 1290]]
"""Of one row, which is cut into segments."""


@functools.cache
def refusal(implementation: str, dtype: str) -> str | None:
    """Why this GPU cannot run it at all."""
    q = jax.ShapeDtypeStruct((1, 128, 4, 64), dtype)
    try:
        kp.implementation_for(q, q, q, q, implementation=implementation)
    except ValueError as problem:
        return str(problem)
    return None


@pytest.fixture
def report(request, record_property):
    def add(errors: dict[str, float], bad: list[str]) -> None:
        found = " ".join(f"{name}={error:.1e}" for name, error in errors.items())
        record_property("kernel_errors", f"{'FAIL ' + ', '.join(bad) if bad else 'ok'} {request.node.name}: {found}")
        assert not bad, bad

    return add


@pytest.mark.parametrize("implementation", [TRITON, MOSAIC])
@pytest.mark.parametrize(
    ("starts", "size", "options"),
    [
        (STARTS, 64, {"heads": 8, "value_heads": 4, "gate_heads": 2}),
        (STARTS, 128, {"heads": 4, "value_heads": 2, "gate_heads": 1}),
        (LONG, 128, {"heads": 2, "normalize": False, "state": False}),
        (STARTS, 64, {"heads": 4, "dtype": jnp.float32}),
    ],
    ids=["64", "128", "128 in segments", "64 float32"],
)
def test_documents(implementation, starts, size, options, report):
    length = 1300 if starts is LONG else 700
    case = cases.make_case(batch=len(starts), length=length, K=size, V=size, **{"dtype": jnp.bfloat16, **options})
    dtype = case.arrays[0].dtype.name
    if why := refusal(implementation, dtype):
        pytest.skip(why)
    case.options["segment_ids"] = segment_ids(starts, length)
    got = cases.run_vjp(case.arrays, case.state, case.cotangents, **case.options, implementation=implementation)
    want = cases.expected(case)
    report(cases.errors(got, want), cases.failures(got, want, cases.TOLERANCES[dtype]))


@pytest.mark.parametrize("size", [64, 128])
def test_gates_without_a_bound(size, report):
    case = cases.make_case(cases.BY_NAME["jumps"], length=700, heads=4, K=size, V=size, dtype=jnp.bfloat16)
    case.options["segment_ids"] = segment_ids([[0, 63, 64, 500]], 700)
    got = cases.run_vjp(case.arrays, case.state, case.cotangents, **case.options, implementation=TRITON)
    want = cases.expected(case)
    report(cases.errors(got, want), cases.failures(got, want, cases.BFLOAT16))


@pytest.mark.parametrize("implementation", [TRITON, MOSAIC])
@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"length": 700, "lengths": [700, 0, 641]}, 64),
        ({"length": 700, "lengths": [700, 63, 641]}, 128),
        ({"length": 700, "starts": STARTS, "lengths": [641, 700, 699]}, 64),
        ({"length": 700, "starts": STARTS}, 128),
        ({"length": 1300, "starts": LONG, "lengths": [1295], "heads": 2, "kv_heads": 2}, 64),
    ],
    ids=["padded 64", "padded 128", "packed and padded 64", "packed 128", "packed and padded in segments 64"],
)
def test_layer(implementation, options, width, report):
    case = layer_cases.make_case(**{"heads": 8, "kv_heads": 4, "width": width, "dtype": jnp.bfloat16, **options})
    if why := refusal(implementation, "bfloat16"):
        pytest.skip(why)
    arrays = (case.arrays[name] for name in (*layer_cases.PER_TOKEN, *layer_cases.PARAMETERS))
    known = {"lengths": case.lengths is not None, "segments": case.segment_ids is not None}
    assert kernel_for(*arrays, **known, implementation=implementation) == implementation
    got = layer_cases.run_vjp(
        case.arrays, case.cotangents, case.lengths, case.segment_ids, implementation=implementation
    )
    bad, errors = layer_cases.problems(case, got, layer_cases.TOLERANCES["bfloat16"])
    report(errors, bad)
