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
from kernels_pallas.testing import layer_cases, oracle
from kernels_pallas.testing.cases import FLOAT32, REGIMES, Case, Regime, errors, expected, failures, make_case

from .base import QUICK, assert_close


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
    assert_close(run_sharded(case, devices, check_vma=check_vma), expected(case), FLOAT32)


def run_sharded(case: Case, devices: int, *, check_vma: bool = True, implementation: str = "scan") -> dict:
    """``cases.run_vjp`` of the sharded operation."""
    rows, whole = P(None, "seq"), P()
    ids = case.options.get("segment_ids")
    options = {name: x for name, x in case.options.items() if name != "segment_ids"}

    def local(arrays, state, ids):
        return context_parallel.gated_linear_attention(
            *arrays, initial_state=state, segment_ids=ids, axis_name="seq", implementation=implementation, **options
        )

    sharded = jax.shard_map(
        local,
        mesh=sequence_mesh(devices),
        in_specs=(rows, whole, rows),
        out_specs=(rows, (whole, whole)),
        check_vma=check_vma,
    )

    def run(arrays, state, cotangents, ids):
        (o, (S, z)), pullback = jax.vjp(lambda arrays, state: sharded(arrays, state, ids), arrays, state)
        (dq, dk, dv, dlog_g), dstate = pullback((cotangents[0], cotangents[1:]))
        out = {"o": o, "S": S, "z": z, "dq": dq, "dk": dk, "dv": dv, "dlog_g": dlog_g}
        return out if dstate is None else out | {"dS0": dstate[0], "dz0": dstate[1]}

    return jax.jit(run, compiler_options=QUICK)(case.arrays, case.state, case.cotangents, ids)


DOCUMENTS = {
    "at edges of shards": (0, 24, 48, 96, 144),
    "around edges of shards": (0, 23, 25, 47, 49, 95, 97),
    "of one token": (0, 1, 2, 24, 25, 26, 95, 96, 97, 190, 191),
    "around edges of chunks": (0, 63, 64, 65, 127, 159, 160, 161),
    "over several shards": (0, 30, 150),
    "every token": range(192),
    "whole": (0,),
    "whole but the last token": (0, 191),
}
"""Where documents start in rows of 192 tokens: 2, 4 or 8 shards, chunks of 64 tokens at most."""


def packed_case(regime: Regime, **options) -> Case:
    """A row for each of DOCUMENTS, whose ids are 7, 8, 7, 8, ..."""
    batch, length = len(DOCUMENTS), 192
    shape = {"heads": 2, "value_heads": 1, "gate_heads": 1, "K": 16, "V": 16} | options
    case = make_case(regime, batch=batch, length=length, **shape)
    numbers = [np.searchsorted(starts, np.arange(length), side="right") for starts in DOCUMENTS.values()]
    case.options["segment_ids"] = jnp.asarray(8 - np.stack(numbers) % 2, jnp.int32)
    return case


@pytest.mark.parametrize(
    ("devices", "check_vma", "options"),
    [
        (8, True, {"regime": REGIMES[3]}),
        (4, False, {"regime": REGIMES[4], "normalize": False}),
        (2, True, {"regime": REGIMES[8], "state": False}),
        pytest.param(1, True, {"regime": REGIMES[3]}, marks=pytest.mark.slow),
        pytest.param(2, False, {"regime": REGIMES[0]}, marks=pytest.mark.slow),
        pytest.param(4, True, {"regime": REGIMES[5]}, marks=pytest.mark.slow),
        pytest.param(8, True, {"regime": REGIMES[7]}, marks=pytest.mark.slow),
    ],
)
def test_packed_rows(devices, check_vma, options):
    """Each document as if it were alone, on however many shards it lies."""
    case = packed_case(**options)
    found = run_sharded(case, devices, check_vma=check_vma)
    want = expected(case)
    bad = {}
    for row, name in enumerate(DOCUMENTS):
        got, wanted = ({n: x[row : row + 1] for n, x in values.items()} for values in (found, want))
        bad[name] = {n: errors(got, wanted)[n] for n in failures(got, wanted, FLOAT32)}
    assert not any(bad.values()), bad
    first = np.diff(case.options["segment_ids"], axis=1) != 0
    assert not np.any(np.asarray(found["dlog_g"])[:, 1:][first])  # there is nothing to forget


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_packed_rows_by_a_kernel_that_takes_documents(devices):
    case = packed_case(REGIMES[3], K=32, V=32)
    with kp.interpret():  # which does not carry mesh axes
        found = run_sharded(case, devices, check_vma=False, implementation="pallas_triton")
    assert_close(found, expected(case), FLOAT32)


