"""The jitted steps of a stage, built from a configuration. Shapes suffice for that, so a dry run needs no weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.common import platform_name
from kernels_pallas.dispatch import platform_of
from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, Config, LoraConfig, ModelConfig, StageConfig
from lawcat_jax.data.batch import batch_shapes
from lawcat_jax.data.pipeline import optional_arrays
from lawcat_jax.data.teacher_store import ARRAYS, stored_count
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.training import attention_transfer, finetune, optim, pretrain, state_passing
from lawcat_jax.training.step import LossFn, TrainState, init_state, make_eval_step, make_train_step

LOSSES: dict[str, Callable[[Any, StageConfig], LossFn]] = {
    "pretrain": pretrain.make_loss,
    "stage1": attention_transfer.make_loss,
    "stage2": finetune.make_loss,
}
# Fixed numbers, so that the random streams of a stage do not depend on which other stages run.
STREAMS = {"pretrain": 0, "stage1": 1, "stage2": 2}


@dataclasses.dataclass
class Stage:
    """One stage, ready to run. ``state`` and ``frozen`` are the shapes (with shardings) that the steps take."""

    name: str
    config: StageConfig
    steps: int
    graphdef: Any
    state: TrainState
    frozen: optim.Params
    batch: dict[str, jax.ShapeDtypeStruct]
    train_step: Any  # jitted (state [donated], frozen, batch, stage_key) -> (state, metrics)
    eval_step: Any  # jitted (trainable, frozen, batch) -> Sums
    mesh: Mesh

    def key(self, seed: int) -> jax.Array:
        """The random key from which the keys of the stage's steps are derived."""
        # Computed on every device: an array of one process cannot be put on the devices of others.
        make = jax.jit(jax.random.fold_in, out_shardings=sharding.replicated(self.mesh))
        return make(jax.random.key(seed), STREAMS[self.name])

    def split(self, params: optim.Params) -> tuple[TrainState, optim.Params]:
        """(state before the first step, frozen parameters) on the mesh; ``params`` may have more than is needed."""
        params = {name: value for name, value in params.items() if name in self._parts()}
        trainable, frozen = optim.split(params, self.config.trainable, f"config.{self.name}.trainable")

        def start(tree: optim.Params) -> TrainState:
            # No row has a past before the first step.
            carry = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.state.carry)
            return init_state(tree, self.config, carry)

        make = jax.jit(start, out_shardings=_shardings_of(self.state))
        return make(trainable), place(frozen, self.mesh)

    def _parts(self) -> set[str]:
        return set(self.state.params) | set(self.frozen)

    def diagnostics(self, frozen: optim.Params, batch: Any) -> Callable[[optim.Params], dict[str, Any]] | None:
        """The decoder's own statistics (gates, denominators, ...) on ``batch``, as a function of the trainables that
        gives ``diagnostics/<name>`` -> values; None for pretraining, whose decoder has none.
        """
        if self.name == "pretrain":
            return None

        @functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))
        def statistics(trainable, frozen, batch):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                decoder = models.bind(self.graphdef, optim.merge(trainable, frozen))
                return decoder.diagnostics(
                    batch["tokens"], lengths=batch["lengths"], segment_ids=batch.get("segment_ids")
                )

        def diagnose(trainable: optim.Params) -> dict[str, Any]:
            values = jax.tree_util.tree_leaves_with_path(jax.device_get(statistics(trainable, frozen, batch)))
            return {f"diagnostics/{sharding.path_name(path)}": value for path, value in values}

        return diagnose

    def merged(self, trainable: optim.Params, params: optim.Params) -> optim.Params:
        """``params`` with the stage's result in it."""
        return optim.unflatten(optim.flatten(params) | optim.flatten(trainable))


def stage_steps(stage: StageConfig, rows: int | None = None) -> int:
    """Optimizer steps of a stage, a pass over whose data has ``rows`` rows (None: ``data.num_samples``)."""
    return stage.steps or int(stage.epochs * (rows or stage.data.num_samples) / stage.batch_size)


def architecture(name: str, config: Config) -> tuple[AttentionConfig | None, LoraConfig | None]:
    """What the decoder of a stage has beyond the teacher: nothing (pretrain), mixers (stage 1), or mixers and LoRA."""
    if name == "pretrain":
        return None, None
    return config.attention, config.lora if name == "stage2" else None


