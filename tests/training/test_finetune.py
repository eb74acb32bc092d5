"""The loss of stage 2 with a frozen head equals the plain loss, and its gradient too."""

from __future__ import annotations

import dataclasses
import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, LoraConfig, MeshConfig, ModelConfig, StageConfig
from lawcat_jax.runtime import sharding
from lawcat_jax.training import finetune
from lawcat_jax.training.divergence import StoredTeacher, Teacher, arrays_of
from lawcat_jax.training.step import StepInputs

MODEL = ModelConfig(
    vocab_size=48, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24,
    tie_embeddings=True,
)  # fmt: skip


def arrays(rows=4, length=13, width=8, vocab=16):
    """(kernel [V, D], hidden, targets, weights); of the chunks of 4 tokens the second has no weight at all, the third
    in one row only.
    """
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 3, size=(rows, length))
    weights[:, 4:8] = 0
    weights[1:, 8:12] = 0
    kernel, hidden = rng.normal(size=(vocab, width)), rng.normal(size=(rows, length, width))
    targets = rng.integers(0, vocab, size=(rows, length))
    return tuple(map(jnp.float32, (kernel, hidden))) + (jnp.asarray(targets, jnp.int32), jnp.float32(weights))


def frozen(axes, chunk, kernel, hidden, targets, weights, teacher=None, kl_weight=0.0):
    kernel = kernel if axes == "vd" else kernel.T
    held = {} if teacher is None else arrays_of(teacher)
    form = teacher and teacher._replace(**dict.fromkeys(held))
    operands = (kernel, hidden, targets, weights, held, jnp.float32(kl_weight))
    sums = finetune.frozen_head_sums(axes, chunk, form, *operands)
    return 3 * sums["objective"] + sums["hits"], sums


def plain(kernel, hidden, targets, weights):
    sums = finetune.token_sums(hidden @ kernel.T, targets, weights, None)
    return 3 * sums["cross_entropy"] + sums["hits"], sums


@pytest.mark.parametrize(("axes", "chunk"), [("vd", 4), ("dv", 5), ("vd", 0), ("dv", 64)])
def test_frozen_head_equals_the_plain_sums(axes, chunk):
    inputs = arrays()
    want, (_, sums) = jax.grad(plain, argnums=1, has_aux=True)(*inputs), plain(*inputs)
    run = functools.partial(frozen, axes, chunk)
    got, got_sums = jax.jit(jax.grad(run, argnums=1, has_aux=True))(*inputs)
    np.testing.assert_allclose(got, want[0], rtol=1e-5, atol=1e-6)
    for evaluated in (got_sums, jax.jit(run)(*inputs)[1]):
        np.testing.assert_allclose(evaluated["cross_entropy"], sums["cross_entropy"], rtol=1e-6)
        assert evaluated["hits"] == sums["hits"] > 0


def teachers(kernel, rows=4, length=13, width=8):
    """One that runs, one with a temperature and the other direction, one of stored logits; with weights of their own, so
    that a chunk without a label may hold tokens that are compared, and the other way round.
    """
    rng = np.random.default_rng(5)
    values, weights = jnp.float32(rng.normal(size=(rows, length, width))), rng.integers(0, 2, size=(rows, length))
    weights[:, 8:] = 0
    weights = jnp.float32(weights) / 2
    logits, ids = jax.lax.top_k(values @ kernel.T, 5)
    rest = jnp.float32(rng.normal(size=(rows, length)))
    return {
        "runs": Teacher(values, weights),
        "tempered": Teacher(values, weights, temperature=2.0, reverse=True),
        "stored": StoredTeacher(ids, logits, rest, weights),
    }


