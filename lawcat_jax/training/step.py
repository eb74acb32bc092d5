"""One optimizer step of any stage: micro-batches, token-weighted mean, AdamW, and a guard against bad gradients.

A stage supplies a loss function that returns *sums* over tokens. Sums and weights are added over micro-batches and
divided once, so that accumulation equals the big batch however unevenly the tokens fall.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from lawcat_jax.config import StageConfig
from lawcat_jax.data.batch import Batch
from lawcat_jax.errors import UserError
from lawcat_jax.training import optim, state_passing


class Sums(NamedTuple):
    """What a loss function returns for a batch: sums, not means.

    ``loss`` and ``weight`` are f32 scalars: the loss of the batch is loss / weight. ``metrics`` maps a name to
    (numerator, denominator) of equal shapes, reported as their quotient.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


class StepInputs(NamedTuple):
    """What a loss function knows of the step beside parameters and batch.

    ``key``: for what is random, None outside training. ``progress``: share of the stage's steps that are done, f32 in
    [0, 1], 1 outside training. ``entry``: what the rows begin with, with state passing.
    """

    key: jax.Array | None = None
    progress: jax.Array | float = 1.0
    entry: state_passing.Entry | None = None


# (all parameters, batch, inputs of the step) -> (Sums, what the rows leave to the next step or None)
LossFn = Callable[[optim.Params, Batch, StepInputs], tuple[Sums, state_passing.Carry | None]]


class TrainState(NamedTuple):
    """Everything a step changes. ``step`` counts batches taken, bad ones included."""

    params: optim.Params  # trainables only, f32
    opt_state: Any
    step: jax.Array  # i32
    lr_scale: jax.Array  # f32, lowered by the plateau schedule
    bad_in_row: jax.Array  # i32
    bad_total: jax.Array  # i32
    norm_mean: jax.Array  # f32, running mean of the gradient norms of good steps
    carry: state_passing.Carry | None = None  # with state passing
    average: optim.Params | None = None  # moving average of the trainables, with ema_decay

    @property
    def evaluated(self) -> optim.Params:
        """The trainables that are validated and kept: the moving average where there is one."""
        return self.params if self.average is None else self.average


# The spike guard compares with a mean over _SPIKE_MEMORY steps, and judges none of the first _SPIKE_PATIENCE.
_SPIKE_MEMORY, _SPIKE_PATIENCE = 50, 10
_ENTRY_STREAM = 2**31 - 1  # of the step's random key; micro-batches use the small numbers


def init_state(trainable: optim.Params, stage: StageConfig, carry: state_passing.Carry | None = None) -> TrainState:
    """State before the first step; ``trainable`` is copied to f32 (the step donates its input)."""

    def copied() -> optim.Params:
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable)

    params = copied()
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]  # three buffers: a donated buffer may appear only once
    return TrainState(
        params=params,
        opt_state=optim.make_optimizer(stage).init(params),
        step=zero[0],
        lr_scale=jnp.ones((), jnp.float32),
        bad_in_row=zero[1],
        bad_total=zero[2],
        norm_mean=jnp.zeros((), jnp.float32),
        carry=carry,
        average=copied() if stage.ema_decay > 0 else None,
    )


def _deal(x: jax.Array, parts: int, axis: int = 0) -> jax.Array:
    """[.., rows, ..] as [parts, .., rows / parts, ..]: rows are dealt out in turn, so that every device contributes to
    every micro-batch from the rows it holds.
    """
    x = x.reshape(*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis + 1, 0)


def _collect(x: jax.Array, axis: int = 0) -> jax.Array:
    """Inverse of :func:`_deal`."""
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _accumulate(loss_fn: LossFn, trainable, frozen, batch: Batch, inputs: StepInputs, grad_accum: int):
    """(gradients of the summed loss, Sums, what the rows leave) of a batch, in ``grad_accum`` micro-batches."""

    def loss(params, micro, micro_inputs):
        sums, leaving = loss_fn(optim.merge(params, frozen), micro, micro_inputs)
        return sums.loss, (sums, leaving)

    def gradient(micro, entry, index):
        assert inputs.key is not None  # only validation has none
        own = inputs._replace(key=jax.random.fold_in(inputs.key, index), entry=entry)
        gradients, (sums, leaving) = jax.grad(loss, has_aux=True)(trainable, micro, own)
        return (gradients, sums), leaving

    entry = inputs.entry
    if grad_accum == 1:
        (gradients, sums), leaving = gradient(batch, entry, 0)
        return gradients, sums, leaving

    micros = {name: _deal(x, grad_accum) for name, x in cast(dict[str, jax.Array], batch).items()}
    if entry is not None:
        carry = state_passing.by_row(lambda x, axis: _deal(x, grad_accum, axis), entry.carry)
        entry = state_passing.Entry(carry, _deal(entry.keep, grad_accum))

    def body(total, item):
        one, leaving = gradient(*item)
        return jax.tree.map(jnp.add, total, one), leaving

    items = (micros, entry, jnp.arange(grad_accum))
    shapes = jax.eval_shape(lambda items: gradient(*jax.tree.map(lambda x: x[0], items))[0], items)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (gradients, sums), leaving = jax.lax.scan(body, zeros, items)
    if leaving is not None:
        leaving = state_passing.by_row(_collect, leaving)
    return gradients, sums, leaving


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
        inputs = StepInputs(key, jnp.minimum(state.step / max(steps, 1), 1.0).astype(jnp.float32))
        if state.carry is not None:
            entry_key = jax.random.fold_in(key, _ENTRY_STREAM)
            inputs = inputs._replace(entry=state_passing.enter(state.carry, batch, entry_key, stage))
        gradients, sums, leaving = _accumulate(loss_fn, state.params, frozen, batch, inputs, stage.grad_accum)
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
        carry, average = state.carry, state.average
        if leaving is not None:  # the rows of a bad step may hold anything
            carry = jax.tree.map(lambda new, old: jnp.where(good, new, old), leaving, carry)
        if average is not None:
            # The decay grows with the steps, so that the start does not weigh on a short stage.
            decay = jnp.minimum(stage.ema_decay, (1.0 + seen) / (10.0 + seen))
            average = jax.tree.map(lambda a, p: jnp.where(good, decay * a + (1 - decay) * p, a), average, params)
        bad = (~good).astype(jnp.int32)
        new = TrainState(
            params=params,
            opt_state=opt_state,
            step=state.step + 1,
            lr_scale=state.lr_scale,
            bad_in_row=(state.bad_in_row + 1) * bad,
            bad_total=state.bad_total + bad,
            norm_mean=jnp.where(good, state.norm_mean + change, state.norm_mean),
            carry=carry,
            average=average,
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
        return loss_fn(optim.merge(trainable, frozen), batch, StepInputs())[0]

    return step


def validation(eval_step, frozen, batches: list[Batch]) -> Callable[[optim.Params], dict[str, Any]]:
    """Token-weighted mean loss and metrics over all ``batches``, as a function of the trainables, which raises a
    ``UserError`` where no token has a weight: a loss of 0 would pass for the best."""

    def evaluate(trainable: optim.Params) -> dict[str, Any]:
        total: Sums | None = None
        for batch in batches:
            sums = jax.device_get(eval_step(trainable, frozen, batch))
            total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        if total is None:
            return {}
        if not total.weight > 0:
            raise UserError(
                "validation: no token of its samples has a loss weight (answers cut off, or weights of 0); look at the stage's data, "
                "seq_length and validation_length"
            )
        return {name: jax.device_get(value) for name, value in _quotients(total).items()}

    return evaluate
