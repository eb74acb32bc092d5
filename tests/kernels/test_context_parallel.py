"""Sequences sharded over a mesh axis against the unsharded operations, on simulated devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp
from kernels_pallas import context_parallel
from kernels_pallas.testing import oracle
from kernels_pallas.testing.cases import FLOAT32, REGIMES, expected, make_case

from .base import assert_close
from .test_lawcat import make_inputs


def sequence_mesh(size: int):
    return jax.make_mesh((size,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


@pytest.mark.parametrize(
    ("devices", "check_vma", "state", "regime"),
    [
        (8, True, True, REGIMES[3]),
        pytest.param(4, True, False, REGIMES[4], marks=pytest.mark.slow),
        (4, False, True, REGIMES[8]),
        pytest.param(2, True, True, REGIMES[7], marks=pytest.mark.slow),
        pytest.param(8, False, True, REGIMES[0], marks=pytest.mark.slow),
        pytest.param(1, True, True, REGIMES[3], marks=pytest.mark.slow),
    ],
)
def test_gated_linear_attention(devices, check_vma, state, regime):
    case = make_case(regime, batch=2, length=8 * 24, heads=4, value_heads=2, gate_heads=1, K=16, V=16, state=state)
    rows, whole = P(None, "seq"), P()

    def local(arrays, state):
        options = case.options | {"axis_name": "seq", "implementation": "scan"}
        return context_parallel.gated_linear_attention(*arrays, initial_state=state, **options)

    sharded = jax.shard_map(
        local,
        mesh=sequence_mesh(devices),
        in_specs=(rows, whole),
        out_specs=(rows, (whole, whole)),
        check_vma=check_vma,
    )

    @jax.jit
    def run(arrays, state, cotangents):
        (o, (S, z)), pullback = jax.vjp(sharded, arrays, state)
        (dq, dk, dv, dlog_g), dstate = pullback((cotangents[0], cotangents[1:]))
        out = {"o": o, "S": S, "z": z, "dq": dq, "dk": dk, "dv": dv, "dlog_g": dlog_g}
        return out if dstate is None else out | {"dS0": dstate[0], "dz0": dstate[1]}

    assert_close(run(case.arrays, case.state, case.cotangents), expected(case), FLOAT32)


@pytest.mark.parametrize("with_lengths", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lawcat_attention_and_its_gradients(with_lengths):
    inputs = make_inputs(batch=2, length=32, heads=4, kv_heads=2)
    arrays = {name: inputs[name] for name in ("q", "k", "v", "gate_logits", "conv_q", "conv_k", "phi")}
    arrays |= {"initial_state": inputs["initial_state"], "conv_state": inputs["conv_state"]}
    lengths = jnp.asarray([2, 19]) if with_lengths else None
    spec = {name: P(None, "seq") if name in ("q", "k", "v", "gate_logits") else P() for name in arrays}

    @functools.partial(
        jax.shard_map,
        mesh=sequence_mesh(4),
        in_specs=(spec,),
        out_specs=(P(None, "seq"), P(), P()),
    )
    def sharded(arrays):
        return context_parallel.lawcat_attention(**arrays, lengths=lengths, axis_name="seq", implementation="scan")

    def whole(arrays):
        return kp.lawcat_attention(**arrays, lengths=lengths, implementation="scan")

    def loss(run, arrays):
        out = run(arrays)
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in jax.tree.leaves(out)), out

    results = []
    for run in (sharded, whole):
        (_, out), grads = jax.jit(jax.value_and_grad(functools.partial(loss, run), has_aux=True))(arrays)
        results.append((out, grads))
    got, want = (jax.tree_util.tree_leaves_with_path(x) for x in results)
    for (path, a), (_, b) in zip(got, want, strict=True):
        assert oracle.error(a, b) < 5e-6, path


def test_causal_conv1d():
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(2, 16, 3))), jnp.asarray(rng.normal(size=(4, 3)))
    run = jax.shard_map(
        functools.partial(context_parallel.causal_conv1d, axis_name="seq"),
        mesh=sequence_mesh(4),
        in_specs=(P(None, "seq"), P()),
        out_specs=(P(None, "seq"), P()),
    )
    for a, b in zip(jax.jit(run)(x, w), kp.causal_conv1d(x, w), strict=True):
        assert oracle.error(a, b) < 1e-6


def test_errors_name_the_argument():
    case = make_case(length=8, heads=2, K=8, V=8)
    with pytest.raises(ValueError, match="axis_name: 'seq' is not an axis"):
        context_parallel.gated_linear_attention(*case.arrays, axis_name="seq")
    run = jax.shard_map(
        functools.partial(context_parallel.causal_conv1d, axis_name="seq"),
        mesh=sequence_mesh(8),
        in_specs=(P(None, "seq"), P()),
        out_specs=(P(None, "seq"), P()),
    )
    with pytest.raises(ValueError, match="x: a shard must hold at least 3 tokens"):
        run(jnp.ones((1, 16, 2)), jnp.ones((4, 2)))
