"""Token mixers on a mesh give what they give on one device."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.testing.layer_cases import segment_ids
from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, MeshConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.inference import generation
from lawcat_jax.inference.session import Session
from lawcat_jax.models import parallel
from lawcat_jax.models.attention import softmax_attention
from lawcat_jax.runtime import sharding
from lawcat_jax.tasks import decoder_model

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48,
    max_position_embeddings=64,
)  # fmt: skip

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (simulated) devices")


def mesh(**sizes: int):
    return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:8])


def test_split_follows_what_divides():
    def found(*sizes, **options):
        with jax.sharding.use_abstract_mesh(mesh(data=2, fsdp=1, tensor=2, sequence=2).abstract_mesh):
            return parallel.split(*sizes, **options)

    assert parallel.split(4, 8) is None
    assert found(4, 8, heads=(4, 2, 1)) == (("data", "fsdp"), "sequence", "tensor")
    assert found(3, 7, heads=(4, 3)) == (None, None, None)
    assert found(4, 8, least_tokens=5).tokens is None


@pytest.mark.parametrize("window", [None, 5])
def test_softmax_attention_over_split_tokens(window):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 16, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    attend = functools.partial(softmax_attention, window=window)
    where = mesh(data=2, fsdp=1, tensor=2, sequence=2)
    split = jax.jit(sharding.on_mesh(attend, where), in_shardings=(sharding.replicated(where),) * 3)
    np.testing.assert_allclose(split(q, k, v), attend(q, k, v), atol=1e-6)


@pytest.mark.slow
def test_packed_logits_over_split_tokens():
    """Of a softmax and a linear layer: positions, attention, convolutions and state begin anew in each document."""
    attention = AttentionConfig(gate_rank=4, softmax_layers=(1,))
    graphdef, _ = models.abstract(MODEL, attention)
    params = models.init_params(MODEL, attention, None, seed=0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, size=(2, 32)), jnp.int32)
    tokens = tokens.at[1, :8].set(tokens[0, 8:16])  # one document in both rows, at different places
    ids = segment_ids([[0, 7, 8, 16, 25], [0, 8, 31]], 32)

    def logits(params, tokens, ids):
        return models.bind(graphdef, params)(tokens, segment_ids=ids)

    options = {"compiler_options": {"xla_backend_optimization_level": 0}}
    where = mesh(data=1, fsdp=1, sequence=8)
    split = jax.jit(sharding.on_mesh(logits, where), in_shardings=(sharding.replicated(where),) * 3, **options)
    whole = jax.jit(logits, **options)
    got = split(params, tokens, ids)
    np.testing.assert_allclose(got, whole(params, tokens, ids), atol=1e-6)
    np.testing.assert_allclose(got[0, 8:16], got[1, :8], atol=1e-6)


def test_processes_that_hold_the_same_rows_load_the_same_part():
    def shard(process, shape, chips_a_host=4):
        count = np.prod(shape)
        devices = np.array([SimpleNamespace(process_index=n // chips_a_host) for n in range(count)]).reshape(shape)
        return sharding.data_shard(SimpleNamespace(devices=devices), process)

    assert [shard(process, (1, 8, 1, 1)) for process in range(2)] == [(0, 2), (1, 2)]
    assert [shard(process, (1, 2, 8, 1)) for process in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [shard(process, (1, 1, 2, 4)) for process in range(2)] == [(0, 1), (0, 1)]
    with pytest.raises(UserError, match="share some of their rows but not all"):
        shard(0, (1, 4, 3, 1))


@pytest.mark.slow
def test_generation_on_a_mesh():
    attention = AttentionConfig(gate_rank=4, softmax_layers=(1,))
    graphdef, _ = models.abstract(MODEL, attention)
    params = models.init_params(MODEL, attention, None, seed=0)
    prompts = [[1, 2, 3, 4, 5] * 4, [7, 8], [9]]
    options = {"max_new_tokens": 6, "batch_size": 4, "prefill_chunk": 16}
    expected = generation.generate(graphdef, params, prompts, **options)
    where = mesh(data=2, fsdp=1, tensor=2, sequence=2)
    placed = jax.tree.map(jax.device_put, params, sharding.shardings(params, where))
    assert generation.generate(graphdef, placed, prompts, **options) == expected
    assert list(Session(graphdef, placed).stream(prompts[0], max_new_tokens=6)) == expected[0]


@pytest.mark.slow
def test_evaluation_splits_samples_over_copies_of_the_weights():
    """Answers and likelihoods are those of one device, whether the rows fill the devices or not."""
    graphdef, _ = models.abstract(MODEL, AttentionConfig(gate_rank=4, softmax_layers=(1,)))
    params = models.init_params(MODEL, AttentionConfig(gate_rank=4, softmax_layers=(1,)), None, seed=0)
    where = mesh(data=8, fsdp=1)
    spread = jax.device_put(params, sharding.replicated(where))
    assert sharding.batch_shards(params) == 1
    assert sharding.batch_shards(spread) == 8
    prompts = [[number, 3, 4, 5] * (4 + number) for number in range(11)]
    tokens = np.random.default_rng(0).integers(0, 64, size=(8, 33)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.ones((8, 32), np.float32)}
    batch["lengths"] = np.full(8, 32, np.int32)
    found = []
    for placed in (params, spread):
        options = {"as_teacher": False}
        answer = decoder_model.greedy(graphdef, placed, batch_size=4, prefill_chunk=16, **options)
        total = decoder_model.model_nll(graphdef, placed, **options)(batch)
        by_position = decoder_model.position_nll(graphdef, placed, chunk=16, **options)(batch)
        found.append((answer(prompts, 6, False), total, by_position))
    (answers, total, by_position), (split_answers, split_total, split_by_position) = found
    assert split_answers == answers
    np.testing.assert_allclose(split_total, total, rtol=1e-5)
    np.testing.assert_allclose(split_by_position, by_position, rtol=1e-5)
    with sharding.mesh_of(spread):
        cache, logits = generation.empty_cache(spread, graphdef=graphdef, batch=8, length=64)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(cache)} == {8}
    assert logits.sharding.shard_shape(logits.shape)[0] == 1
    assert cache["softmax"]["k"].sharding.shard_shape(cache["softmax"]["k"].shape)[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(gate_rank=0, tie_qk=False, conv="stacked", output_gate=True),
        AttentionConfig(conv="shared", gate_kind="per_head", window_size=8, feature_map="relu"),
        AttentionConfig(conv="off", gate_kind="none"),
        AttentionConfig(kind="lolcats", conv="off", window_size=8, tie_qk=False),
        AttentionConfig(kind="window", window_size=8, sinks=2),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_variants_on_a_mesh(attention, packed):
    """Logits and gradients of the mixers, or of the projections of one that has no parameters."""
    if packed and attention.sinks:
        attention = dataclasses.replace(attention, sinks=0)  # packed rows have none
    graphdef, _ = models.abstract(MODEL, attention)
    params = models.init_params(MODEL, attention, None, seed=0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, size=(4, 32)), jnp.int32)
    lengths = jnp.asarray([32, 20, 7, 31], jnp.int32)
    ids = segment_ids([[0, 16], [0, 15, 17], [0, 1, 6], [0, 3, 20]], 32) if packed else None

    def loss(params):
        logits = models.bind(graphdef, params)(tokens, lengths=lengths, segment_ids=ids)
        valid = jnp.arange(32) < lengths[:, None]
        return jnp.sum(jnp.where(valid[:, :, None], logits, 0) ** 2)

    expected, expected_gradient = jax.jit(jax.value_and_grad(loss))(params)
    where = mesh(data=2, fsdp=1, tensor=2, sequence=2)
    placed = jax.tree.map(jax.device_put, params, sharding.shardings(params, where))
    value, gradient = jax.jit(sharding.on_mesh(jax.value_and_grad(loss), where))(placed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    got, want = (tree["mixers"] or tree["layers"]["attention"] for tree in (gradient, expected_gradient))
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(got),
        jax.tree.leaves(want),
        strict=True,
    ):
        scale = float(jnp.max(jnp.abs(wanted))) + 1e-6
        np.testing.assert_allclose(found, wanted, atol=2e-4 * scale, err_msg=sharding.path_name(path))
