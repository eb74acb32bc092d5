"""What a stage trains, and how: path filters, AdamW, learning rate schedules, plateau detection."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from lawcat_jax.config import StageConfig
from lawcat_jax.errors import UserError

Params = dict[str, Any]

_GATE = re.compile(r"mixers/gate(_down|_up)?/")
_NO_DECAY = re.compile(r"(scale|bias)$")


def flatten(params: Params) -> dict[str, Any]:
    """Nested dict -> {'/'-joined path: leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Any]) -> Params:
    """Inverse of :func:`flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def split(params: Params, patterns: Sequence[str], where: str) -> tuple[Params, Params]:
    """(trainable, frozen): a parameter trains when one of ``patterns`` is found in its path.

    Raises:
      UserError: a pattern that is no regular expression, or that matches no parameter.
    """
    flat = flatten(params)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {path for path in flat if re.search(pattern, path)}
        except re.error as problem:
            raise UserError(f"{where}: {pattern!r} is not a regular expression ({problem})") from problem
        if not found:
            tops = sorted({"/".join(path.split("/")[:2]) for path in flat})
            raise UserError(f"{where}: {pattern!r} matches no parameter; there are {', '.join(tops)}")
        chosen |= found
    trainable = {path: value for path, value in flat.items() if path in chosen}
    frozen = {path: value for path, value in flat.items() if path not in chosen}
    return unflatten(trainable), unflatten(frozen)


def merge(trainable: Params, frozen: Params) -> Params:
    """Inverse of :func:`split`."""
    return unflatten(flatten(frozen) | flatten(trainable))


def warmup_steps(stage: StageConfig, steps: int) -> int:
    """Steps of the linear warm-up of a stage of ``steps`` steps."""
    return math.ceil(stage.warmup_fraction * steps) if stage.warmup_fraction > 0 else 0


def schedule(stage: StageConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate at 0-based ``step``: linear warm-up over ``warmup_fraction`` of ``steps``, then cosine to 0 or
    constant. The first step already learns (rate peak / warm-up steps). ``plateau`` is constant here: the loop
    lowers it by a factor (:class:`Plateau`).
    """
    warmup = warmup_steps(stage, steps)
    peak = stage.learning_rate

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = jnp.float32(peak)
        if stage.schedule == "cosine":
            progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            after = peak * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, peak * (step + 1) / max(warmup, 1), after)

    return rate


def lr_multiplier(stage: StageConfig, path: str) -> float:
    """Factor on the learning rate of the parameter at '/'-joined ``path``: the first of ``stage.lr_multipliers`` whose
    pattern is found in it, else ``gate_lr_multiplier`` for the gate's parameters, else 1.
    """
    for item in stage.lr_multipliers:
        pattern, _, factor = item.rpartition("=")
        if re.search(pattern, path):
            return float(factor)
    return stage.gate_lr_multiplier if _GATE.search(path) else 1.0


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """AdamW without the learning rate, which the train step applies (it depends on schedule and plateau).

    Clipping acts on the global norm of all trainables. Scales and biases do not decay.
    """

    def decays(params: Params) -> Params:
        return unflatten({path: not _NO_DECAY.search(path) for path in flatten(params)})

    def multiply(updates: Any, _: Any = None) -> Any:
        return unflatten({path: u * lr_multiplier(stage, path) for path, u in flatten(updates).items()})

    parts = [optax.scale_by_adam(b1=stage.b1, b2=stage.b2)]
    if stage.clip_norm > 0:
        parts.insert(0, optax.clip_by_global_norm(stage.clip_norm))
    if stage.weight_decay > 0:
        parts.append(optax.add_decayed_weights(stage.weight_decay, mask=decays))
    if stage.gate_lr_multiplier != 1.0 or stage.lr_multipliers:
        parts.append(optax.stateless(multiply))
    return optax.chain(*parts)


@dataclasses.dataclass
class Plateau:
    """Lowers the rate when the validation loss has not improved for ``patience`` evaluations."""

    factor: float
    patience: int
    best: float = math.inf
    waited: int = 0
    scale: float = 1.0

    def update(self, loss: float) -> float:
        """Take one validation loss, give the factor on the learning rate from here on."""
        if loss < self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
            if self.waited > self.patience:
                self.scale, self.waited = self.scale * self.factor, 0
        return self.scale
