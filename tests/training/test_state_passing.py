"""State passing: what enters a step, what leaves it, and how far the gradient reaches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, Config, LoraConfig, MeshConfig, ModelConfig, StageConfig
from lawcat_jax.runtime import sharding
from lawcat_jax.training import finetune, optim, stages, state_passing
from lawcat_jax.training.divergence import Teacher
from lawcat_jax.training.step import StepInputs, init_state, make_train_step

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_size=24,
    max_position_embeddings=64,
    tie_embeddings=True,
)
ATTENTION, LORA = AttentionConfig(gate_rank=2), LoraConfig(rank=2)
ROWS, LENGTH = 8, 12
FAST = {"xla_backend_optimization_level": 0}  # to compile


@pytest.fixture(scope="module")
def model():
    graphdef, _ = models.abstract(MODEL, ATTENTION, LORA)
    params = models.init_params(MODEL, ATTENTION, LORA, seed=0)
    params["lora"] = jax.tree.map(lambda x: x + 0.1, params["lora"])
    return graphdef, params


def batch(seed: int, rows: int = ROWS, length: int = LENGTH) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 48, size=(rows, length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones((rows, length), np.float32),
        "lengths": rng.integers(length // 2, length + 1, size=rows).astype(np.int32),
        "mask": np.ones((rows, length), bool),
        "continues": rng.random(rows) < 0.7,
    }


def stage_of(**changes) -> StageConfig:
    fields = {"state_passing": "pieces", "state_reset": 0.0, "batch_size": ROWS, "seq_length": LENGTH, "steps": 10}
    return StageConfig(trainable=("^lora/", "^mixers/"), **(fields | changes))


def entry(graphdef, params, stage, keep=None, previous=None, recurrent=None) -> state_passing.Entry:
    if recurrent is None:
        recurrent = models.bind(graphdef, params).init_recurrent(ROWS)
    keep = jnp.ones(ROWS, bool) if keep is None else keep
    return state_passing.Entry(state_passing.Carry(recurrent, previous), keep)


def test_two_pieces_are_one_sequence(model):
    graphdef, params = model
    start = models.bind(graphdef, params).init_recurrent
    run = jax.jit(lambda *args, **kwargs: models.bind(graphdef, params)(*args, **kwargs), compiler_options=FAST)
    tokens = batch(1, length=2 * LENGTH)["tokens"]
    whole = run(tokens)
    first, recurrent = run(tokens[:, :LENGTH], recurrent=start(ROWS))
    second, recurrent = run(tokens[:, LENGTH:], recurrent=recurrent)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-4, atol=1e-5)
    assert np.all(recurrent["position"] == 2 * LENGTH)
    # Right padding leaves no trace in the state.
    lengths = jnp.arange(ROWS) + 2
    _, padded = run(tokens[:, :LENGTH], lengths=lengths, recurrent=start(ROWS))
    _, alone = run(tokens[:1, :2], recurrent=start(1))
    for a, b in zip(jax.tree.leaves(padded["linear"]), jax.tree.leaves(alone["linear"]), strict=True):
        np.testing.assert_allclose(a[:, :1], b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("crossing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_how_far_the_gradient_reaches(model, crossing):
    """Held against plain autodiff of both pieces in one, with the boundary cut or not."""
    graphdef, params = model
    stage = stage_of(state_gradient=crossing)
    loss = finetune.make_loss(graphdef, stage)
    one, two = batch(1), batch(2)
    one["lengths"][:] = LENGTH

    def stepwise(lora):
        everything = {**params, "lora": lora}
        start = entry(graphdef, everything, stage)
        if crossing:
            start = entry(graphdef, everything, stage, previous=state_passing.Previous(one["tokens"], one["lengths"]))
        else:
            _, left = loss(everything, one, StepInputs(entry=start))
            start = state_passing.Entry(left, start.keep)
        sums, left = loss(everything, two, StepInputs(entry=start))
        assert (left.previous is not None) == bool(crossing)
        return sums.loss

    def plain(lora):
        decoder = models.bind(graphdef, {**params, "lora": lora})
        _, recurrent = decoder(one["tokens"], recurrent=decoder.init_recurrent(ROWS))
        if not crossing:
            recurrent = jax.lax.stop_gradient(recurrent)
        logits, _ = decoder(two["tokens"], lengths=two["lengths"], recurrent=recurrent)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), two["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * two["loss_weights"])

    got, want = (jax.jit(jax.value_and_grad(f), compiler_options=FAST)(params["lora"]) for f in (stepwise, plain))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_rows_that_are_not_kept_start_from_nothing(model):
    graphdef, params = model
    stage = stage_of()
    loss = jax.jit(finetune.make_loss(graphdef, stage), compiler_options=FAST)
    used = jax.tree.map(lambda x: x + 1, models.bind(graphdef, params).init_recurrent(ROWS))
    sums = [
        loss(params, batch(1), StepInputs(entry=entry(graphdef, params, stage, keep, recurrent=recurrent)))[0].loss
        for keep, recurrent in ((jnp.zeros(ROWS, bool), used), (None, None), (None, used))
    ]
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-6)
    assert abs(sums[2] - sums[1]) > 1e-3


def test_rows_are_dealt_a_state_each():
    rows = 64
    recurrent = {"position": jnp.arange(rows), "linear": {"S": jnp.arange(2 * rows).reshape(2, rows, 1)}}
    carry = state_passing.Carry(recurrent)
    some = {"tokens": jnp.zeros((rows, 3)), "continues": jnp.arange(rows) % 2 == 0}
    shuffled = state_passing.enter(carry, some, jax.random.key(0), stage_of(state_passing="shuffled", state_reset=0.25))
    order = np.asarray(shuffled.carry.recurrent["position"])
    assert sorted(order) == list(range(rows))
    assert list(order) != list(range(rows))
    np.testing.assert_array_equal(shuffled.carry.recurrent["linear"]["S"][1, :, 0], rows + order)
    assert 0.05 < 1 - np.mean(shuffled.keep) < 0.5
    pieces = state_passing.enter(carry, some, jax.random.key(0), stage_of())
    np.testing.assert_array_equal(pieces.carry.recurrent["position"], np.arange(rows))
    np.testing.assert_array_equal(pieces.keep, some["continues"])


def run_steps(stage: StageConfig, model, count: int = 3):
    graphdef, params = model
    trainable, frozen = optim.split(params, stage.trainable, "trainable")
    recurrent = models.bind(graphdef, params).init_recurrent(ROWS)
    carry = state_passing.empty(recurrent, jnp.zeros((ROWS, LENGTH)), stage)
    state = init_state(trainable, stage, carry)
    step = jax.jit(make_train_step(finetune.make_loss(graphdef, stage), stage, stage.steps), compiler_options=FAST)
    losses = []
    for number in range(count):
        state, metrics = step(state, frozen, batch(number), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("mode", ["shuffled", pytest.param("pieces", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_accumulation_passes_the_same_states(model, mode):
    at_once, dealt = (
        # A small rate, so that Adam does not make rounding as large as the gradient.
        run_steps(stage_of(state_passing=mode, grad_accum=parts, learning_rate=1e-5), model)
        for parts in (1, 4)
    )
    np.testing.assert_allclose(dealt[0], at_once[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(dealt[1].carry), jax.tree.leaves(at_once[1].carry), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_eight_devices_equal_one(model):
    """With the states of rows shuffled over devices, and the gradient across one boundary."""
    _, params = model
    stage = stage_of(state_passing="shuffled", state_reset=0.2, state_gradient=1)
    config = Config(attention=ATTENTION, lora=LORA, stage2=stage)
    losses = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(MeshConfig(data=devices, fsdp=1), jax.devices()[:devices])
        built = stages.build("stage2", config, MODEL, mesh)
        state, frozen = built.split(stages.place(params, mesh))
        losses.append([])
        for number in range(3):
            rows = sharding.place_batch(batch(number), mesh)
            state, metrics = built.train_step(state, frozen, rows, built.key(0))
            losses[-1].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_a_moving_average_is_kept(model):
    graphdef, params = model
    stage = dataclasses.replace(stage_of(), state_passing="off", ema_decay=0.5)
    trainable, frozen = optim.split(params, stage.trainable, "trainable")
    state = init_state(trainable, stage)
    step = jax.jit(make_train_step(finetune.make_loss(graphdef, stage), stage, stage.steps), compiler_options=FAST)
    expected = trainable
    for number in range(4):
        state, _ = step(state, frozen, batch(number), jax.random.key(0))
        decay = min(0.5, (1 + number) / (10 + number))
        expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, expected, state.params)
    for a, b in zip(jax.tree.leaves(state.evaluated), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_of_tempered_distributions(direction):
    rng = np.random.default_rng(0)
    logits, wanted = (jnp.asarray(rng.normal(size=(5, 7)), jnp.float32) for _ in range(2))
    weights = jnp.asarray([1.0, 0.0, 2.0, 1.0, 0.5])
    held = Teacher(wanted, weights, temperature=2.0, reverse=direction == "reverse")
    got = finetune.token_sums(logits, jnp.zeros(5, jnp.int32), jnp.zeros(5), held)["kl"]
    p, q = (np.asarray(jax.nn.softmax(x / 2.0), np.float64) for x in (logits, wanted))
    if direction == "forward":
        p, q = q, p
    np.testing.assert_allclose(got, 4 * np.sum(weights * np.sum(p * np.log(p / q), axis=-1)), rtol=1e-5)


def test_weight_of_the_divergence_over_a_stage():
    stage = StageConfig(kl_weight=1.0, kl_weight_end=0.0)
    assert [float(finetune.kl_weight(stage, x)) for x in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


def test_learning_rates_by_group():
    stage = StageConfig(lr_multipliers=("gate=0.1", "^lora/=3"), gate_lr_multiplier=7.0)
    paths = ("mixers/gate_up/bias", "lora/q_proj/a", "mixers/conv_q")
    assert [optim.lr_multiplier(stage, path) for path in paths] == [0.1, 3.0, 1.0]
