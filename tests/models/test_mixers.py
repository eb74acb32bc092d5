"""Every token mixer gives what the decoder, FLOP counts and sharding ask of it."""

import dataclasses
import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from lawcat_jax.config import AttentionConfig, Config
from lawcat_jax.models import flops
from lawcat_jax.models.layers import Context
from lawcat_jax.models.mixers import MIXERS, TokenMixer, mixer_class
from lawcat_jax.models.mixers.ablations import LawcatAblation
from lawcat_jax.models.mixers.lawcat import LawcatMixer
from lawcat_jax.models.rope import rope_table
from lawcat_jax.runtime import sharding
from tests.models.helpers import TINY, drawn, jit

CONFIGS = {
    **{kind: AttentionConfig(kind=kind, gate_rank=4, window_size=0 if kind == "lawcat" else 3) for kind in MIXERS},
    "full gate, stacked, untied, window": AttentionConfig(
        gate_rank=0, conv="stacked", tie_qk=False, feature_map="relu", window_size=3, sinks=2, output_gate=True
    ),
    "terraced window": AttentionConfig(kind="lolcats", window_size=2, window_kind="terraced"),
    "gate per head, shared, not normalised": AttentionConfig(
        gate_rank=4, gate_kind="per_head", conv="shared", normalize=False, rope_linear=True
    ),
}
B, T = 2, 7
MESH = AbstractMesh((2, 1, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def attention(request):
    return request.param


def context(length, start=0):
    start = jnp.full((B,), start, jnp.int32)
    return Context(*rope_table(start[:, None] + jnp.arange(length), TINY), start)


def arrays():
    generator = np.random.default_rng(0)
    heads = [(TINY.num_heads, TINY.head_dim), *[(TINY.num_kv_heads, TINY.head_dim)] * 2]
    shapes = [(B, T, TINY.hidden_size), *[(B, T, *head) for head in heads]]
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def abstract(kind, attention, **stack):
    return nnx.split(nnx.eval_shape(lambda: kind(TINY, attention, rngs=nnx.Rngs(0), **stack)))


def test_a_mixer_has_the_members_of_the_protocol(attention):
    chosen = mixer_class(attention)
    assert isinstance(nnx.merge(*abstract(chosen, attention)), TokenMixer)
    for name, member in inspect.getmembers(TokenMixer, inspect.isfunction):
        if name in ("__init__", "__call__") or not name.startswith("_"):
            wanted = inspect.signature(member).parameters
            assert list(inspect.signature(getattr(chosen, name)).parameters) == list(wanted), name
    assert chosen.problems(TINY, attention) == []
    one, stack = (nnx.to_pure_dict(abstract(chosen, attention, **more)[1]) for more in ({}, {"stack": (2,)}))
    assert jax.tree.map(lambda leaf: (2, *leaf.shape), one) == jax.tree.map(lambda leaf: leaf.shape, stack)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stack))


def test_a_mixer_runs_and_a_split_sequence_gives_the_same(attention):
    chosen = mixer_class(attention)
    graphdef, shapes = abstract(chosen, attention)

    @jit
    def run(params):
        mixer = nnx.merge(graphdef, params)
        x, q, k, v = arrays()
        whole, after = mixer(x, q, k, v, context(T))
        state, parts = chosen.empty_state(TINY, attention, B, jnp.float32), []
        for first, last in ((0, T - 1), (T - 1, T)):
            part = (array[:, first:last] for array in (x, q, k, v))
            o, state = mixer(*part, context(last - first, first), state)
            parts.append(o)
        return whole, after, jnp.concatenate(parts, axis=1), state, mixer.statistics(x, q, k, v, context(T))

    whole, after, split, state, statistics = run(drawn(nnx.to_pure_dict(shapes)))
    assert whole.shape == (B, T, TINY.num_heads, TINY.head_dim)
    np.testing.assert_allclose(split, whole, atol=2e-5)
    empty = jax.eval_shape(lambda: chosen.empty_state(TINY, attention, B, jnp.float32))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(lambda leaf: leaf.shape, empty)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), state, after)
    assert statistics
    for name, value in statistics.items():
        assert value.shape[0] in (TINY.num_heads, TINY.num_kv_heads), name
        assert np.isfinite(value).all(), name


def test_every_parameter_and_state_has_a_sharding_rule(attention):
    """One from the mixer's own table, found by the path the array has in a model or a cache, and not for the layers."""
    chosen = mixer_class(attention)
    params = nnx.to_pure_dict(abstract(chosen, attention, stack=(3,))[1])
    state = jax.eval_shape(lambda: chosen.empty_state(TINY, attention, B, jnp.float32))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), state)
    for part, tree, table in (("mixers", params, chosen.parameter_rules), ("linear", stacked, chosen.state_rules)):
        placed = sharding.shardings({part: tree}, MESH)[part]
        for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(placed), strict=True):
            name, own = sharding.path_name(path), [p for p in table if re.fullmatch(p, sharding.path_name(path))]
            assert own, name
            assert len(table[own[0]]) < leaf.ndim, name
            if leaf.size <= 1:  # no sinks, say: whole whatever the rule
                continue
            fits = [axes if leaf.shape[1 + n] % size_of(axes) == 0 else None for n, axes in enumerate(table[own[0]])]
            assert [*where.spec, *[None] * leaf.ndim][: 1 + len(fits)] == [None, *fits], name


def size_of(axes):
    return math.prod(MESH.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def test_rules_of_two_mixers_must_agree():
    sharding.add_rules([(r"^linear/(?:[Sz])$", P(None, ("data", "fsdp"), "tensor"))])  # as it is
    with pytest.raises(ValueError, match=r"linear/.*added as"):
        sharding.add_rules([(r"^linear/(?:[Sz])$", P(None, "tensor"))])


def test_flops_follow_the_sizes(attention):
    count = functools.partial(mixer_class(attention).flops_per_token, attention=attention)
    assert count(TINY) > 0
    assert math.isfinite(count(TINY))
    assert count(dataclasses.replace(TINY, num_heads=8)) > count(TINY)
    config = Config(attention=attention)
    config.stage2.enabled = False
    layers = TINY.num_layers * flops.layer_weights(TINY) * 2
    assert flops.model_flops("prefill", config, TINY, 8) == layers + TINY.num_layers * count(TINY)


def test_the_ablations_are_the_same_program_where_no_switch_is_turned():
    """Draws, output, state and statistics of both classes, equation by equation."""
    attention = CONFIGS["lawcat"]
    assert mixer_class(attention) is LawcatMixer
    assert mixer_class(dataclasses.replace(attention, normalize=False)) is LawcatAblation

    def everything(kind, key):
        mixer = kind(TINY, attention, rngs=nnx.Rngs(params=key))
        whole = mixer(*arrays(), context(T), kind.empty_state(TINY, attention, B, jnp.float32))
        return nnx.to_pure_dict(nnx.state(mixer)), whole, mixer.statistics(*arrays(), context(T))

    traced = (
        jax.make_jaxpr(functools.partial(everything, kind))(jax.random.key(0)) for kind in (LawcatMixer, LawcatAblation)
    )
    paper, ablation = (re.sub(r"0x[0-9a-f]+", "", str(jaxpr)) for jaxpr in traced)
    assert paper == ablation
    assert LawcatMixer.flops_per_token(TINY, attention) == LawcatAblation.flops_per_token(TINY, attention)