@pytest.mark.parametrize(("axes", "chunk"), [("vd", 4), ("dv", 0)])
@pytest.mark.parametrize("name", ["runs", "tempered", "stored"])
def test_frozen_head_with_a_teacher(axes, chunk, name):
    kernel, *inputs = arrays()
    teacher = teachers(kernel)[name]

    def chunked(hidden):
        sums = finetune.chunked_token_sums(lambda x: x @ kernel.T, hidden, *inputs[1:], teacher, 0)
        return 3 * (sums["cross_entropy"] + 0.7 * sums["kl"]), sums

    want, sums = jax.grad(chunked, has_aux=True)(inputs[0])
    run = functools.partial(frozen, axes, chunk, teacher=teacher, kl_weight=0.7)
    got, got_sums = jax.jit(jax.grad(run, argnums=1, has_aux=True))(kernel, *inputs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for key in ("cross_entropy", "kl", "hits"):
        np.testing.assert_allclose(got_sums[key], sums[key], rtol=1e-5)
    assert sums["kl"] > 0.1


def test_what_has_no_weight_does_not_count():
    kernel, hidden, targets, weights = arrays()
    spoiled = hidden.at[:, 4:8].set(jnp.nan).at[1:, 8:12].set(jnp.inf)
    run = jax.jit(jax.value_and_grad(functools.partial(frozen, "vd", 4), argnums=1, has_aux=True))
    (value, _), gradient = run(kernel, spoiled, targets, weights)
    (expected, _), expected_gradient = run(kernel, hidden, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (simulated) devices")
def test_frozen_head_on_a_mesh():
    """A chunk has weight on some devices only: all take the same branch."""
    inputs = arrays()
    where = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    rows = NamedSharding(where, P(("data", "fsdp")))
    split = (NamedSharding(where, P("tensor")), rows, rows, rows)
    run = jax.value_and_grad(functools.partial(frozen, "vd", 4), argnums=1, has_aux=True)
    placed = [jax.device_put(x, s) for x, s in zip(inputs, split, strict=True)]
    (value, sums), gradient = jax.jit(sharding.on_mesh(run, where))(*placed)
    (expected, expected_sums), expected_gradient = jax.jit(run)(*inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert sums["hits"] == expected_sums["hits"]
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tied", "kl_weight"),
    [pytest.param(True, 0.0, marks=pytest.mark.slow), pytest.param(False, 0.0, marks=pytest.mark.slow), (True, 0.5)],
)
def test_the_loss_does_not_depend_on_the_path(tied, kl_weight, monkeypatch):
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    graphdef, _ = models.abstract(model, AttentionConfig(gate_rank=2), LoraConfig(rank=2))
    params = models.init_params(model, AttentionConfig(gate_rank=2), LoraConfig(rank=2), seed=0)
    params["lora"] = jax.tree.map(lambda x: x + 0.1, params["lora"])
    rng = np.random.default_rng(1)
    tokens, lengths = rng.integers(0, 48, size=(2, 21)), jnp.asarray([20, 14])
    weights = jnp.float32((np.arange(20) > 9) & (np.arange(20) < np.asarray(lengths)[:, None]))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "lengths": lengths, "loss_weights": weights}

    def run(unroll_layers):
        stage = StageConfig(trainable=("^lora/",), loss_chunk=8, unroll_layers=unroll_layers, kl_weight=kl_weight)
        loss = finetune.make_loss(graphdef, stage)

        def value(lora):
            sums, _ = loss({**params, "lora": lora}, batch, StepInputs())
            return sums.loss, sums.metrics

        fast = {"xla_backend_optimization_level": 0}  # to compile
        return jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=fast)(params["lora"])

    got = run(True)
    monkeypatch.setattr(finetune, "_head_is_frozen", lambda *_: False)
    want = run(False)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.any(got[1]["q_proj"]["a"])


@pytest.mark.parametrize(
    ("tied", "patterns", "expected"),
    [(True, ("^lora/",), True), (True, (".*",), False), (True, ("embed",), False), (False, ("embed",), True)],
)
def test_which_heads_are_frozen(tied, patterns, expected):
    graphdef, shapes = models.abstract(dataclasses.replace(MODEL, tie_embeddings=tied))
    assert finetune._head_is_frozen(models.bind(graphdef, shapes), StageConfig(trainable=patterns)) == expected


def test_a_tied_head_does_not_transpose_the_embedding():
    graphdef, shapes = models.abstract(MODEL)

    def logits(params, hidden):
        decoder = models.bind(graphdef, params)
        return decoder.head(hidden, decoder.head_kernel())

    hidden = jax.ShapeDtypeStruct((2, 3, 16), jnp.float32)
    assert "transpose" not in str(jax.make_jaxpr(logits)(shapes, hidden))


@pytest.mark.parametrize(("base", "gpu"), [("base", "gpu"), ("paper", "paper_gpu")])
def test_the_gpu_variant_trains_the_same(base, gpu):
    get_config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "llama1b.py"))["get_config"]
    base, gpu = get_config(base), get_config(gpu)
    gpu.validate()
    assert (gpu.stage1.unroll_layers, gpu.stage2.unroll_layers, gpu.stage2.remat) == (True, True, "none")
    for stage in ("stage1", "stage2"):
        changes = {"unroll_layers": False, "remat": getattr(base, stage).remat}
        setattr(gpu, stage, dataclasses.replace(getattr(gpu, stage), **changes))
    assert (gpu.mesh.data, gpu.mesh.fsdp) == (-1, 1)
    gpu.mesh = base.mesh
    assert gpu == base


@pytest.mark.parametrize("chunk", [0, 3])
def test_tokens_without_weight_reach_neither_sums_nor_gradients(chunk):
    """Hidden states that are not finite where both weights are 0, with a head that trains and a teacher."""
    rng = np.random.default_rng(0)
    hidden, teacher, kernel = (
        jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, 4), (2, 5, 4), (4, 7))
    )
    targets = jnp.asarray(rng.integers(0, 7, (2, 5)))
    weights, held = jnp.asarray([[1, 0, 1, 0, 0], [0, 0, 1, 1, 0]], jnp.float32), jnp.zeros((2, 5)).at[:, 1].set(1.0)
    off = ((weights == 0) & (held == 0))[..., None]

    @jax.jit
    def run(hidden, teacher, kernel):
        def loss(hidden, kernel):
            values = Teacher(teacher, held, 2.0)
            head = lambda x: x @ kernel  # noqa: E731
            sums = finetune.chunked_token_sums(head, hidden, targets, weights, values, chunk)
            return sums["cross_entropy"] + sums["kl"], sums

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernel)

    want = run(jnp.where(off, 0, hidden), jnp.where(off, 0, teacher), kernel)
    got = run(jnp.where(off, jnp.nan, hidden), jnp.where(off, jnp.inf, teacher), kernel)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(want))
    jax.tree.map(np.testing.assert_array_equal, got, want)
