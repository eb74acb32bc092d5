"""LAWCAT attention against the equations, written out token by token in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernels_pallas
from lawcat_jax import models
from lawcat_jax.config import AttentionConfig
from lawcat_jax.errors import UserError
from lawcat_jax.models.layers import Context
from lawcat_jax.models.mixers import mixer_class
from lawcat_jax.models.mixers.gates import gate_bias, half_lives
from lawcat_jax.models.rope import rope_table
from tests.models.helpers import LAWCAT, TINY, build, drawn, forward, jit, tokens

B, T, H, HKV, D, WIDTH = 2, 9, TINY.num_heads, TINY.num_kv_heads, TINY.hidden_size, TINY.head_dim


def inputs(seed=0):
    generator = np.random.default_rng(seed)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(B, T, D), draw(B, T, H, WIDTH), draw(B, T, HKV, WIDTH), draw(B, T, HKV, WIDTH)


def context():
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return Context(*rope_table(positions, TINY), jnp.zeros((B,), jnp.int32))


def mixer_of(attention, seed=0):
    """(mixer with random parameters, those parameters in float64)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: mixer_class(attention)(TINY, attention, rngs=nnx.Rngs(0))))
    params = drawn(nnx.to_pure_dict(state), seed)
    return nnx.merge(graphdef, params), jax.tree.map(lambda leaf: leaf.astype(np.float64), params)


def run(mixer, *arrays):
    graphdef, params = nnx.split(mixer)
    return np.asarray(jit(lambda params, *a: nnx.merge(graphdef, params)(*a, context())[0])(params, *arrays))


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def both_softmax(s):
    return np.concatenate([softmax(s), softmax(-s)], axis=-1)


def convolved(x, taps):
    size = taps.shape[0]
    return sum(taps[j] * (x[t] if (t := len(x) - size + j) >= 0 else 0) for j in range(size))


@pytest.mark.parametrize("normalize", [True, False])
def test_lawcat_equals_the_recurrence_of_the_paper(normalize):
    attention = dataclasses.replace(LAWCAT, normalize=normalize, feature_dim=3)
    mixer, p = mixer_of(attention)
    x, q, k, v = inputs()
    expected = np.zeros((B, T, H, WIDTH))
    logits = x @ p["gate_down"]["kernel"] @ p["gate_up"]["kernel"] + p["gate_up"]["bias"]
    decay = (1 / (1 + np.exp(-logits))).reshape(B, T, HKV, 6) ** (1 / 16)
    for b, h in np.ndindex(B, H):
        kv, S, z = h // (H // HKV), np.zeros((6, WIDTH)), np.zeros(6)
        for t in range(T):
            phi_q = both_softmax(convolved(q[b, : t + 1, h], p["conv_q"][h]) @ p["feature_map"][h])
            phi_k = both_softmax(convolved(k[b, : t + 1, kv], p["conv_k"][h]) @ p["feature_map"][h])
            S = decay[b, t, kv][:, None] * S + np.outer(phi_k, v[b, t, kv])
            z = decay[b, t, kv] * z + phi_k
            expected[b, t, h] = phi_q @ S / (phi_q @ z + 1e-10 if normalize else np.sqrt(6))
    np.testing.assert_allclose(run(mixer, x, q, k, v), expected, atol=1e-5)
    if normalize:  # a convex mean of values: constant values come out unchanged
        np.testing.assert_allclose(run(mixer, x, q, k, np.ones_like(v)), 1.0, atol=1e-5)


def test_the_parts_one_by_one_and_in_one_call_agree():
    """The parts put together by hand, and a window whose share is 0, give what the one call gives."""
    mixer, p = mixer_of(LAWCAT)
    arrays = inputs()
    in_one_call = run(mixer, *arrays)

    def compose(x, q, k, v):
        parts, _ = mixer.recurrence(x, q, k, context(), None)
        return kernels_pallas.gated_linear_attention(parts.q, parts.k, v, parts.log_g)[0]

    np.testing.assert_allclose(jit(compose)(*arrays), in_one_call, atol=1e-6)
    windowed, _ = mixer_of(dataclasses.replace(LAWCAT, window_size=4))
    values = {**p, "window_factor": np.full(H, -100.0)}
    graphdef, _ = nnx.split(windowed)
    windowed = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(np.float32), values))
    np.testing.assert_allclose(run(windowed, *arrays), in_one_call, atol=1e-5)


