"""Prefill in any split plus decoding equals one full forward pass, for every mixer variant; padding is neutral."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig
from tests.models.helpers import LAWCAT, TINY, build, decode, forward, prefill, tokens


def variant(**changes):
    return dataclasses.replace(LAWCAT, **changes)


VARIANTS = {
    "default": LAWCAT,
    "hybrid": variant(softmax_layers=(1,)),
    "conv_off": variant(conv="off"),
    "conv_stacked": variant(conv="stacked", conv_size=3),
    "conv_shared_rope": variant(conv="shared", rope_linear=True),
    "one_tap": variant(conv_size=1),
    "untied_exp_dim": variant(tie_qk=False, feature_map="exp_dim"),
    "relu_unnormalized_full_rank": variant(feature_map="relu", normalize=False, gate_rank=0),
    "pos_elu_no_gate": variant(feature_map="pos_elu", gate_kind="none"),
    "half_softmax_unbounded": variant(feature_map="half_softmax", gate_lower_bound=None, gate_normalizer=4.0),
    "per_head_gate_unnormalized": variant(gate_kind="per_head", normalize=False, gate_half_life_max=100.0),
    "window": variant(window_size=3),
    "window_affine_sinks": variant(window_size=2, affine_window=True, sinks=2, output_gate=True, conv="off"),
    "lolcats": AttentionConfig(kind="lolcats", window_size=3),
    "window_terraced": variant(window_size=2, window_kind="terraced", sinks=1),
    "lolcats_terraced": AttentionConfig(kind="lolcats", window_size=2, window_kind="terraced", sinks=1),
    "lolcats_affine_sinks": AttentionConfig(kind="lolcats", window_size=2, affine_window=True, sinks=1),
    "window_alone": AttentionConfig(kind="window", window_size=2, sinks=1),
}
ONE_LAYER = dataclasses.replace(TINY, num_layers=1)


def check_parity(config, attention, splits):
    graphdef, params = build(config, attention)
    inputs = tokens(2, 8)
    full = np.asarray(forward(params, inputs, graphdef=graphdef))
    assert np.isfinite(full).all()
    for split in splits:
        cache = models.bind(graphdef, params).init_cache(2, 12)
        start = 0
        while start + split <= 8 - (split < 8):  # chunks of ``split``, the later ones on a cache that is not empty
            chunk = inputs[:, start : start + split]
            logits, cache = prefill(params, chunk, cache, graphdef=graphdef)
            np.testing.assert_allclose(logits, full[:, start : start + split], atol=2e-5)
            start += split
        for t in range(start, 8):
            logits, cache = decode(params, inputs[:, t], cache, graphdef=graphdef)
            np.testing.assert_allclose(logits, full[:, t], atol=2e-5)
        np.testing.assert_array_equal(cache["position"], [8, 8])


# Their parts are covered by the other variants; the slow test has them all.
REDUNDANT = {"conv_off", "one_tap", "window", "lolcats", "window_terraced", "window_alone"}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in REDUNDANT])
def test_prefill_and_decode_equal_the_full_forward(name):
    attention = VARIANTS[name]
    config = TINY if attention.softmax_layers else ONE_LAYER
    check_parity(config, attention, splits=(1, 3, 7) if name == "hybrid" else (3,))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_split_of_every_variant(name):
    check_parity(TINY, VARIANTS[name], splits=range(1, 9))


@pytest.mark.parametrize("name", ["hybrid", "window_affine_sinks", "lolcats_affine_sinks", "conv_stacked"])
def test_right_padding_is_neutral(name):
    """Ragged chunks, an empty one included, give each sequence what it gets alone."""
    attention = VARIANTS[name]
    graphdef, params = build(TINY if attention.softmax_layers else ONE_LAYER, attention)
    inputs = tokens(3, 10)
    lengths = np.array([[5, 1, 0], [2, 5, 4], [3, 0, 5]], np.int32)  # valid tokens of each sequence in three chunks
    cache = models.bind(graphdef, params).init_cache(3, 16)
    taken = np.zeros(3, int)
    last = np.zeros((3, TINY.vocab_size), np.float32)
    for chunk in lengths:
        rows = np.full((3, 5), 7, np.int32)
        for row, (start, count) in enumerate(zip(taken, chunk, strict=True)):
            rows[row, :count] = inputs[row, start : start + count]
        logits, cache = prefill(params, rows, cache, graphdef=graphdef, lengths=jnp.asarray(chunk))
        last = np.where(chunk[:, None] > 0, np.asarray(logits)[np.arange(3), np.maximum(chunk - 1, 0)], last)
        taken += chunk
    np.testing.assert_array_equal(cache["position"], taken)
    full = np.asarray(forward(params, inputs, graphdef=graphdef, lengths=jnp.asarray(taken, jnp.int32)))
    alone = np.asarray(forward(params, inputs, graphdef=graphdef))
    for row, count in enumerate(taken):
        np.testing.assert_allclose(full[row, :count], alone[row, :count], atol=1e-5)
        np.testing.assert_allclose(last[row], alone[row, count - 1], atol=2e-5)


def test_teacher_of_a_student_is_the_plain_decoder():
    plain, base = build()
    student, _ = models.abstract(TINY, LAWCAT)
    params = {**build(TINY, LAWCAT, seed=1)[1], **base}
    inputs = tokens()
    expected = forward(base, inputs, graphdef=plain)
    np.testing.assert_array_equal(forward(params, inputs, graphdef=student, as_teacher=True), expected)
    cache = models.bind(student, params).init_cache(2, 16, as_teacher=True)
    logits, _ = prefill(params, inputs, cache, graphdef=student, as_teacher=True)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_student_cache_does_not_grow_with_the_length():
    graphdef, params = build(ONE_LAYER, VARIANTS["window_affine_sinks"])
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(models.bind(graphdef, params).init_cache(1, length)))
        for length in (8, 4096)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_mixers_do_not_depend_on_the_base():
    fresh = models.init_params(TINY, LAWCAT, seed=3)
    base = {"embed": {"embedding": jnp.zeros((1, 1))}, "lora": {}}
    onto = models.init_params(TINY, LAWCAT, seed=3, base=base)
    assert onto.keys() == {"embed", "mixers"}
    jax.tree.map(np.testing.assert_array_equal, fresh["mixers"], onto["mixers"])
    _, shapes = models.abstract(TINY, LAWCAT)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(lambda leaf: leaf.shape, shapes)
