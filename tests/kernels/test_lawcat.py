"""Causal convolution and LAWCAT attention in plain XLA against NumPy in float64."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas as kp
from kernels_pallas.lawcat_attention.xla import feature_map
from kernels_pallas.testing import oracle
from kernels_pallas.testing.cases import make_case

TAPS = 4


def make_inputs(*, batch=2, length=20, heads=4, kv_heads=2, width=8, features=4, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    return {
        "q": draw(batch, length, heads, width),
        "k": draw(batch, length, kv_heads, width),
        "v": draw(batch, length, kv_heads, width),
        "gate_logits": draw(batch, length, kv_heads, 2 * features, scale=8 * scale),
        "conv_q": draw(heads, TAPS, width, scale=0.5),
        "conv_k": draw(heads, TAPS, width, scale=0.5),
        "phi": draw(heads, width, features),
        "initial_state": (
            draw(batch, heads, 2 * features, width),
            jnp.abs(draw(batch, heads, 2 * features)),
        ),
        "conv_state": (draw(batch, TAPS - 1, heads, width), draw(batch, TAPS - 1, kv_heads, width)),
    }


@pytest.mark.parametrize("group", [1, 3])
def test_causal_conv1d(group):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 2, 1, 5)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(TAPS, 2, group, 5)), jnp.float32)
    y, tail = kp.causal_conv1d(x, w)
    want = np.zeros((2, 6, 2, group, 5))
    for t in range(6):
        for j in range(TAPS):
            if t - (TAPS - 1) + j >= 0:
                want[:, t] += np.asarray(w)[j] * np.asarray(x)[:, t - (TAPS - 1) + j]
    assert oracle.error(y, want) < 1e-6
    np.testing.assert_array_equal(tail, x[:, -3:])
    first, middle = kp.causal_conv1d(x[:, :1], w)
    second, end = kp.causal_conv1d(x[:, 1:], w, initial_state=middle)
    assert oracle.error(jnp.concatenate([first, second], axis=1), want) < 1e-6
    np.testing.assert_array_equal(end, tail)


def test_causal_conv1d_errors():
    x = jnp.ones((1, 4, 6))
    with pytest.raises(ValueError, match="w: channels"):
        kp.causal_conv1d(x, jnp.ones((4, 5)))
    with pytest.raises(ValueError, match="initial_state: expected"):
        kp.causal_conv1d(x, jnp.ones((4, 6)), initial_state=jnp.ones((1, 4, 6)))


def test_layer_equals_numpy():
    inputs = make_inputs(length=70)
    o, state, tails = jax.jit(kp.lawcat_attention)(**inputs)
    for got, want in zip((o, *state), oracle.lawcat_attention(**inputs), strict=True):
        assert oracle.error(got, want) < 5e-6
    np.testing.assert_array_equal(tails[0], inputs["q"][:, -3:])
    np.testing.assert_array_equal(tails[1], inputs["k"][:, -3:])


def test_reference_and_scan_have_the_same_gradients():
    inputs = make_inputs(length=40, scale=3.0)

    def loss(implementation, inputs):
        leaves = jax.tree.leaves(kp.lawcat_attention(**inputs, implementation=implementation))
        return sum(jnp.sum(x * jnp.sin(jnp.arange(x.size)).reshape(x.shape)) for x in leaves)

    got, want = (jax.jit(jax.grad(functools.partial(loss, name)))(inputs) for name in ("scan", "reference"))
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (got, want)), strict=True):
        assert oracle.error(a, b) < 2e-5, path


@pytest.mark.slow
def test_any_split_equals_the_whole():
    inputs = make_inputs(length=9)
    start = {name: inputs.pop(name) for name in ("initial_state", "conv_state")}
    sequence = {name: inputs.pop(name) for name in ("q", "k", "v", "gate_logits")}
    run = jax.jit(kp.lawcat_attention)
    whole = run(**sequence, **inputs, **start)
    for cut in (1, 5):
        first, state, tails = run(**{n: x[:, :cut] for n, x in sequence.items()}, **inputs, **start)
        rest = {n: x[:, cut:] for n, x in sequence.items()}
        second, state, tails = run(**rest, **inputs, initial_state=state, conv_state=tails)
        got = (jnp.concatenate([first, second], axis=1), state, tails)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True):
            assert oracle.error(a, b) < 2e-6


@pytest.mark.parametrize("length", [6, 1])
def test_padding_is_neutral(length):
    inputs = make_inputs(length=length)
    run = jax.jit(kp.lawcat_attention)
    lengths = np.asarray([length - 1, length])
    o, state, tails = run(**inputs, lengths=jnp.asarray(lengths))
    for row, count in enumerate(lengths):
        one = {}
        for name, x in inputs.items():
            shared = name in ("conv_q", "conv_k", "phi")
            one[name] = x if shared else jax.tree.map(operator.itemgetter(slice(row, row + 1)), x)
        assert not np.any(np.asarray(o)[row, count:])
        want = (None, one["initial_state"], one["conv_state"])
        if count:
            cut = {n: one[n][:, :count] for n in ("q", "k", "v", "gate_logits")}
            want = run(**(one | cut))
            assert oracle.error(o[row, :count], want[0][0]) < 2e-6
        for a, b in zip(jax.tree.leaves((state, tails)), jax.tree.leaves(want[1:]), strict=True):
            assert oracle.error(a[row], b[0]) < 2e-6


@pytest.mark.slow
def test_padding_may_keep_its_output():
    inputs = make_inputs(length=12, scale=3.0)
    lengths = jnp.asarray([7, 12])
    valid = jnp.arange(12) < lengths[:, None]

    def loss(zero_padding, inputs):
        o, state, _ = kp.lawcat_attention(**inputs, lengths=lengths, zero_padding=zero_padding)
        weight = valid[..., None, None] * jnp.cos(jnp.arange(o.size)).reshape(o.shape)
        return jnp.sum(weight * o) + sum(map(jnp.sum, state)), o

    (kept, o), got = jax.jit(jax.value_and_grad(functools.partial(loss, False), has_aux=True))(inputs)
    (zeroed, masked), want = jax.jit(jax.value_and_grad(functools.partial(loss, True), has_aux=True))(inputs)
    np.testing.assert_allclose(kept, zeroed, rtol=1e-6)
    assert np.all(np.isfinite(o))
    assert np.any(np.asarray(o)[0, 7:])
    np.testing.assert_allclose(jnp.where(valid[..., None, None], o, 0), masked, atol=1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# These programs run for milliseconds: compiling them fast matters more than how fast they are.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("implementation", "zero_padding"),
    [
        ("scan", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("scan", False), ("reference", True), ("pallas_triton", True), ("pallas_tpu", True))
        ),
    ],
)
def test_padding_is_inert_whatever_it_holds(implementation, zero_padding):
    """NaN and infinity at padding: outputs, states and gradients as with zeros there, bit for bit."""
    size = {"heads": 2, "kv_heads": 1, "width": 64, "features": 32} if "pallas" in implementation else {}
    inputs, length = make_inputs(length=12, **size), 12
    lengths = jnp.asarray([7, 0])
    valid = (jnp.arange(length) < lengths[:, None])[..., None, None]
    rows = ("q", "k", "v", "gate_logits")
    filled = {
        name: jnp.where(valid, inputs[name], x)
        for name, x in zip(rows, (jnp.nan, jnp.inf, jnp.nan, -jnp.inf), strict=True)
    }
    zeros = {name: jnp.where(valid, inputs[name], 0) for name in rows}

    @quick_jit
    def run(inputs):
        def loss(inputs):
            options = {"lengths": lengths, "zero_padding": zero_padding, "implementation": implementation}
            o, *states = kp.lawcat_attention(**inputs, **options)
            loss = jnp.sum(jnp.where(valid, jnp.sin(o), 0)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(states))
            return loss, (o, states)

        return jax.value_and_grad(loss, has_aux=True)(inputs)

    with kp.interpret() if "pallas" in implementation else contextlib.nullcontext():
        got, want = run(inputs | filled), run(inputs | zeros)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    gradients = got[1]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
    assert all(np.any(x) for x in jax.tree.leaves(gradients))
    for name in rows:
        assert not np.any(np.where(valid, 0, gradients[name])), name


@pytest.mark.parametrize("implementation", ["scan", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_packed_documents_equal_each_alone(implementation):
    """Outputs, final states and gradients, with a document that only the padding follows and ids that come again."""
    inputs = make_inputs(length=12)
    cuts, lengths = [[0, 4, 5, 12], [0, 2, 9]], jnp.asarray([12, 9])
    ids = jnp.asarray([[7] * 4 + [3] + [7] * 7, [1] * 2 + [2] * 7 + [0] * 3])
    rows, states = ("q", "k", "v", "gate_logits"), ("initial_state", "conv_state")
    weight = jnp.cos(jnp.arange(2 * 12 * 4 * 8.0)).reshape(2, 12, 4, 8)

    def value(o, state, tails, weight):
        return jnp.sum(o * weight) + sum(jnp.sum(jnp.sin(x)) for x in (*state, *tails))

    def packed(inputs):
        options = {"lengths": lengths, "segment_ids": ids, "implementation": implementation}
        o, state, tails = kp.lawcat_attention(**inputs, **options)
        return value(o, state, tails, weight), (o, state, tails)

    def alone(inputs):
        total, outputs = 0.0, []
        for row, edges in enumerate(cuts):
            o, state, tails = [], None, None
            for first, last in itertools.pairwise(edges):
                one = {n: inputs[n][row : row + 1, first:last] for n in rows}
                kept = {n: jax.tree.map(lambda x: x[row : row + 1], inputs[n]) if first == 0 else None for n in states}  # noqa: B023
                part, state, tails = kp.lawcat_attention(**inputs | one | kept, implementation=implementation)
                o.append(part)
            o = jnp.pad(jnp.concatenate(o, axis=1), ((0, 0), (0, 12 - edges[-1]), (0, 0), (0, 0)))
            total += value(o, state, tails, weight[row : row + 1])
            outputs.append((o, state, tails))
        return total, jax.tree.map(lambda *x: jnp.concatenate(x), *outputs)

    got, want = (quick_jit(jax.grad(f, has_aux=True))(inputs) for f in (packed, alone))
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=str(path))


def test_convolution_rows_restart():
    x, w = make_inputs(length=6)["q"], jnp.ones((TAPS, 4, 8))
    y, tail = kp.causal_conv1d(x, w, segment_ids=jnp.asarray([[0, 0, 0, 0, 1, 1], [0] * 6]))
    np.testing.assert_allclose(y[0, 4:], jnp.cumsum(x[0, 4:], axis=0), atol=1e-6)
    np.testing.assert_array_equal(tail[0], x[0, 3:].at[0].set(0))
    np.testing.assert_array_equal(tail[1], x[1, 3:])


def test_lengths_of_a_traced_call_are_clamped():
    inputs = make_inputs(length=6)
    run = quick_jit(lambda lengths: kp.lawcat_attention(**inputs, lengths=lengths))
    got, want = run(jnp.asarray([-3, 99])), run(jnp.asarray([0, 6]))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("implementation", ["scan", pytest.param("reference", marks=pytest.mark.slow)])
def test_a_gate_of_minus_infinity_forgets_everything(implementation):
    """Without a bound, -inf starts anew: the rest of the sequence does not know what came before."""
    cut, options = 5, {"gate_lower_bound": None, "implementation": implementation}
    inputs = make_inputs(length=12)
    inputs["gate_logits"] = inputs["gate_logits"].at[:, cut].set(-jnp.inf)
    run = quick_jit(functools.partial(kp.lawcat_attention, **options))
    o, state, _ = run(**inputs)
    rest = {name: inputs[name][:, cut:] for name in ("q", "k", "v", "gate_logits")}
    before = {"conv_state": (inputs["q"][:, cut - 3 : cut], inputs["k"][:, cut - 3 : cut]), "initial_state": None}
    want, want_state, _ = run(**inputs | rest | before)
    for a, b in zip((o[:, cut:], *state), (want, *want_state), strict=True):
        assert oracle.error(a, b) < 2e-6
    one = {name: inputs[name][:, cut : cut + 1] for name in ("q", "k", "v", "gate_logits")}
    first, _, _ = run(**inputs | one | {"conv_state": before["conv_state"]})  # the decoding step
    assert oracle.error(first[:, 0], want[:, 0]) < 2e-6

    def loss(inputs):
        o, state, _ = kp.lawcat_attention(**inputs, **options)
        return jnp.sum(jnp.sin(o)) + sum(map(jnp.sum, state))

    gradients = quick_jit(jax.grad(loss))(inputs)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))
    assert not np.any(gradients["gate_logits"][:, cut])


def plain_features(u, phi):
    """The feature map as the paper writes it, left to automatic differentiation."""
    s = jnp.einsum("bthd,hdf->bthf", u, phi, precision=jax.lax.Precision.HIGHEST)
    both = jnp.concatenate([jax.nn.softmax(s, axis=-1), jax.nn.softmax(-s, axis=-1)], axis=-1)
    return jnp.maximum(both, 1e-12)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_gradient_of_the_feature_map(scale):
    rng = np.random.default_rng(0)
    u, phi, d = (rng.normal(size=size) for size in ((2, 9, 3, 8), (3, 8, 4), (2, 9, 3, 8)))
    # Gradients of a normalised layer are large and nearly equal along the features; only their differences count.
    u, phi, d = (jnp.asarray(x, jnp.bfloat16) for x in (scale * u, phi, 5 + d))

    def run(function, dtype):
        features, pullback = jax.vjp(function, u.astype(dtype), phi.astype(jnp.float32))
        return features, *pullback(d.astype(dtype))

    want = jax.jit(run, static_argnums=(0, 1))(plain_features, jnp.float32)
    assert scale < 20 or np.any(np.asarray(want[0]) == np.float32(1e-12))
    for dtype, tolerance in ((jnp.float32, 5e-6), (jnp.bfloat16, 5e-3)):
        got = jax.jit(run, static_argnums=(0, 1))(feature_map, dtype)
        assert [x.dtype for x in got] == [dtype, dtype, jnp.float32]
        for a, b in zip(got, want, strict=True):
            assert oracle.error(a, b) < tolerance


def test_features_at_the_floor_pass_no_gradient():
    # softmax of (0, -40): the second entry is at the floor, whatever its cotangent.
    u, phi = jnp.ones((1, 1, 1, 1)), jnp.asarray([[[0.0, -40.0]]])
    features, pullback = jax.vjp(feature_map, u, phi)
    np.testing.assert_allclose(np.ravel(features), [1, 1e-12, 1e-12, 1], rtol=1e-6)
    du, dphi = pullback(jnp.asarray([0.0, 1e10, 1e10, 0.0]).reshape(features.shape))
    assert not np.any(du)
    assert not np.any(dphi)


def test_identity_initialisation():
    """Taps of one on the current token and phi = eye(d, f): features are softmaxes of the first f channels."""
    from kernels_pallas.lawcat_attention.xla import prepare

    inputs = make_inputs()
    taps = jnp.zeros((4, TAPS, 8)).at[:, -1].set(1.0)
    phi = jnp.broadcast_to(jnp.eye(8, 4), (4, 8, 4))
    q, _, _ = prepare(inputs["q"], inputs["k"], inputs["gate_logits"], taps, taps, phi, None, None, 16.0)
    x = inputs["q"][..., :4]
    want = jnp.concatenate([jax.nn.softmax(x), jax.nn.softmax(-x)], axis=-1)
    assert oracle.error(q, want) < 1e-6


@pytest.mark.slow
def test_the_bound_is_the_papers_gate_above_minus_twenty():
    inputs = make_inputs(length=33)
    inputs["gate_logits"] = jnp.clip(inputs["gate_logits"], -19.99, None)

    def loss(bound, logits):
        o, _, _ = kp.lawcat_attention(**inputs | {"gate_logits": logits}, gate_lower_bound=bound)
        return jnp.sum(jnp.sin(o)), o

    run = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (_, bounded), grad_bounded = run(-1.25, inputs["gate_logits"])
    (_, free), grad_free = run(None, inputs["gate_logits"])
    assert oracle.error(bounded, free) < 2e-6
    assert oracle.error(grad_bounded, grad_free) < 2e-5
    _, grad = run(-1.25, inputs["gate_logits"] - 40)
    assert not np.any(np.asarray(grad)[inputs["gate_logits"] - 40 < -20.01])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("phi", jnp.ones((4, 8, 3)), "gate_logits: expected"),
        ("conv_k", jnp.ones((2, 4, 8)), "conv_k: expected"),
        ("conv_state", jnp.ones(3), "conv_state: expected a pair"),
        ("lengths", jnp.ones((2,)), "lengths: expected int32"),
        ("k", jnp.ones((2, 20, 3, 8)), "k: its 3 heads must divide"),
        ("implementation", "fused", "implementation: unknown 'fused'"),
        ("lengths", jnp.asarray([-1, 3]), r"lengths: expected 0 to 20 valid tokens.*\[-1, 3\]"),
        ("lengths", np.asarray([21, 3]), r"lengths: expected 0 to 20 valid tokens.*\[21, 3\]"),
        ("segment_ids", jnp.ones((2, 3), int), r"segment_ids: expected \[B, T\]"),
        ("segment_ids", jnp.ones((2, 20)), "segment_ids: expected int32"),
        ("lengths", jnp.asarray([3]), r"lengths: expected \[B\]"),
        *(
            ("gate_normalizer", x, "gate_normalizer: expected a finite number above 0")
            for x in (0, -1.0, np.nan, np.inf)
        ),
        *(("gate_normalizer", x, "gate_normalizer: expected a static float") for x in (jnp.ones(()), None, True, "16")),
        *(("normalize", x, "normalize: expected True or False") for x in (1, "yes", None, jnp.ones(()))),
        ("zero_padding", 0, "zero_padding: expected True or False"),
        ("v", jnp.ones((2, 20, 2, 0)), "v: every dimension must be at least 1"),
        ("q", jnp.ones((0, 20, 4, 8)), "q: every dimension must be at least 1"),
    ],
)
def test_errors(name, value, message):
    with pytest.raises(ValueError, match=message):
        kp.lawcat_attention(**make_inputs() | {name: value})


def test_a_traced_gate_normalizer_is_refused():
    with pytest.raises(ValueError, match="gate_normalizer: expected a static float"):
        jax.eval_shape(lambda x: kp.lawcat_attention(**make_inputs(), gate_normalizer=x), 16.0)


def test_a_named_backend_that_takes_documents_in_no_way_refuses_them(monkeypatch):
    from kernels_pallas.gated_linear_attention import triton

    monkeypatch.setattr(triton, "TAKES_SEGMENTS", False)
    case = make_case(heads=1)
    with kp.interpret(), pytest.raises(ValueError, match=r"pallas_triton.*segment_ids become gates without a bound"):
        kp.gated_linear_attention(*case.arrays, segment_ids=jnp.zeros((1, 65), int), implementation="pallas_triton")
