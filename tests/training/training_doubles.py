"""Test doubles: a linear model, and an endless deterministic stream of batches with a state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lawcat_jax.config import CheckpointConfig, LogConfig, StageConfig
from lawcat_jax.training import optim
from lawcat_jax.training.checkpoint import Checkpointer
from lawcat_jax.training.loop import Loop, StageRun, StopSignal
from lawcat_jax.training.metrics import MetricsWriter
from lawcat_jax.training.step import StepInputs, Sums, init_state, make_eval_step, make_train_step, validation

STEPS = 12


def params() -> dict:
    """Two trainables (one of the gate), one frozen; paths as in the real tree."""
    rng = np.random.default_rng(0)
    return {
        "mixers": {
            "conv_q": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
            "gate_up": {"bias": jnp.zeros((3,), jnp.float32)},
        },
        "layers": {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.bfloat16)},
    }


def loss_fn(params: dict, batch: dict, inputs: StepInputs) -> tuple[Sums, None]:
    """Weighted squared error of a linear model, with multiplicative noise when there is a key (like dropout)."""
    x = batch["x"]
    if inputs.key is not None:
        x = x * (1 + 0.1 * jax.random.normal(inputs.key, x.shape))
    mixers = params["mixers"]
    y = x @ params["layers"]["kernel"].astype(jnp.float32) @ mixers["conv_q"] + mixers["gate_up"]["bias"]
    error = jnp.sum(jnp.square(y - batch["y"]), axis=-1)
    weights = batch["w"]
    metrics = {"mean_error": (jnp.sum(error), jnp.float32(error.size))}
    return Sums(jnp.sum(weights * error), jnp.sum(weights), metrics), None


def make_batch(index: int, rows: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1000 + index)
    return {
        "x": rng.normal(size=(rows, 5)).astype(np.float32),
        "y": rng.normal(size=(rows, 3)).astype(np.float32),
        "w": rng.integers(0, 5, size=rows).astype(np.float32),
    }


class Batches:
    """Endless; ``poison`` names indices whose targets are NaN, ``spikes`` those whose targets are huge."""

    def __init__(self, poison: tuple[int, ...] = (), limit: int | None = None, spikes: tuple[int, ...] = ()):
        self.index, self._poison, self._limit, self._spikes = 0, poison, limit, spikes

    def __next__(self) -> dict[str, np.ndarray]:
        if self._limit is not None and self.index >= self._limit:
            raise StopIteration
        batch = make_batch(self.index)
        if self.index in self._poison:
            batch["y"][:] = np.nan
        if self.index in self._spikes:
            batch["y"] *= 1000
        self.index += 1
        return batch

    def get_state(self) -> dict:
        return {"index": self.index}

    def set_state(self, state: dict) -> None:
        self.index = state["index"]


@dataclasses.dataclass
class Run:
    """One stage over the doubles; keep it to look at state and compile counts afterwards."""

    workdir: Path
    config: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(learning_rate=0.05, trainable=("^mixers/",), grad_accum=2, eval_every=4)
    )
    steps: int = STEPS
    every_steps: int = 5
    every_minutes: float = 0.0
    keep: int = 2
    spikes: tuple[int, ...] = ()
    poison: tuple[int, ...] = ()
    limit: int | None = None
    max_bad_steps: int = 3
    stop_after: int | None = None  # behaves as if SIGTERM came during this step
    name: str = "stage1"
    losses: list[float] | None = None  # validation losses to report instead of real ones
    progress: str = "off"
    options: dict = dataclasses.field(default_factory=dict)  # of Loop

    def __post_init__(self) -> None:
        trainable, self.frozen = optim.split(params(), self.config.trainable, "trainable")
        self.train_step = _TRAIN_STEPS.setdefault(
            repr((self.config, self.steps)),
            jax.jit(make_train_step(loss_fn, self.config, self.steps), donate_argnums=0),
        )
        evaluate = validation(_EVAL_STEP, self.frozen, [make_batch(-1), make_batch(-2)])
        self.batches = Batches(self.poison, self.limit, self.spikes)
        self.stop = StopSignal()
        key = jax.random.key(7)
        scripted = iter(self.losses or [])

        def step(state, batch):
            if self.stop_after is not None and self.batches.index == self.stop_after:
                self.stop.received = 15
            return self.train_step(state, self.frozen, batch, key)

        self.stage = StageRun(
            name=self.name,
            config=self.config,
            steps=self.steps,
            state=jax.device_put(init_state(trainable, self.config), jax.devices()[0]),
            train_step=step,
            evaluate=(lambda params: {"loss": np.float32(next(scripted))}) if self.losses else evaluate,
            batches=self.batches,
            tokens=lambda batch: len(batch["x"]),
        )

    @property
    def directory(self) -> Path:
        return self.workdir / "checkpoints" / self.name

    def go(self) -> dict:
        log = LogConfig(every_steps=1, tensorboard=False, progress=self.progress)
        writer = MetricsWriter(self.workdir, log)
        checkpointer = Checkpointer(str(self.directory), keep=self.keep)
        try:
            self.loop = Loop(
                self.stage,
                checkpointer=checkpointer,
                checkpoint_config=CheckpointConfig(
                    every_steps=self.every_steps, every_minutes=self.every_minutes, keep=self.keep
                ),
                writer=writer,
                log=log,
                workdir=self.workdir,
                max_bad_steps=self.max_bad_steps,
                **self.options,
            )
            return jax.device_get(self.loop.run(self.stop))
        finally:
            checkpointer.close()
            writer.close()


_TRAIN_STEPS: dict = {}  # shared between runs, so that a test compiles once
_EVAL_STEP = jax.jit(make_eval_step(loss_fn))
