"""The backends in plain XLA against the float64 oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas.gated_linear_attention import scan
from kernels_pallas.testing import oracle
from kernels_pallas.testing.cases import FLOAT32, expected, make_case, run_vjp

from .base import GlaBackend, LayerCases, RequiredCases, SegmentCases, assert_close


class TestScan(GlaBackend, SegmentCases, LayerCases):
    implementation = "scan"
    K = V = 32

    def test_padded_and_packed_layer(self):
        self.check_layer(length=70, width=16, starts=[[0, 1, 2, 64], [0, 33]], lengths=[69, 0])


class TestReference(GlaBackend, SegmentCases, LayerCases):
    # It computes in float32 whatever the inputs are, so one dtype says it all.
    implementation = "reference"
    dtypes = {"float32": FLOAT32}  # noqa: RUF012
    K = V = 16


@pytest.mark.slow
class TestScanRequired(RequiredCases):
    implementation = "scan"


@pytest.mark.slow
class TestReferenceRequired(RequiredCases):
    implementation = "reference"
    dtypes = TestReference.dtypes


@pytest.mark.slow
def test_groups_of_chunks_equal_one_pass(monkeypatch):
    case = make_case(length=300, heads=2, K=16, V=32)
    want = expected(case)
    monkeypatch.setattr(scan, "CPU_STATE_BUDGET_BYTES", 3 * 2 * 16 * 32 * 4)
    assert scan.make_plan((1, 300, 2, 16), 32, -1.25, "cpu").steps > 1
    got = jax.jit(lambda *a: run_vjp.__wrapped__(*a, **case.options, implementation="scan"))(
        case.arrays, case.state, case.cotangents
    )
    assert_close(got, want, FLOAT32)


@pytest.mark.slow
def test_a_wider_bound_changes_nothing():
    """Bounds -1.25 and -3 take one reference and blocks of 16 rows for the same function."""
    case = make_case(length=130, heads=2, K=16, V=16)
    first, other = (
        run_vjp(case.arrays, case.state, case.cotangents, normalize=True, gate_lower_bound=bound, implementation="scan")
        for bound in (-1.25, -3.0)
    )
    for name, x in first.items():
        assert oracle.error(other[name], x) < 1e-5, name


@pytest.mark.parametrize("normalize", [True, False])
def test_decode_steps_equal_the_sequence(normalize):
    case = make_case(length=5, heads=4, value_heads=2, gate_heads=1, K=16, V=8, normalize=normalize)
    step = jax.jit(lambda *a: kp.decode_step(*a, normalize=normalize))
    state, rows = case.state, []
    for t in range(5):
        o, state = step(*(x[:, t] for x in case.arrays), state)
        rows.append(o)
    want = expected(case)
    assert oracle.error(jnp.stack(rows, axis=1), want["o"]) < 1e-6
    assert oracle.error(state[0], want["S"]) < 1e-6
    assert oracle.error(state[1], want["z"]) < 1e-6


def test_decode_gradient():
    case = make_case(length=1, heads=4, value_heads=2, gate_heads=1, K=16, V=8)

    @jax.jit
    def run(arrays, state, do, dS, dz):
        _, pullback = jax.vjp(lambda a, s: kp.decode_step(*(x[:, 0] for x in a), s), arrays, state)
        return pullback((do[:, 0], (dS, dz)))

    grads, (dS0, dz0) = run(case.arrays, case.state, *case.cotangents)
    got = dict(zip(("dq", "dk", "dv", "dlog_g"), grads, strict=True)) | {"dS0": dS0, "dz0": dz0}
    assert_close(got, expected(case), FLOAT32)


class TestErrors:
    q = jnp.ones((1, 4, 4, 8))
    g = jnp.zeros((1, 4, 2, 8))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"k": jnp.ones((1, 4, 4, 4))}, "k: expected the shape of q"),
            ({"v": jnp.ones((1, 4, 3, 8))}, "v: its 3 heads must divide"),
            ({"log_g": jnp.ones((1, 4, 2, 4))}, "log_g: expected 8 features"),
            ({"log_g": jnp.ones((1, 3, 2, 8))}, "log_g: expected leading dimensions"),
            ({"q": jnp.ones((1, 4, 4, 8), jnp.int32)}, "q: expected float32 or bfloat16"),
            ({"v": jnp.ones((1, 4, 4, 8), jnp.bfloat16)}, "v: expected the dtype of q"),
            ({"q": jnp.ones((4, 4, 8))}, "q: expected 4 dimensions"),
            ({"q": [1.0]}, "q: expected an array"),
            ({"initial_state": jnp.ones(3)}, "initial_state: expected a pair"),
            ({"initial_state": (jnp.ones((1, 4, 8, 8)), jnp.ones((1, 4, 4)))}, "initial_state z: expected"),
            ({"gate_lower_bound": 0.5}, "gate_lower_bound: expected a finite number below 0"),
            ({"implementation": "cuda"}, "implementation: unknown 'cuda'"),
            ({"implementation": "pallas_triton"}, "implementation: 'pallas_triton' cannot be used: it runs on cuda"),
            ({"implementation": "pallas_tpu"}, "implementation: 'pallas_tpu' cannot be used: it runs on tpu"),
        ],
    )
    def test_argument(self, change, message):
        call = {"q": self.q, "k": self.q, "v": self.q, "log_g": self.g} | change
        with pytest.raises(ValueError, match=message):
            kp.gated_linear_attention(**call)

    def test_positive_gate_in_debug_mode(self, monkeypatch):
        monkeypatch.setenv("KERNELS_PALLAS_CHECK", "1")
        with pytest.raises(ValueError, match=r"log_g: must be at most 0, found 0\.5"):
            kp.gated_linear_attention(self.q, self.q, self.q, self.g + 0.5)

    def test_sharded_sequence_axis(self):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        q = jax.device_put(self.q, jax.NamedSharding(mesh, jax.P(None, "x")))
        with pytest.raises(ValueError, match=r"q: its sequence axis is sharded over 'x'; call kernels_pallas\.context"):
            kp.gated_linear_attention(q, q, q, self.g)

    def test_decode_state(self):
        row = np.ones((1, 4, 8), np.float32)
        with pytest.raises(ValueError, match="state S: expected"):
            kp.decode_step(row, row, row, -row, (jnp.ones((1, 4, 8, 4)), jnp.ones((1, 4, 8))))


def test_default_implementation_is_strict_and_nests():
    q = jnp.ones((1, 2, 1, 4))
    assert kp.implementation_for(q, q, q, -q) == "scan"
    with kp.default_implementation("reference"):
        assert kp.implementation_for(q, q, q, -q) == "reference"
        assert kp.implementation_for(q, q, q, -q, implementation="scan") == "scan"
    assert kp.implementation_for(q, q, q, -q) == "scan"
    with kp.lowering_for("gpu"):
        assert kp.target_platform() == "cuda"
