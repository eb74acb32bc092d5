"""One optimizer step of any stage: micro-batches, token-weighted mean, AdamW, and a guard against bad gradients.

A stage supplies a loss function that returns *sums* over tokens. Sums and weights are added over micro-batches and
divided once, so that accumulation equals the big batch however unevenly the tokens fall.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lawcat_jax.config import StageConfig
from lawcat_jax.data.batch import Batch
from lawcat_jax.training import optim


class Sums(NamedTuple):
    """What a loss function returns for a batch: sums, not means.

    ``loss`` and ``weight`` are f32 scalars: the loss of the batch is loss / weight. ``metrics`` maps a name to
    (numerator, denominator) of equal shapes, reported as their quotient.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


# (all parameters, batch, key or None outside training) -> Sums
LossFn = Callable[[optim.Params, Batch, jax.Array | None], Sums]


class TrainState(NamedTuple):
    """Everything a step changes. ``step`` counts batches taken, bad ones included."""

    params: optim.Params  # trainables only, f32
    opt_state: Any
    step: jax.Array  # i32
    lr_scale: jax.Array  # f32, lowered by the plateau schedule
    bad_in_row: jax.Array  # i32
    bad_total: jax.Array  # i32
    norm_mean: jax.Array  # f32, running mean of the gradient norms of good steps


# The spike guard compares with a mean over _SPIKE_MEMORY steps, and judges none of the first _SPIKE_PATIENCE.
_SPIKE_MEMORY, _SPIKE_PATIENCE = 50, 10


def init_state(trainable: optim.Params, stage: StageConfig) -> TrainState:
    """State before the first step; ``trainable`` is copied to f32 (the step donates its input)."""
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable)
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]  # three buffers: a donated buffer may appear only once
    opt_state = optim.make_optimizer(stage).init(params)
    return TrainState(params, opt_state, zero[0], jnp.ones((), jnp.float32), *zero[1:], jnp.zeros((), jnp.float32))


def _accumulate(loss_fn: LossFn, trainable, frozen, batch: Batch, key: jax.Array, grad_accum: int):
    """(gradients of the summed loss, Sums) of a batch, in ``grad_accum`` micro-batches."""

    def loss(params, micro, micro_key):
        sums = loss_fn(optim.merge(params, frozen), micro, micro_key)
        return sums.loss, sums

    gradient = jax.grad(loss, has_aux=True)
    if grad_accum == 1:
        return gradient(trainable, batch, jax.random.fold_in(key, 0))

    # Rows are dealt out in turn, so that every device contributes to every micro-batch from the rows it holds.
    micros = {k: v.reshape(v.shape[0] // grad_accum, grad_accum, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()}

    def body(carry, item):
        micro, index = item
        return jax.tree.map(jnp.add, carry, gradient(trainable, micro, jax.random.fold_in(key, index))), None

    first = {k: v[0] for k, v in micros.items()}
    shapes = jax.eval_shape(gradient, trainable, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (micros, jnp.arange(grad_accum)))[0]


def _quotients(sums: Sums) -> dict[str, jax.Array]:
    out = {"loss": sums.loss / jnp.maximum(sums.weight, 1e-20)}
    return out | {name: top / jnp.maximum(bottom, 1e-20) for name, (top, bottom) in sums.metrics.items()}


def make_train_step(loss_fn: LossFn, stage: StageConfig, steps: int):
    """``step(state, frozen, batch, stage_key) -> (state, metrics)``, to be jitted with the state donated.

    The random key of a step is ``fold_in(stage_key, state.step)``: a resumed run draws what a straight run draws.
    A bad step changes no parameter and no optimizer state; it is counted. A step is bad if its loss or gradient is not
    finite, or, after the warm-up, if its gradient norm exceeds ``spike_factor`` (where set) times the running mean over
    the last 50 good steps.
    Metrics are f32: loss, learning_rate, grad_norm (before clipping, total and per group), bad_in_row, bad_total,
    weight (of the loss, usually tokens), and the loss function's own.
    """
    optimizer, rate = optim.make_optimizer(stage), optim.schedule(stage, steps)
    judged_from = max(_SPIKE_PATIENCE, optim.warmup_steps(stage, steps))

    def step(state: TrainState, frozen, batch: Batch, stage_key: jax.Array):
        key = jax.random.fold_in(stage_key, state.step)
        gradients, sums = _accumulate(loss_fn, state.params, frozen, batch, key, stage.grad_accum)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1e-20), gradients)
        metrics = _quotients(sums)
        grad_norm = optax.global_norm(gradients)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        seen = state.step - state.bad_total
        if stage.spike_factor > 0:
            good &= (seen < judged_from) | (grad_norm <= stage.spike_factor * state.norm_mean)
        change = (grad_norm - state.norm_mean) / jnp.minimum(seen + 1, _SPIKE_MEMORY)

        learning_rate = rate(state.step) * state.lr_scale
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        bad = (~good).astype(jnp.int32)
        new = TrainState(
            params=params,
            opt_state=opt_state,
            step=state.step + 1,
            lr_scale=state.lr_scale,
            bad_in_row=(state.bad_in_row + 1) * bad,
            bad_total=state.bad_total + bad,
            norm_mean=jnp.where(good, state.norm_mean + change, state.norm_mean),
        )
        metrics |= {"learning_rate": learning_rate, "grad_norm": grad_norm, "weight": sums.weight}
        metrics |= {f"grad_norm/{name}": norm for name, norm in _group_norms(gradients).items()}
        metrics |= {"bad_in_row": new.bad_in_row, "bad_total": new.bad_total}
        return new, metrics

    return step


def _group_norms(gradients: optim.Params) -> dict[str, jax.Array]:
    groups: dict[str, list[jax.Array]] = {}
    for path, gradient in optim.flatten(gradients).items():
        groups.setdefault("/".join(path.split("/")[:2]), []).append(gradient)
    return {name: optax.global_norm(leaves) for name, leaves in groups.items()}


def make_eval_step(loss_fn: LossFn):
    """``step(trainable, frozen, batch) -> Sums``, without dropout."""

    def step(trainable, frozen, batch: Batch) -> Sums:
        return loss_fn(optim.merge(trainable, frozen), batch, None)

    return step


def validation(eval_step, frozen, batches: list[Batch]) -> Callable[[optim.Params], dict[str, Any]]:
    """Token-weighted mean loss and metrics over all ``batches``, as a function of the trainables."""

    def evaluate(trainable: optim.Params) -> dict[str, Any]:
        total: Sums | None = None
        for batch in batches:
            sums = jax.device_get(eval_step(trainable, frozen, batch))
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        if total is None:
            return {}
        return {name: jax.device_get(value) for name, value in _quotients(total).items()}

    return evaluate