def test_identity_initialisation():
    params = models.init_params(TINY, LAWCAT, seed=0)["mixers"]
    np.testing.assert_array_equal(params["conv_q"][:, :, -1], 1.0)
    np.testing.assert_allclose(params["conv_k"][:, :, :-1], 0.001)
    np.testing.assert_array_equal(params["gate_up"]["bias"], 0.0)  # a half-life of 16 tokens
    assert abs(float(jnp.std(params["gate_down"]["kernel"])) - 0.006) < 0.002
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: mixer_class(LAWCAT)(TINY, LAWCAT, rngs=nnx.Rngs(0))))
    mixer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], params))
    x, q, k, _ = inputs()
    parts = jit(lambda x, q, k: mixer.recurrence(x, q, k, context(), None)[0])(x, q, k)
    np.testing.assert_allclose(parts.q, both_softmax(q[..., : WIDTH // 2]), atol=2e-3)
    np.testing.assert_allclose(parts.log_g, -np.log(2) / 16, atol=2e-4)


def test_half_lives_spread_geometrically():
    lives = half_lives(TINY, dataclasses.replace(LAWCAT, gate_half_life_max=1024.0))
    assert lives.shape == (HKV, WIDTH)
    np.testing.assert_allclose(lives[0, : WIDTH // 2], lives[0, WIDTH // 2 :])
    ratios = np.diff(np.log(lives[:, : WIDTH // 2].reshape(-1)))
    np.testing.assert_allclose(ratios, ratios[0])
    assert lives.min() == pytest.approx(16)
    assert lives.max() == pytest.approx(1024)
    decay = np.log(1 / (1 + np.exp(-gate_bias(lives, 16.0).astype(np.float64)))) / 16
    np.testing.assert_allclose(np.exp(decay * lives), 0.5, rtol=1e-4)
    one_head = dataclasses.replace(TINY, num_kv_heads=1)
    assert len(np.unique(half_lives(one_head, dataclasses.replace(LAWCAT, gate_half_life_max=64.0)))) == WIDTH // 2
    per_head = half_lives(TINY, dataclasses.replace(LAWCAT, gate_half_life_max=64.0, gate_kind="per_head"))
    np.testing.assert_allclose(per_head, [[16], [64]])


def test_diagnostics_report_every_layer():
    config = dataclasses.replace(LAWCAT, softmax_layers=(0,), window_size=3)
    graphdef, params = build(TINY, config)
    call = jit(lambda params, x, lengths: models.bind(graphdef, params).diagnostics(x, lengths=lengths))
    inputs = tokens()
    report = call(params, inputs, np.array([9, 4], np.int32))
    shapes = {name: value.shape for name, value in report.items()}
    assert shapes == {
        "half_life": (2, HKV, 5),
        "saturated": (2, HKV),
        "clamped": (2, HKV),
        "denominator": (2, H, 2),
        "entropy_q": (2, H),
        "entropy_k": (2, H),
        "window_share": (2, H),
    }
    assert all(np.isfinite(value).all() for value in report.values())
    half_life = np.asarray(report["half_life"])
    assert (np.diff(half_life, axis=-1) >= 0).all()
    assert (np.asarray(report["entropy_q"]) <= np.log(WIDTH) + 1e-5).all()
    other = inputs.copy()
    other[1, 4:] = 0  # padding must not count
    again = call(params, other, np.array([9, 4], np.int32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), report, again)


def test_bfloat16_base_with_float32_mixers():
    graphdef, params = build(TINY, LAWCAT)
    exact = forward(params, tokens(), graphdef=graphdef)
    base = {name: value for name, value in params.items() if name != "mixers"}
    half = {**jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), base), "mixers": params["mixers"]}
    logits = forward(half, tokens(), graphdef=graphdef)
    assert logits.dtype == jnp.float32
    assert float(jnp.mean(jnp.abs(logits - exact))) < 0.05 * float(jnp.mean(jnp.abs(exact)))


def test_invalid_models_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"softmax_layers: layer 7 does not exist"):
        models.abstract(TINY, dataclasses.replace(LAWCAT, softmax_layers=(7,)))
    with pytest.raises(UserError, match="num_kv_heads"):
        models.abstract(dataclasses.replace(TINY, num_kv_heads=3))
    with pytest.raises(UserError, match="window_size"):
        models.abstract(TINY, AttentionConfig(kind="lolcats"))
    with pytest.raises(UserError, match="normalize"):
        models.abstract(TINY, dataclasses.replace(LAWCAT, window_size=4, normalize=False))
