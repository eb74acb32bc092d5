"""TPU kernels of LAWCAT attention (prefill and decoding) in the Pallas interpreter, against float64 and plain XLA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kernels_pallas as kp
from kernels_pallas.gated_linear_attention import tpu as gla_tpu
from kernels_pallas.gated_linear_attention import tpu_decode
from kernels_pallas.lawcat_attention import tpu
from kernels_pallas.lawcat_attention.api import kernel_for
from kernels_pallas.testing import layer_cases, oracle
from kernels_pallas.testing.cases import BFLOAT16, FLOAT32, make_case

from .base import QUICK
from .test_lawcat import TAPS

PER_TOKEN = ("q", "k", "v", "gate_logits")


@pytest.fixture(autouse=True)
def _interpreter():
    with kp.interpret():
        yield


def make_inputs(*, batch=1, length=40, heads=4, kv_heads=2, width=64, dtype=jnp.float32, state=True, sharp=0.1, seed=0):
    """Arguments of ``lawcat_attention``; ``sharp`` scales the feature map, so the scores."""
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0, kind=dtype):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32).astype(kind)

    f32, features = jnp.float32, width
    out = {
        "q": draw(batch, length, heads, width),
        "k": draw(batch, length, kv_heads, width),
        "v": draw(batch, length, kv_heads, width) + 1,
        "gate_logits": draw(batch, length, kv_heads, features, scale=8, kind=f32),
        "conv_q": draw(heads, TAPS, width, scale=0.5, kind=f32),
        "conv_k": draw(heads, TAPS, width, scale=0.5, kind=f32),
        "phi": draw(heads, width, features // 2, scale=sharp, kind=f32),
    }
    if state:
        weight = jnp.abs(draw(batch, heads, features, kind=f32))
        S = weight[..., None] * (1 + draw(batch, heads, features, width, scale=0.3, kind=f32))
        out["initial_state"] = (S, weight)
        out["conv_state"] = (draw(batch, TAPS - 1, heads, width), draw(batch, TAPS - 1, kv_heads, width))
    return out


def in_float64(inputs, bound=-1.25):
    """{o, S, z} of the layer in NumPy."""
    batch, _, heads, width = inputs["q"].shape
    features = inputs["gate_logits"].shape[-1]
    start = {
        "initial_state": (np.zeros((batch, heads, features, width)), np.zeros((batch, heads, features))),
        "conv_state": tuple(np.zeros((batch, TAPS - 1, inputs[x].shape[2], width)) for x in "qk"),
    }
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    return dict(zip(("o", "S", "z"), oracle.lawcat_attention(**start | widened, bound=bound), strict=True))


def call(inputs, implementation="pallas_tpu", **options):
    return kp.lawcat_attention(**inputs, implementation=implementation, **options)


run = jax.jit(call, static_argnames=("implementation", "normalize", "gate_lower_bound"))


def check(inputs, tolerances, run=run, **options):
    o, (S, z), tails = run(inputs, **options)
    want = in_float64(inputs, options.get("gate_lower_bound", -1.25))
    found = {n: oracle.error(x.astype(jnp.float32), want[n]) for n, x in {"o": o, "S": S, "z": z}.items()}
    assert all(error < tolerances[name] for name, error in found.items()), found
    rows = [inputs["q"], inputs["k"]]
    if "conv_state" in inputs:
        rows = [jnp.concatenate(x, axis=1) for x in zip(inputs["conv_state"], rows, strict=True)]
    for got, x in zip(tails, rows, strict=True):
        if x.shape[1] >= TAPS - 1:
            np.testing.assert_array_equal(got, x[:, -(TAPS - 1) :])


# Prefill


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        # Two heads a tile that share a kv head; the last of two chunks is ragged.
        ({"length": 270, "heads": 2, "kv_heads": 1}, jnp.bfloat16),
        # One head a tile, no state, one chunk shorter than the padding.
        ({"length": 37, "width": 128, "heads": 2, "kv_heads": 1, "state": False}, jnp.bfloat16),
        # Groups of three: a tile of two heads sees two kv heads.
        pytest.param({"length": 20, "heads": 6, "kv_heads": 2}, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_prefill(sizes, dtype):
    check(make_inputs(dtype=dtype, **sizes), BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32)


def test_padding_is_masked():
    """Outputs, state and rows by the kernel, with NaN and infinity at padding; the gradient is that of its parts."""
    case = layer_cases.make_case(length=20, heads=2, kv_heads=1, lengths=[17, 0])
    assert kernel_for(*(case.arrays[n] for n in (*PER_TOKEN, "conv_q", "conv_k", "phi")), lengths=True) is None
    named = {"lengths": True, "implementation": "pallas_tpu"}
    assert kernel_for(*(case.arrays[n] for n in (*PER_TOKEN, "conv_q", "conv_k", "phi")), **named) == "pallas_tpu"
    o, state, rows = jax.jit(call, compiler_options=QUICK)(case.arrays, lengths=case.lengths)
    got = dict(zip(("o", "S", "z", "rows_q", "rows_k"), (o, *state, *rows), strict=True))
    want = layer_cases.expected(case)
    assert not np.any(np.asarray(o)[0, 17:])
    assert not np.any(np.asarray(o)[1])
    assert all(oracle.error(x, want[name]) < 1e-5 for name, x in got.items())


@pytest.mark.slow
def test_uninitialised_memory_and_rows_beyond_the_end_do_not_matter(monkeypatch):
    monkeypatch.setattr(gla_tpu, "INTERPRET", pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True))
    for length in (140, 1):
        # A function of its own: what jit remembers does not depend on the interpreter.
        fresh = jax.jit(lambda inputs: call(inputs))
        check(make_inputs(length=length, heads=2, kv_heads=1), FLOAT32, run=fresh)


@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_scores_that_need_their_maximum_subtracted(width):
    inputs = make_inputs(length=20, heads=2, kv_heads=1, width=width, sharp=300 / width**0.5)
    # Scores of several hundred in float32 carry errors of 1e-5 themselves.
    check(inputs, dict.fromkeys(FLOAT32, 1e-3))


@pytest.mark.slow
def test_other_options_equal_the_composition():
    inputs = make_inputs(length=30, heads=2, kv_heads=1)
    options = {"normalize": False, "gate_lower_bound": None}
    got, want = run(inputs, **options), run(inputs, implementation="scan", **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert oracle.error(a, b) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (16, 1)])
@pytest.mark.parametrize("length", [2, 127, 129, 257])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_sizes(width, heads, kv_heads, length, dtype):
    inputs = make_inputs(length=length, width=width, heads=heads, kv_heads=kv_heads, dtype=dtype, state=length > 2)
    check(inputs, BFLOAT16 if dtype == "bfloat16" else FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [-0.5, -5.0, None])
def test_other_bounds(bound):
    check(make_inputs(length=300, heads=2, kv_heads=1, dtype=jnp.bfloat16), BFLOAT16, gate_lower_bound=bound)


# Decoding


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        # More sequences than a block holds, the last block ragged.
        ({"batch": 9, "heads": 2, "kv_heads": 1}, jnp.bfloat16),
        ({"width": 128, "heads": 2, "kv_heads": 1}, jnp.float32),
        ({"heads": 2, "kv_heads": 2, "state": False}, jnp.float32),
    ],
)
def test_decode(sizes, dtype):
    check(make_inputs(length=1, dtype=dtype, **sizes), BFLOAT16 if dtype == jnp.bfloat16 else FLOAT32)


def _split(inputs, cuts):
    """Runs the pieces between the cuts one after the other: (o, state, conv_state)."""
    state = {name: inputs[name] for name in ("initial_state", "conv_state")}
    outputs = []
    for start, stop in zip((0, *cuts), (*cuts, inputs["q"].shape[1]), strict=True):
        piece = {name: inputs[name][:, start:stop] for name in PER_TOKEN}
        o, *after = run(inputs | piece | state)
        state = dict(zip(("initial_state", "conv_state"), after, strict=True))
        outputs.append(o)
    return jnp.concatenate(outputs, axis=1), state["initial_state"], state["conv_state"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cuts", "dtype"),
    [
        ((1, 2, 9), jnp.float32),
        *(pytest.param((n,), jnp.bfloat16, marks=pytest.mark.slow) for n in (1, 8)),
    ],
    ids=str,
)
def test_any_split_equals_the_whole(cuts, dtype):
    inputs = make_inputs(length=10, heads=2, kv_heads=1, dtype=dtype)
    for got, want in zip(jax.tree.leaves(_split(inputs, cuts)), jax.tree.leaves(run(inputs)), strict=True):
        assert oracle.error(got.astype(jnp.float32), want.astype(jnp.float32)) < (
            1e-5 if dtype == jnp.float32 else 5e-3
        )


@pytest.mark.slow
def test_decoding_far_past_a_prefill():
    inputs = make_inputs(length=150, heads=2, kv_heads=1, dtype=jnp.bfloat16)
    o, (S, z), _ = _split(inputs, tuple(range(140, 150)))
    want = in_float64(inputs)
    for name, got in {"o": o, "S": S, "z": z}.items():
        assert oracle.error(got.astype(jnp.float32), want[name]) < BFLOAT16[name], name


@pytest.mark.parametrize(
    ("heads", "value_heads", "normalize"), [(4, 2, True), pytest.param(3, 3, False, marks=pytest.mark.slow)]
)
def test_decode_step_of_gated_linear_attention(heads, value_heads, normalize):
    case = make_case(length=1, batch=2, heads=heads, value_heads=value_heads, gate_heads=1, K=40, V=24)
    arrays = [x[:, 0] for x in case.arrays]

    def step(implementation):
        return jax.jit(functools.partial(kp.decode_step, normalize=normalize, implementation=implementation))

    got, want = (step(name)(*arrays, case.state) for name in ("pallas_tpu", "scan"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert oracle.error(a, b) < 1e-6


# Transformations, and what is refused


@pytest.mark.slow
def test_gradient_is_that_of_the_composition():
    inputs = make_inputs(length=12, heads=2, kv_heads=1)

    def loss(implementation, inputs):
        leaves = jax.tree.leaves(run(inputs, implementation=implementation))
        return sum(jnp.sum(x * jnp.sin(jnp.arange(x.size)).reshape(x.shape)) for x in leaves)

    got, want = (jax.jit(jax.grad(functools.partial(loss, name)))(inputs) for name in ("pallas_tpu", "scan"))
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (got, want)), strict=True):
        assert oracle.error(a, b) < 3e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 20])
def test_vmap(length):
    cases = [make_inputs(length=length, heads=2, kv_heads=1, seed=seed) for seed in (1, 2)]
    got = jax.vmap(run)(jax.tree.map(lambda *x: jnp.stack(x), *cases))
    for i, inputs in enumerate(cases):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(inputs)), strict=True):
            assert oracle.error(a[i], b) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 20])
def test_shard_map_over_batch_and_heads(length):
    inputs = make_inputs(batch=2, length=length)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows, state = P("data", None, "model"), P("data", "model")
    specs = dict.fromkeys(PER_TOKEN, rows) | dict.fromkeys(("conv_q", "conv_k", "phi"), P("model"))
    specs |= {"initial_state": (state, state), "conv_state": (rows, rows)}
    # jax's interpreter mixes varying and unvarying indices; test_tpu_aot compiles the real kernels with the check on.
    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs,), check_vma=False)
    got = jax.jit(shard(run, out_specs=(rows, (state, state), (rows, rows))))(inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(inputs)), strict=True):
        assert oracle.error(a, b) < 1e-6


@pytest.mark.parametrize(
    ("sizes", "changes", "reason"),
    [
        ({}, {}, None),
        ({"width": 128}, {}, None),
        ({"length": 1, "batch": 64, "heads": 32, "kv_heads": 8, "width": 128}, {}, None),
        ({"heads": 3, "kv_heads": 3}, {}, "fill tiles"),
        ({"width": 256}, {}, "2 f must be a power of two"),
        ({}, {"phi": (4, 64, 16), "gate_logits": (1, 40, 2, 32)}, "2 f must be a power of two"),
        ({}, {"conv_q": (4, 10, 64), "conv_k": (4, 10, 64)}, "9 taps"),
        ({"length": 1, "batch": 8, "heads": 32, "kv_heads": 1, "width": 128}, {}, "VMEM"),
        ({"length": 1, "width": 36}, {}, "multiples of 8"),
    ],
)
def test_support_is_answered_without_a_device(sizes, changes, reason):
    inputs = jax.eval_shape(functools.partial(make_inputs, **sizes, state=False))
    inputs |= {name: jax.ShapeDtypeStruct(shape, inputs[name].dtype) for name, shape in changes.items()}
    answer = tpu.supports(**inputs, normalize=True, gate_lower_bound=-1.25)
    assert answer is None if reason is None else reason in answer


def test_blocks_of_a_decoding_step():
    def step(batch, heads, kv_heads, width):
        found = tpu_decode.make_step(batch, heads, width, width, (1, heads // kv_heads), (width,))
        return found.batch_block, found.heads_block

    assert step(1, 32, 8, 64) == (1, 8)
    assert step(64, 32, 8, 128) == (8, 8)
    # Keys of two heads of 32 are half a tile.
    assert step(3, 32, 8, 32) == (3, 16)
    assert step(1, 6, 2, 64) == (1, 6)
