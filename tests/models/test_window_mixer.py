"""Softmax over a window and the first tokens alone: held against a loop over tokens, written here in NumPy float64, and
against softmax attention over everything where that is the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, Config, ConfigError, RopeScaling, StageConfig
from lawcat_jax.errors import UserError
from lawcat_jax.models.layers import Context
from lawcat_jax.models.mixers import mixer_class
from lawcat_jax.models.rope import rope_table
from tests.models.helpers import TINY, build, decode, forward, jit, prefill, tokens

H, HKV, WIDTH = TINY.num_heads, TINY.num_kv_heads, TINY.head_dim
SLIDING = AttentionConfig(kind="window", window_size=5, sinks=2)
KINDS = {
    "sliding": SLIDING,
    "no sinks": dataclasses.replace(SLIDING, sinks=0),
    "terraced": dataclasses.replace(SLIDING, window_size=3, window_kind="terraced"),
    "one token": AttentionConfig(kind="window", window_size=1, sinks=1),
}
B, T = 2, 23


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def attention(request):
    return request.param


def turned(x, position):
    """x [d] rotated to a position, halves against each other."""
    angles = position * TINY.rope_theta ** (-np.arange(0, WIDTH, 2) / WIDTH)
    low, high = np.split(x, 2)
    return np.concatenate([low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)])


def by_hand(attention, q, k, v):
    """One head as StreamingLLM computes it: the keys that are still in the cache get the positions 0, 1, ... of the cache,
    and the query that of the last."""
    w, out = attention.window_size, []
    for t in range(len(q)):
        first = t - w + 1 if attention.window_kind == "sliding" else (t // w - 1) * w
        cache = [s for s in range(t + 1) if s < attention.sinks or s >= first]
        scores = [turned(q[t], len(cache) - 1) @ turned(k[s], place) / np.sqrt(WIDTH) for place, s in enumerate(cache)]
        weights = np.exp(np.array(scores) - max(scores))
        out.append(weights @ v[cache] / weights.sum())
    return np.array(out)


def arrays(length=T):
    generator = np.random.default_rng(0)
    shapes = [(B, length, TINY.hidden_size), *((B, length, heads, WIDTH) for heads in (H, HKV, HKV))]
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def context(length, start=0, lengths=None):
    start = jnp.full((B,), start, jnp.int32) if np.ndim(start) == 0 else jnp.asarray(start, jnp.int32)
    return Context(*rope_table(start[:, None] + jnp.arange(length), TINY), start, lengths)


def runner(attention):
    graphdef, state = nnx.split(mixer_class(attention)(TINY, attention, rngs=nnx.Rngs(0)))
    assert not jax.tree.leaves(state)
    return jit(lambda state, context, *arrays: nnx.merge(graphdef, {})(*arrays, context, state))


def wanted(attention, q, k, v):
    heads = [by_hand(attention, q[:, h], k[:, h // (H // HKV)], v[:, h // (H // HKV)]) for h in range(H)]
    return np.stack(heads, axis=1)


def test_it_equals_a_loop_over_tokens(attention):
    """In one call, in pieces, token by token; the state keeps its size."""
    run, (x, q, k, v) = runner(attention), arrays()
    want = np.stack([wanted(attention, *(a[b].astype(np.float64) for a in (q, k, v))) for b in range(B)])
    whole, _ = run(None, context(T), x, q, k, v)
    np.testing.assert_allclose(whole, want, atol=1e-5)
    empty = mixer_class(attention).empty_state(TINY, attention, B, jnp.float32)
    for sizes in ([9, 9, 5], [1] * T):
        state, parts, start = empty, [], 0
        for size in sizes:
            o, state = run(state, context(size, start), *(a[:, start : start + size] for a in (x, q, k, v)))
            parts.append(o)
            start += size
            assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), want, atol=1e-5)


def test_ragged_rows_go_on_from_where_they_ended(attention):
    """Rows of 4 and 9 tokens, padded with NaN, then 8 more tokens of each."""
    run, (x, q, k, v), lengths = runner(attention), arrays(), np.array([4, 9])
    want = np.stack([wanted(attention, *(a[b].astype(np.float64) for a in (q, k, v))) for b in range(B)])
    padded = [
        np.where((np.arange(9) < lengths[:, None]).reshape(B, 9, *[1] * (a.ndim - 2)), a[:, :9], np.nan)
        for a in (x, q, k, v)
    ]
    o, state = run(None, context(9, lengths=jnp.asarray(lengths)), *padded)
    more = [np.stack([a[b, n : n + 8] for b, n in enumerate(lengths)]) for a in (x, q, k, v)]
    after, _ = run(state, context(8, lengths), *more)
    assert np.isfinite(o).all()
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(o[b, :n], want[b, :n], atol=1e-5)
        np.testing.assert_allclose(after[b], want[b, n : n + 8], atol=1e-5)


def test_a_student_of_it_is_its_teacher_until_a_token_leaves_the_window():
    attention = AttentionConfig(kind="window", window_size=9, sinks=2)
    graphdef, params = build(attention=attention)
    ids = tokens(length=14)
    student, teacher = (np.asarray(forward(params, ids, graphdef=graphdef, as_teacher=x)) for x in (False, True))
    np.testing.assert_allclose(student[:, :11], teacher[:, :11], atol=1e-5)
    assert np.abs(student[:, 11:] - teacher[:, 11:]).max(axis=(0, 2)).min() > 1e-3
    cache = models.bind(graphdef, params).init_cache(2, 0)
    logits, cache = prefill(params, ids[:, :13], cache, graphdef=graphdef)
    last, _ = decode(params, ids[:, 13], cache, graphdef=graphdef)
    np.testing.assert_allclose(logits, student[:, :13], atol=1e-4)
    np.testing.assert_allclose(last, student[:, 13], atol=1e-4)


def test_a_hybrid_of_it():
    """Layers of both kinds, though its own have nothing to slice."""
    attention = dataclasses.replace(SLIDING, softmax_layers=(1,))
    graphdef, params = build(attention=attention)
    out = forward(params, tokens(), graphdef=graphdef)
    assert np.isfinite(out).all()


def test_what_it_cannot_do_is_said():
    problems = functools.partial(mixer_class(SLIDING).problems, attention=SLIDING)
    assert problems(TINY) == []
    assert "window_size" in mixer_class(SLIDING).problems(TINY, AttentionConfig(kind="window"))[0]
    assert "rotary" in problems(dataclasses.replace(TINY, nope_layers=(1,)))[0]
    scaled = dataclasses.replace(TINY, rope_scaling=RopeScaling(kind="dynamic", factor=2.0))
    assert "'dynamic'" in problems(scaled)[0]
    assert mixer_class(SLIDING).problems(scaled, KINDS["no sinks"]) == []
    with pytest.raises(ConfigError, match=r"config\.stage1\.enabled: .*'window' has no parameters; set it to False"):
        Config(attention=SLIDING).validate()
    Config(attention=SLIDING, stage1=StageConfig(enabled=False)).validate()
    graphdef, params = build(attention=SLIDING)
    ids = jnp.asarray(tokens())
    with pytest.raises(UserError, match="packed rows"):
        models.bind(graphdef, params)(ids, segment_ids=jnp.zeros_like(ids))