def build(
    name: str, config: Config, model: ModelConfig, mesh: Mesh, *, dtype: Any = jnp.float32, rows: int | None = None
) -> Stage:
    """Shapes and jitted steps of stage ``name``.

    Args:
      name: of the stage.
      config, model: the experiment, and the architecture of its teacher.
      mesh: of devices.
      dtype: of frozen pretrained weights.
      rows: of a pass over its data, as :func:`lawcat_jax.training.inputs.rows_of_a_pass` finds them; None is
        ``data.num_samples``.

    Raises:
      UserError: a trainable pattern without parameters, a batch that does not split over the mesh, a model that
        cannot be (see :class:`lawcat_jax.models.Decoder`), or data that make no batch.
    """
    stage = getattr(config, name)
    sharding.check_batch(stage.batch_size, stage.grad_accum, mesh, f"config.{name}")
    needs_teacher = name != "stage2" or finetune.runs_teacher(stage)
    for field in ("seq_length", "validation_length"):
        if needs_teacher and getattr(stage, field) > model.max_position_embeddings:
            raise UserError(
                f"config.{name}.{field}: {getattr(stage, field)} does not fit the teacher, which has "
                f"{model.max_position_embeddings} positions"
            )
    if name != "pretrain" and isinstance(mesh, Mesh):  # an abstract one has no devices
        _check_implementation(config.attention.implementation, mesh)
    steps = stage_steps(stage, rows)
    if steps < 1:
        raise UserError(f"config.{name}.epochs: {stage.epochs} of {rows} sequences make no batch of {stage.batch_size}")
    attention, lora = architecture(name, config)
    graphdef, shapes = models.abstract(model, attention, lora, dtype=dtype)
    trainable, frozen = optim.split(shapes, stage.trainable, f"config.{name}.trainable")
    loss_fn = LOSSES[name](graphdef, stage)
    carry = _carry_shapes(graphdef, shapes, stage) if stage.state_passing != "off" else None
    state = jax.eval_shape(lambda tree, carry: init_state(tree, stage, carry), _real(trainable), carry)
    state = _with_shardings(state, mesh)
    frozen = _with_shardings(frozen, mesh)
    split, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    state_shardings, frozen_shardings = _shardings_of(state), _shardings_of(frozen)
    train_step = jax.jit(
        sharding.on_mesh(make_train_step(loss_fn, stage, steps), mesh),
        donate_argnums=0,
        in_shardings=(state_shardings, frozen_shardings, split, everywhere),
        out_shardings=(state_shardings, everywhere),  # as they came in: otherwise the second step compiles again
    )
    eval_step = jax.jit(
        sharding.on_mesh(make_eval_step(loss_fn), mesh),
        in_shardings=(state_shardings.params, frozen_shardings, split),
        out_shardings=everywhere,
    )
    batch = global_batch(stage, mesh)
    return Stage(name, stage, steps, graphdef, state, frozen, batch, train_step, eval_step, mesh)


def _check_implementation(implementation: str | None, mesh: Mesh) -> None:
    platform = platform_name(mesh.devices.flat[0].platform)
    if needed := platform_of(implementation, platform):
        raise UserError(
            f"config.attention.implementation: {implementation!r} runs on {needed}, and the devices of this run are {platform}; "
            "None takes the best one that there is"
        )


def _carry_shapes(graphdef: Any, shapes: optim.Params, stage: StageConfig) -> state_passing.Carry:
    """Shapes of what a step with state passing leaves to the next."""

    def carry(params: optim.Params) -> state_passing.Carry:
        recurrent = models.bind(graphdef, params).init_recurrent(stage.batch_size)
        return state_passing.empty(recurrent, jnp.zeros((stage.batch_size, stage.seq_length)), stage)

    return jax.eval_shape(carry, shapes)


def global_batch(stage: StageConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batch of one step over all processes, with its rows split over the mesh."""
    rows = sharding.batch_sharding(mesh)
    optional, kept = optional_arrays(stage.data), 0
    if stage.teacher_logits:
        optional, kept = (*optional, *ARRAYS), stored_count(stage.teacher_logits)
    shapes = batch_shapes(stage.batch_size, stage.seq_length, optional, kept_logits=kept)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in shapes.items()}


def place(params: optim.Params, mesh: Mesh) -> optim.Params:
    """Arrays (host or device) on the mesh, split as the table in :mod:`lawcat_jax.runtime.sharding` says."""
    return jax.tree.map(jax.device_put, params, sharding.shardings(params, mesh))


def _real(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _with_shardings(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding.shardings(tree, mesh)
    )


def _shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