LAYERS = {
    "padded": {"lengths": [2, 19]},
    "whole": {"batch": 2},
    "packed": {"starts": [[0, 8, 16, 24], [0, 3, 7, 9, 31], [0]]},
    # Documents that end, begin or lie within W - 1 tokens of a shard's edge, one that begins in padding, and no tokens.
    "packed and padded": {
        "starts": [[0, 7, 8, 15, 17], [0, 9], [0, 1, 2, 3, 22, 23, 24, 25], [0, 4], [0, 20]],
        "lengths": [18, 16, 32, 0, 19],
    },
}
"""Calls of the layer of 32 tokens: 2, 4 or 8 shards, the last of which have only one token more than the W - 1 that
they must have."""


@pytest.mark.parametrize(
    ("devices", "name"),
    [
        (4, "padded"),
        (8, "packed and padded"),
        *(pytest.param(4, n, marks=pytest.mark.slow) for n in ("whole", "packed", "packed and padded")),
        *(pytest.param(2, n, marks=pytest.mark.slow) for n in ("packed", "packed and padded")),
        pytest.param(8, "packed", marks=pytest.mark.slow),
    ],
)
def test_lawcat_attention_and_its_gradients(devices, name):
    case = layer_cases.make_case(length=32, heads=4, kv_heads=2, width=16, **LAYERS[name])
    rows, whole = P(None, "seq"), P()
    spec = {name: rows if name in layer_cases.PER_TOKEN else whole for name in case.arrays}

    @functools.partial(
        jax.shard_map, mesh=sequence_mesh(devices), in_specs=(spec, rows), out_specs=(rows, whole, whole)
    )
    def sharded(arrays, ids):
        return context_parallel.lawcat_attention(
            **arrays, lengths=case.lengths, segment_ids=ids, axis_name="seq", implementation="scan"
        )

    def run(arrays, cotangents, ids):
        out, pullback = jax.vjp(lambda arrays: sharded(arrays, ids), arrays)
        do, dS, dz, *drows = cotangents
        return layer_cases.named(*out, *pullback((do, (dS, dz), tuple(drows))))

    got = jax.jit(run, compiler_options=QUICK)(case.arrays, case.cotangents, case.segment_ids)
    bad, relative = layer_cases.problems(case, got, layer_cases.TOLERANCES["float32"])
    assert not bad, f"{', '.join(bad)}; relative errors {relative}"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("devices", [2, 8])
def test_causal_conv1d(devices, packed):
    """Rows, and every gradient; shards of 12 and of the fewest tokens."""
    rng = np.random.default_rng(0)
    x, w, initial = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 24, 5), (4, 5), (4, 3, 5)))
    starts = [[0, 3, 12], [0, 11, 13, 22], [0, 2, 4, 5, 23], [0]]
    ids = layer_cases.segment_ids(starts, 24) + 7 if packed else None
    rows, whole = P(None, "seq"), P()

    @functools.partial(
        jax.shard_map, mesh=sequence_mesh(devices), in_specs=(rows, whole, whole, rows), out_specs=(rows, whole)
    )
    def sharded(x, w, initial, ids):
        return context_parallel.causal_conv1d(x, w, axis_name="seq", initial_state=initial, segment_ids=ids)

    def unsharded(x, w, initial, ids):
        return kp.causal_conv1d(x, w, initial_state=initial, segment_ids=ids)

    def with_gradients(run):
        out, pullback = jax.vjp(lambda *arrays: run(*arrays, ids), x, w, initial)
        return *out, *pullback(jax.tree.map(jnp.cos, out))

    for a, b in zip(*(jax.jit(with_gradients, static_argnums=0)(run) for run in (sharded, unsharded)), strict=True):
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
    whole_ids = jax.shard_map(
        lambda x: context_parallel.causal_conv1d(
            x, jnp.ones((2, 2)), axis_name="seq", segment_ids=jnp.zeros((1, 16), int)
        ),
        mesh=sequence_mesh(8),
        in_specs=P(None, "seq"),
        out_specs=(P(None, "seq"), P()),
    )
    with pytest.raises(ValueError, match=r"segment_ids: expected \[B, T\] = \[1, 2\]"):
        whole_ids(jnp.ones((1, 16, 2)))
