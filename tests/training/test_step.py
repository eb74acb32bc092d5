"""The optimizer step: accumulation, schedules, clipping, groups, path filters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_doubles import loss_fn, make_batch, params

from lawcat_jax.config import StageConfig
from lawcat_jax.errors import UserError
from lawcat_jax.training import finetune, optim, step
from lawcat_jax.training.divergence import Teacher


def one_step(stage: StageConfig, loss=loss_fn, batch=None):
    trainable, frozen = optim.split(params(), stage.trainable, "trainable")
    state = step.init_state(trainable, stage)
    run = jax.jit(step.make_train_step(loss, stage, steps=10))
    return run(state, frozen, make_batch(0) if batch is None else batch, jax.random.key(0))


def quiet(params, batch, inputs):
    """The loss without noise, which differs between micro-batches."""
    return loss_fn(params, batch, inputs._replace(key=None))


def test_accumulation_equals_the_big_batch_with_uneven_weights():
    batch = make_batch(3)
    batch["w"][:] = [7, 0, 1, 0, 0, 3, 0, 20]
    results = []
    for grad_accum in (1, 2, 8):
        stage = StageConfig(learning_rate=0.1, trainable=("^mixers/",), grad_accum=grad_accum, warmup_fraction=0)
        results.append(one_step(stage, quiet, batch))
    for state, metrics in results[1:]:
        for name in ("loss", "grad_norm", "weight", "mean_error"):
            np.testing.assert_allclose(metrics[name], results[0][1][name], rtol=1e-6)
        gradient = lambda s: s.opt_state[0].mu["mixers"]["conv_q"]  # noqa: E731
        np.testing.assert_allclose(gradient(state), gradient(results[0][0]), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(results[0][1]["weight"], 31)


def test_batch_without_weight_changes_nothing():
    batch = make_batch(0)
    batch["w"][:] = 0
    state, metrics = one_step(StageConfig(trainable=("^mixers/",)), quiet, batch)
    np.testing.assert_array_equal(state.params["mixers"]["conv_q"], params()["mixers"]["conv_q"])
    assert metrics["loss"] == 0


def test_validation_without_weight_is_no_result():
    def eval_step(trainable, frozen, batch):
        return step.Sums(loss=jnp.zeros(()), weight=jnp.float32(batch), metrics={})

    assert step.validation(eval_step, {}, [0.0, 2.0])({})["loss"] == 0
    with pytest.raises(UserError, match="no token of its samples has a loss weight"):
        step.validation(eval_step, {}, [0.0, 0.0])({})


def test_matches_adamw_of_optax():
    stage = StageConfig(
        learning_rate=0.1, trainable=(".*",), weight_decay=0.1, clip_norm=0.5, warmup_fraction=0, b2=0.99
    )
    stage.schedule = "constant"
    state, metrics = one_step(stage, quiet)
    start = jax.tree.map(lambda x: x.astype(jnp.float32), params())
    reference = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            0.1,
            b2=0.99,
            weight_decay=0.1,
            mask=lambda p: optim.unflatten({k: "bias" not in k for k in optim.flatten(p)}),
        ),
    )

    def loss(p):
        sums, _ = quiet(p, make_batch(0), step.StepInputs())
        return sums.loss / sums.weight

    gradient = jax.grad(loss)(start)
    updates, _ = reference.update(gradient, reference.init(start), start)
    expected = optax.apply_updates(start, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(gradient), rtol=1e-5)
    groups = [float(metrics[f"grad_norm/{name}"]) for name in ("mixers/conv_q", "mixers/gate_up", "layers/kernel")]
    np.testing.assert_allclose(np.linalg.norm(groups), metrics["grad_norm"], rtol=1e-5)


def test_gate_learns_at_its_own_rate():
    moved = []
    for multiplier in (1.0, 0.1):
        stage = StageConfig(
            learning_rate=0.1, trainable=("^mixers/",), gate_lr_multiplier=multiplier, warmup_fraction=0
        )
        mixers = one_step(stage, quiet)[0].params["mixers"]
        moved.append((mixers["gate_up"]["bias"], mixers["conv_q"] - params()["mixers"]["conv_q"]))
    np.testing.assert_allclose(moved[1][0], 0.1 * moved[0][0], rtol=1e-5)
    np.testing.assert_allclose(moved[1][1], moved[0][1])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("constant", {0: 0.5, 1: 1.0, 2: 1.0, 9: 1.0}),
        ("plateau", {0: 0.5, 1: 1.0, 9: 1.0}),
    ],
)
def test_schedule_values(kind, expected):
    rate = optim.schedule(StageConfig(learning_rate=1.0, schedule=kind, warmup_fraction=0.2), 10)
    for at, value in expected.items():
        np.testing.assert_allclose(rate(jnp.int32(at)), value, atol=1e-6)


def test_plateau_waits_then_lowers():
    plateau = optim.Plateau(0.1, 2)
    scales = [plateau.update(loss) for loss in (3.0, 2.0, 2.0, 2.5, 2.1, 1.0, 1.5)]
    np.testing.assert_allclose(scales, [1, 1, 1, 1, 0.1, 0.1, 0.1])


def test_plateau_and_warm_up_equal_torch_and_transformers():
    """The authors' schedules: torch's ReduceLROnPlateau with its defaults and LoLCATs' numbers, and transformers' warm-up."""
    import torch
    from transformers import get_constant_schedule_with_warmup

    stage = StageConfig(learning_rate=1e-3, schedule="plateau", plateau_patience=1, warmup_fraction=0.5)
    plateau = optim.Plateau.of(stage)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1, min_lr=1e-5)
    best = 2.0
    for loss in (best, best * (1 - 5e-5), best * (1 - 9e-5), best, best * (1 - 2e-4), *[best] * 12):
        reference.step(loss)
        assert 1e-3 * plateau.update(loss) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
    assert optimizer.param_groups[0]["lr"] == 1e-5  # three steps down would be below the least

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    reference = get_constant_schedule_with_warmup(optimizer, 5)
    rate = optim.schedule(dataclasses.replace(stage, warmup_from_zero=True), 10)
    for number in range(8):
        assert float(rate(number)) == pytest.approx(reference.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        reference.step()


def test_split_and_merge():
    trainable, frozen = optim.split(params(), ("conv", "gate"), "config.stage1.trainable")
    assert set(optim.flatten(trainable)) == {"mixers/conv_q", "mixers/gate_up/bias"}
    assert set(optim.flatten(optim.merge(trainable, frozen))) == set(optim.flatten(params()))
    with pytest.raises(UserError, match="'lora' matches no parameter"):
        optim.split(params(), ("lora",), "config.stage1.trainable")
    with pytest.raises(UserError, match="not a regular expression"):
        optim.split(params(), ("(",), "config.stage1.trainable")


@pytest.mark.parametrize("chunk", [0, 4, 5, 64])
def test_chunked_cross_entropy_and_its_gradient(chunk):
    rng = np.random.default_rng(0)
    hidden, teacher = (jnp.asarray(rng.normal(size=(2, 13, 4)), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 7, size=(2, 13)))
    weights = jnp.asarray(rng.integers(0, 3, size=(2, 13)), jnp.float32)

    def total(kernel, chunk):
        held = Teacher(teacher, weights)
        sums = finetune.chunked_token_sums(lambda h: h @ kernel, hidden, targets, weights, held, chunk)
        return sums["cross_entropy"] + sums["kl"], sums

    gradient, sums = jax.grad(total, has_aux=True)(kernel, chunk)
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x @ kernel)) for x in (hidden, teacher))
    picked = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums["cross_entropy"], -(np.asarray(weights) * picked).sum(), rtol=1e-5)
    kl = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    np.testing.assert_allclose(sums["kl"], (np.asarray(weights) * kl).sum(), rtol=1e-4)
    hits = ((log_p.argmax(-1) == np.asarray(targets)) & (np.asarray(weights) > 0)).sum()
    assert sums["hits"] == hits
    expected = jax.grad(lambda k: total(k, 0)[0])(kernel)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
