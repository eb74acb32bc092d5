"""Softmax windows under one denominator with linear attention, and the initial values, as the authors' layers have them.

The layers are held against their quadratic form, written here in NumPy float64 from the equations of the papers.
"""

import dataclasses
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig
from lawcat_jax.models.layers import Context
from lawcat_jax.models.mixers import mixer_class
from lawcat_jax.models.mixers.inits import INITS
from lawcat_jax.models.rope import rope_table
from tests.models.helpers import TINY, drawn, jit

H, HKV, D, WIDTH = TINY.num_heads, TINY.num_kv_heads, TINY.hidden_size, TINY.head_dim
LOLCATS = AttentionConfig(kind="lolcats", window_size=3)
LAWCAT = AttentionConfig(gate_rank=4, window_size=3)


# The layers in float64, one head at a time: x [T, D]; q, k, v [T, d]; p the parameters; query head h, kv head g.


def rope(x):
    """Rotary embedding of x [T, d], halves rotated against each other."""
    angles = np.arange(len(x))[:, None] * TINY.rope_theta ** (-np.arange(0, WIDTH, 2) / WIDTH)
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate(
        [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], axis=-1
    )


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def convolve(x, taps):
    padded = np.concatenate([np.zeros((len(taps) - 1, WIDTH)), x])
    return sum(tap * padded[j : j + len(x)] for j, tap in enumerate(taps))


def in_window(attention, length):
    """[t, s]: whether token s is in the softmax part of token t."""
    w, t, s = attention.window_size, np.arange(length)[:, None], np.arange(length)[None]
    seen = s > t - w if attention.window_kind == "sliding" else s // w >= t // w - 1
    return (seen | (s < attention.sinks)) & (s <= t)


def features(attention, p, name, h, u):
    scores = u @ p[name][h]
    if attention.feature_map == "relu":
        return np.maximum(scores + p[f"{name}_bias"][h], 1e-12)
    return np.concatenate([softmax(scores), softmax(-scores)], axis=-1)


def head(attention, p, x, q, k, v, h, g):
    length, window = len(q), in_window(attention, len(q))
    name_q, name_k = ("feature_map",) * 2 if "feature_map" in p else ("feature_map_q", "feature_map_k")
    share = 1 / (1 + np.exp(-p["window_factor"][h]))
    rest = 1 - share if attention.affine_window else 1
    if attention.kind == "lolcats":
        phi_q, phi_k = (features(attention, p, n, h, rope(u)) for n, u in ((name_q, q), (name_k, k)))
        linear = np.where(window, 0, phi_q @ phi_k.T)
    else:
        phi_q = features(attention, p, name_q, h, convolve(q, p["conv_q"][h]))
        phi_k = features(attention, p, name_k, h, convolve(k, p["conv_k"][h]))
        channels = phi_q.shape[1]
        logits = x @ p["gate_down"]["kernel"] @ p["gate_up"]["kernel"] + p["gate_up"]["bias"]
        gates = (-np.logaddexp(0, -logits) / 16).reshape(length, HKV, channels)[:, g]
        decayed = np.cumsum(gates, axis=0)
        decay = np.exp(np.minimum(decayed[:, None] - decayed[None], 0))
        linear = np.einsum("tc,sc,tsc->ts", phi_q, phi_k, decay) / np.sqrt(channels)
    scores = np.where(window, rope(q) @ rope(k).T / np.sqrt(WIDTH), -np.inf)
    weights = share * np.exp(scores - scores.max(-1, keepdims=True)) + rest * np.tril(linear)
    return weights @ v / weights.sum(-1, keepdims=True)


def compare(attention, length, batch=2):
    generator = np.random.default_rng(0)
    shapes = ((length, D), (length, H, WIDTH), (length, HKV, WIDTH), (length, HKV, WIDTH))
    arrays = [generator.standard_normal((batch, *shape)).astype(np.float32) for shape in shapes]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: mixer_class(attention)(TINY, attention, rngs=nnx.Rngs(0))))
    params = drawn(nnx.to_pure_dict(state))
    context = Context(*rope_table(jnp.broadcast_to(jnp.arange(length), (batch, length)), TINY), jnp.zeros(batch, int))
    got = jit(lambda params, *arrays: nnx.merge(graphdef, params)(*arrays, context)[0])(params, *arrays)
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    x, q, k, v = (array.astype(np.float64) for array in arrays)
    for b, h in np.ndindex(batch, H):
        g = h // (H // HKV)
        want = head(attention, p, x[b], q[b, :, h], k[b, :, g], v[b, :, g], h, g)
        np.testing.assert_allclose(got[b, :, h], want, atol=1e-5)


@pytest.mark.parametrize(
    "attention",
    [
        LAWCAT,
        dataclasses.replace(LOLCATS, affine_window=True, sinks=2, feature_map="relu"),
        dataclasses.replace(LOLCATS, window_kind="terraced"),
        dataclasses.replace(LAWCAT, window_kind="terraced", sinks=1, tie_qk=False),
        pytest.param(LOLCATS, marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(LAWCAT, affine_window=True, sinks=2), marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(LOLCATS, window_kind="terraced", sinks=4), marks=pytest.mark.slow),
    ],
    ids=lambda a: f"{a.kind}-{a.window_kind}-{a.feature_map}-{'affine-' * a.affine_window}{a.sinks}",
)
def test_a_layer_with_a_window_equals_its_quadratic_form(attention):
    compare(attention, 11)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 16, 64])
