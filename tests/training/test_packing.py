"""Packed rows train as each of their documents does alone: losses and gradients of both stages."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig, StageConfig
from lawcat_jax.errors import UserError
from lawcat_jax.training import attention_transfer, finetune
from lawcat_jax.training.step import StepInputs

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=24,
    tie_embeddings=True,
)
DOCUMENTS = ((5, 1, 4), (3, 6))  # tokens of the documents of each row, of 10 and 9 tokens; the rows have 11
MIXERS = {
    "lawcat": AttentionConfig(gate_rank=4),
    "hybrid": AttentionConfig(gate_rank=4, softmax_layers=(1,)),
    "window": AttentionConfig(gate_rank=4, window_size=3, conv="stacked", conv_size=2),
    "lolcats": AttentionConfig(kind="lolcats", window_size=2),
    "terraced": AttentionConfig(kind="lolcats", window_size=2, window_kind="terraced"),
}


def batches():
    """(packed batch, the same documents one in a row)."""
    rng = np.random.default_rng(0)

    def empty(rows, length):
        ints, floats = (np.zeros((rows, length), kind) for kind in (np.int32, np.float32))
        mask, lengths = np.zeros((rows, length), bool), np.zeros(rows, np.int32)
        batch = {"tokens": ints, "targets": ints.copy(), "loss_weights": floats, "mask": mask, "lengths": lengths}
        return batch | {"segment_ids": ints.copy()}

    packed, alone = empty(len(DOCUMENTS), 11), empty(sum(map(len, DOCUMENTS)), 6)
    number = 0
    for row, sizes in enumerate(DOCUMENTS):
        first = 0
        for segment, size in enumerate(sizes):
            draws = {"tokens": rng.integers(0, 40, size), "targets": rng.integers(0, 40, size)}
            draws |= {"loss_weights": rng.uniform(size=size), "mask": rng.uniform(size=size) < 0.8}
            draws |= {"segment_ids": np.full(size, 1 + segment % 2)}
            for name, values in draws.items():
                packed[name][row, first : first + size] = alone[name][number, :size] = values
            alone["lengths"][number] = size
            first, number = first + size, number + 1
        packed["lengths"][row] = first
    alone.pop("segment_ids")
    return packed, alone


def random_params(attention):
    graphdef, shapes = models.abstract(MODEL, attention, LoraConfig(rank=2))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def check(attention, module, stage):
    graphdef, params = random_params(attention)
    loss = module.make_loss(graphdef, stage)

    def value(params, batch):
        sums, _ = loss(params, batch, StepInputs(key=jax.random.key(0)))
        return sums.loss, sums

    run = jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options={"xla_backend_optimization_level": 0})
    packed, alone = batches()
    got, want = run(params, packed), run(params, alone)
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (got, want)), strict=True):
        scale = max(1.0, float(np.max(np.abs(b))))
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, err_msg=str(path))
    unmarked = {name: x for name, x in packed.items() if name != "segment_ids"}
    assert abs(run(params, unmarked)[0][0] - want[0][0]) > 1e-3  # it does matter


@pytest.mark.parametrize(
    "attention", [pytest.param(a, id=n, marks=[pytest.mark.slow] * (n != "lawcat")) for n, a in MIXERS.items()]
)
@pytest.mark.slow
def test_finetuning_packed_rows_equals_the_documents_alone(attention):
    check(attention, finetune, StageConfig(kl_weight=0.5))


@pytest.mark.parametrize(
    "attention", [pytest.param(a, id=n, marks=[pytest.mark.slow] * (n != "lawcat")) for n, a in MIXERS.items()]
)
def test_attention_transfer_of_packed_rows_equals_the_documents_alone(attention):
    check(attention, attention_transfer, StageConfig(mse_weight=10.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "stage"),
    [(attention_transfer, StageConfig(mse_weight=10.0)), (finetune, StageConfig(kl_weight=0.5))],
    ids=["attention_transfer", "finetune"],
)
def test_packed_rows_take_the_kernels_of_a_gpu(monkeypatch, module, stage):
    """Both stages call the layer with lengths and documents; its Triton kernels, interpreted, serve that as it is."""
    monkeypatch.setattr(sys.modules[__name__], "MODEL", dataclasses.replace(MODEL, head_dim=32))
    attention = AttentionConfig(gate_rank=4, implementation="pallas_triton")
    with kernels_pallas.interpret():
        check(attention, module, stage)
        graphdef, params = random_params(attention)
        loss = module.make_loss(graphdef, stage)
        packed, _ = batches()
        inputs = StepInputs(key=jax.random.key(0))
        traced = str(jax.make_jaxpr(jax.grad(lambda p: loss(p, packed, inputs)[0].loss))(params))
    assert all(name in traced for name in ("lawcat_features", "gla_segment_out", "gla_chunk_vjp"))


def test_what_does_not_go_with_packed_rows_is_refused():
    packed, _ = batches()
    graphdef, params = random_params(AttentionConfig(kind="lolcats", window_size=2, sinks=1))
    decoder = models.bind(graphdef, params)
    with pytest.raises(UserError, match="sinks=0"):
        jax.eval_shape(lambda: decoder(packed["tokens"], segment_ids=packed["segment_ids"]))
    with pytest.raises(ValueError, match="segment_ids: rows that go on from a state"):
        decoder(packed["tokens"], segment_ids=packed["segment_ids"], recurrent=decoder.init_recurrent(2))