@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@pytest.mark.parametrize("attention", [LOLCATS, LAWCAT], ids=["lolcats", "lawcat"])
def test_long_sequences_equal_the_quadratic_form(attention, kind, window):
    compare(dataclasses.replace(attention, window_kind=kind, window_size=window), 200, batch=1)


def test_untied_maps_start_as_copies():
    """Also where they are drawn; what is drawn after them does not depend on it."""

    @jit
    def both():
        made = []
        for init in ("kaiming_feature_map", "identity"):
            attention = AttentionConfig(gate_rank=4, tie_qk=False, init=init)
            mixer = mixer_class(attention)(TINY, attention, rngs=nnx.Rngs(0), stack=(3,))
            made.append(nnx.to_pure_dict(nnx.state(mixer)))
        return made

    params, identity = both()
    np.testing.assert_array_equal(params["feature_map_q"], params["feature_map_k"])
    phi = np.asarray(params["feature_map_q"])
    assert not np.array_equal(phi[0], phi[1])  # layers are independent draws
    np.testing.assert_array_equal(identity["gate_up"]["kernel"], params["gate_up"]["kernel"])


@pytest.mark.parametrize(
    ("init", "taps_bound", "gate_bound"),
    [("xavier", 2**-2.5 * (6 / (4 + 8)) ** 0.5, 2**-2.5 * (6 / (8 + 4)) ** 0.5), ("normal", 0.006 * 4.5, 0.006 * 4.5)],
)
def test_other_schemes_leave_the_feature_map(init, taps_bound, gate_bound):
    taps, feature_map, gate = INITS[init]
    eye = np.broadcast_to(np.eye(8, 4), (2, 3, 8, 4))
    np.testing.assert_array_equal(feature_map(jax.random.key(0), (2, 3, 8, 4), jnp.float32), eye)
    for draw, shape, bound in ((taps, (2, 3, 4, 8), taps_bound), (gate, (2, 8, 4), gate_bound)):
        values = np.abs(np.asarray(draw(jax.random.key(0), shape, jnp.float32)))
        assert 0.4 * bound < values.max() <= bound


def test_the_kaiming_bound_is_that_of_torch():
    """torch.nn.init.kaiming_uniform_ on an array [H, d, f], as LoLCATs and the authors call it."""
    import torch

    reference = torch.empty(64, 64, 32)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(reference)
    draw = INITS["kaiming_feature_map"].feature_map
    values = np.asarray(draw(jax.random.key(0), (64, 64, 32), jnp.float32))
    assert np.abs(values).max() == pytest.approx(float(reference.abs().max()), rel=1e-3)
    assert values.std() == pytest.approx(float(reference.std()), rel=1e-2)
    taps = INITS["kaiming_feature_map"].taps(jax.random.key(0), (4, 2), jnp.float32)
    np.testing.assert_array_equal(taps, np.float32([[0.001] * 2] * 3 + [[1.0] * 2]))


@pytest.mark.parametrize("variant", ["base", "sliding", "fqkvo"])
def test_the_recipe_of_lolcats_is_a_valid_config(variant):
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "lolcats_llama1b.py"))["get_config"](variant)
    recipe.validate()
    assert recipe.stage1.data is not recipe.stage2.data
    assert recipe.attention.window_kind == ("sliding" if variant == "sliding" else "terraced")
    _, shapes = models.abstract(recipe.teacher.architecture, recipe.attention, recipe.lora)
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    for stage in (recipe.stage1, recipe.stage2):
        assert all(any(re.search(pattern, path) for path in paths) for pattern in stage.trainable)


@pytest.mark.parametrize(
    "attention", [LOLCATS, LAWCAT, AttentionConfig(kind="window", window_size=3)], ids=lambda a: a.kind
)
def test_the_backward_pass_keeps_no_scores(attention):
    """Of the tokens no more than came in: not the scores [B, T, H, 64 + 3], nor features [B, T, H, K] in float32."""
    length = 192
    graphdef, state = nnx.split(nnx.eval_shape(lambda: mixer_class(attention)(TINY, attention, rngs=nnx.Rngs(0))))
    shapes = ((length, D), (length, H, WIDTH), (length, HKV, WIDTH), (length, HKV, WIDTH))
    arrays = [jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16) for shape in shapes]
    cos = jnp.zeros((1, length, WIDTH // 2))

    def kept(params, *arrays):
        attend = lambda *arrays: nnx.merge(graphdef, params)(*arrays, Context(cos, cos, jnp.zeros(1, int)))[0]  # noqa: E731
        return jax.vjp(attend, *arrays)[1]

    residuals = jax.tree.leaves(jax.eval_shape(kept, nnx.to_pure_dict(state), *arrays))
    tokens = sum(leaf.size * leaf.dtype.itemsize for leaf in residuals if length in leaf.shape)
    given = sum(array.size * array.dtype.itemsize for array in arrays)
    assert tokens <= given + 2 * cos.size * cos.dtype.itemsize
