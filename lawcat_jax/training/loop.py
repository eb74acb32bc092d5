"""The training loop: steps, metrics, validation, checkpoints, signals. It knows neither data nor models."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from lawcat_jax.config import CheckpointConfig, LogConfig, StageConfig
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import distributed
from lawcat_jax.training import checkpoint as checkpointing
from lawcat_jax.training.identity import refuse_another
from lawcat_jax.training.metrics import MetricsWriter, Progress
from lawcat_jax.training.optim import Params, Plateau
from lawcat_jax.training.state_passing import Carry
from lawcat_jax.training.step import TrainState

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the command again


class InterruptedRunError(Exception):
    """SIGTERM or SIGINT came; the step was finished and saved."""


class TrainingError(UserError):
    """Training cannot go on."""


@dataclasses.dataclass
class StageRun:
    """What the loop drives: one stage, as functions of its state.

    ``train_step(state, batch) -> (state, metrics)`` takes the host's batch and donates the state;
    ``evaluate(params) -> {"loss": ..., ...}`` or None; ``batches`` has ``__next__``, ``get_state`` (JSON values) and
    ``set_state``; ``tokens(batch)`` counts the tokens of a batch over all processes; ``diagnose(params)`` gives numbers
    to log about the result; ``utilization`` maps tokens per second to the model FLOPs utilisation, or None if unknown.
    """

    name: str
    config: StageConfig
    steps: int
    state: TrainState
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Params], dict[str, Any]] | None
    batches: Any
    tokens: Callable[[Any], int]
    diagnose: Callable[[Params], dict[str, Any]] | None = None
    utilization: Callable[[float], float | None] | None = None


class StopSignal:
    """Notes SIGTERM and SIGINT while training; a second SIGINT interrupts at once.

    With several processes, jax's preemption service agrees on the step at which all of them stop.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            # With several processes SIGTERM belongs to jax's coordination service.
            signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
            self._old = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if jax.process_count() > 1:  # jax's coordination service notes SIGTERM only
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after ``step``, the same answer in every process."""
        if jax.process_count() == 1:
            return self.received is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


def _on_disk(state: TrainState) -> dict[str, Any]:
    return {
        "params": state.params,
        "optimizer": serialization.to_state_dict(state.opt_state),
        **{name: getattr(state, name) for name in ("step", "lr_scale", "bad_in_row", "bad_total", "norm_mean")},
        **({} if state.carry is None else {"carry": state.carry.as_dict()}),
        **({} if state.average is None else {"average": state.average}),
    }


def _from_disk(values: dict[str, Any], like: TrainState) -> TrainState:
    optimizer = serialization.from_state_dict(like.opt_state, values["optimizer"])
    carry = Carry.from_dict(values["carry"]) if "carry" in values else None
    values = {"average": None, **values, "opt_state": optimizer, "carry": carry}
    return TrainState(**{name: values[name] for name in TrainState._fields})


@jax.jit
def _finite(params: Params) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]).all()


def _all_finite(params: Params) -> bool:
    return bool(_finite(params))


def _in_words(summary: dict[str, Any]) -> str:
    text = f"finished {summary['steps']} steps, {summary['bad_steps']} of them bad"
    loss = summary["validation_loss"]
    if loss is not None:
        text += f"; kept the parameters of step {summary['kept_step']}, validation loss {float(loss):.4f}"
    return text


class Loop:
    """Runs one stage from wherever its checkpoints left it. Use :meth:`run` once.

    ``identity`` (see :mod:`lawcat_jax.training.identity`) is saved with every checkpoint; one of another run is refused.
    With ``only_finished`` a stage that its checkpoints do not show as finished is an error instead of being trained.
    ``begun()`` is called when a checkpoint has been restored or the first step is done.
    """

    def __init__(
        self,
        stage: StageRun,
        *,
        checkpointer: checkpointing.Checkpointer,
        checkpoint_config: CheckpointConfig,
        writer: MetricsWriter,
        log: LogConfig,
        workdir: Path,
        max_bad_steps: int,
        identity: dict[str, Any] | None = None,
        only_finished: bool = False,
        begun: Callable[[], None] = lambda: None,
    ):
        self._identity, self._only_finished, self._begun = identity, only_finished, begun
        self._stage, self._config = stage, stage.config
        self._checkpointer, self._checkpoint_config = checkpointer, checkpoint_config
        self._writer, self._log, self._workdir = writer, log, workdir
        self._max_bad = max_bad_steps
        self._state = stage.state
        self._best: Params | None = None
        self._best_loss, self._best_step = math.inf, 0
        self._last_loss: float | None = None  # of the newest validation
        self._plateau = Plateau.of(stage.config)
        self._step = 0
        self._finished = False
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._last_save = time.monotonic()
        self._window: tuple[float, int] | None = None  # (start, tokens) of the interval being timed

    def run(self, stop: StopSignal) -> Params:
        """Train to the last step; returns the trained parameters (with ``keep_best`` those of the best validation loss).

        Raises:
          InterruptedRunError: a signal came; everything is saved.
          TrainingError: too many bad steps in a row, or the data ended, or the stage learned nothing: more than half of its
            steps were bad, or its last validation loss or its parameters are not finite.
          UserError: checkpoints that do not load, cannot be written or belong to another run.
        """
        self._restore()
        stage = self._stage
        primary = distributed.is_primary()
        if self._only_finished and not self._finished:
            raise UserError(
                f"the run is marked as finished, but its result is missing and so is the last checkpoint of "
                f"{stage.name}; restore either from a backup, or train anew in another --workdir"
            )
        if self._finished:
            if primary:
                print(f"{stage.name}: already finished at step {self._step}", flush=True)
            return self._result()
        self._writer.rewind(stage.name, self._step)
        progress = self._progress = Progress(
            stage.name, stage.steps, self._step, self._log.progress, primary=primary, every=self._log.every_steps
        )
        progress.say(f"{stage.name}: compiling" if self._step else f"{stage.name}: {stage.steps} steps, compiling")
        try:
            while self._step < stage.steps:
                with self._profiled():
                    self._one_step()
                if self._due(self._config.eval_every) and self._step < stage.steps:
                    self._validate()
                if self._save_due():
                    self._save()
                stopping = stop.requested(self._step)
                if stopping and self._step < stage.steps:
                    if self._checkpointer.last_saved != self._step:
                        self._save()
                    self._checkpointer.wait()
                    raise InterruptedRunError(f"{stage.name}: interrupted, saved at step {self._step}")
            self._validate()
            self._refuse_nothing_learned()
            if stage.diagnose is not None:
                self._writer.write(stage.name, self._step, stage.diagnose(self._result()))
            self._finished = True
            self._save()
            self._checkpointer.wait()
            if primary:
                print(f"{stage.name}: {_in_words(self.summary)}", flush=True)
            if stop.received is not None and jax.process_count() == 1:
                raise InterruptedRunError(f"{stage.name}: interrupted, finished at step {self._step}")
        finally:
            progress.close()
        return self._result()

    @property
    def summary(self) -> dict[str, Any]:
        """What became of the stage, as JSON values: ``steps``, ``bad_steps``, ``kept_step`` (whose parameters are the
        result) and ``validation_loss`` of these, None without a validation.
        """
        kept = (self._step, self._last_loss) if self._best is None else (self._best_step or None, self._best_loss)
        loss = kept[1] if kept[1] is None or math.isfinite(kept[1]) else repr(kept[1])
        bad = int(self._state.bad_total)
        return {"steps": self._step, "bad_steps": bad, "kept_step": kept[0], "validation_loss": loss}

    def _refuse_nothing_learned(self) -> None:
        stage, bad = self._stage, int(self._state.bad_total)
        what = None
        if 2 * bad > self._step:
            share = f"all {bad}" if bad >= self._step else "most"
            what = f"{share} steps were bad (loss or gradient not finite, or a spike), so little or nothing was learned"
        elif self._last_loss is not None and not math.isfinite(self._last_loss):
            what = f"the last validation loss is {self._last_loss}"
        elif not _all_finite(self._result()):
            what = "trained parameters are not finite"
        if what is not None:
            raise TrainingError(
                f"{stage.name}: {what} ({bad} of {self._step} steps bad); look at config.{stage.name}.learning_rate, the "
                "loss weights and the data, and use another --workdir"
            )

    def _one_step(self) -> None:
        stage = self._stage
        try:
            batch = next(stage.batches)
        except StopIteration:
            raise TrainingError(f"{stage.name}: the data ended at step {self._step} of {stage.steps}") from None
        started = time.monotonic()
        self._state, metrics = stage.train_step(self._state, batch)
        # Numbers are read one step late, so that the device works while the host prepares the next batch.
        self._flush()
        self._step += 1
        self._pending = (self._step, metrics)
        if self._window is None:  # the first step compiles: not part of tokens/s
            jax.block_until_ready(metrics)
            self._writer.write(stage.name, self._step, {"first_step_seconds": time.monotonic() - started})
            self._begun()
            self._window = (time.monotonic(), 0)
        else:
            self._window = (self._window[0], self._window[1] + stage.tokens(batch))

    def _flush(self) -> None:
        """Look at the numbers of the last step: log, count, stop."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        bad_in_row, loss = int(metrics["bad_in_row"]), float(metrics["loss"])
        logged = step % self._log.every_steps == 0 or step == self._stage.steps
        speed = 0.0
        if logged or bad_in_row:
            values = dict(jax.device_get(metrics))
            if self._window is not None and self._window[1]:
                speed = self._window[1] / max(time.monotonic() - self._window[0], 1e-9)
                values["tokens_per_second"] = speed
                if self._stage.utilization is not None:
                    values["mfu"] = self._stage.utilization(speed)
                self._window = (time.monotonic(), 0)
            stats = jax.local_devices()[0].memory_stats() or {}
            if "peak_bytes_in_use" in stats:
                values["peak_memory_bytes"] = stats["peak_bytes_in_use"]
            self._writer.write(self._stage.name, step, values)
            self._checkpointer.check()
        self._show(step, loss, speed)
        if bad_in_row:
            self._progress.say(f"{self._stage.name} {step}: {self._trouble(loss, metrics)}, step skipped")
        if bad_in_row >= self._max_bad:
            raise TrainingError(
                f"{self._stage.name}: {bad_in_row} bad steps in a row, the last at step {step} (loss {loss}, "
                f"{self._trouble(loss, metrics)}); lower the learning rate or set "
                f"config.{self._stage.name}.clip_norm=1.0 (the newest checkpoint is that of step "
                f"{self._checkpointer.last_saved})"
            )

    def _trouble(self, loss: float, metrics: dict[str, jax.Array]) -> str:
        norm = float(metrics["grad_norm"])
        if math.isfinite(loss) and math.isfinite(norm):
            return f"the gradient norm {norm:.3g} is a spike"
        return "loss or gradient is not finite"

    def _show(self, step: int, loss: float, speed: float) -> None:
        numbers = {"loss": f"{loss:.4f}"}
        if speed:
            self._speed = f"{speed:,.0f}"
        if getattr(self, "_speed", None):
            numbers["tok/s"] = self._speed
        if math.isfinite(self._best_loss):
            numbers["best_val"] = f"{self._best_loss:.4f}"
        self._progress.update(step, numbers)

    def _due(self, every: int) -> bool:
        return every > 0 and self._step % every == 0

    def _validate(self) -> None:
        self._flush()
        if self._stage.evaluate is None:
            return
        started = time.monotonic()
        values = self._stage.evaluate(self._state.evaluated)
        if not values:
            return
        loss = self._last_loss = float(values["loss"])
        self._writer.write(self._stage.name, self._step, {f"validation/{name}": v for name, v in values.items()})
        self._progress.say(f"{self._stage.name} {self._step}: validation loss {loss:.4f}")
        if loss < self._best_loss:
            self._best_loss, self._best_step = loss, self._step
            if self._config.keep_best:
                self._best = checkpointing.copy(self._state.evaluated)
        if self._config.schedule == "plateau":
            scale = np.float32(self._plateau.update(loss))
            self._state = self._state._replace(lr_scale=jax.device_put(scale, self._state.lr_scale.sharding))
        if self._window is not None:  # validation is no training time
            self._window = (self._window[0] + time.monotonic() - started, self._window[1])

    def _save_due(self) -> bool:
        minutes = self._checkpoint_config.every_minutes
        late = minutes > 0 and self._step % self._log.every_steps == 0
        late = late and distributed.agree(time.monotonic() - self._last_save >= 60 * minutes)
        return (late or self._due(self._checkpoint_config.every_steps)) and self._step < self._stage.steps

    def _save(self) -> None:
        self._flush()
        trees: dict[str, Any] = {"state": _on_disk(self._state)}
        if self._best is not None:
            trees["best"] = self._best
        meta = {
            "stage": self._stage.name,
            "finished": self._finished,
            "steps": self._stage.steps,
            "iterator": self._stage.batches.get_state(),
            "best_loss": self._best_loss if math.isfinite(self._best_loss) else None,
            "best_step": self._best_step,
            "last_loss": None if self._last_loss is None else repr(self._last_loss),
            "plateau": {"best": repr(self._plateau.best), "waited": self._plateau.waited, "scale": self._plateau.scale},
        }
        if self._identity is not None:
            meta["run"] = self._identity
        self._checkpointer.save(self._step, trees, meta)
        self._last_save = time.monotonic()

    def _restore(self) -> None:
        state = checkpointing.abstract(_on_disk(self._state))
        restored = self._checkpointer.restore({"state": state, "best": state["params"]}, self._accept)
        if restored is None:
            return
        self._state = _from_disk(restored.trees["state"], self._state)
        self._best = restored.trees.get("best")
        self._step = restored.step
        self._begun()
        if not self._finished and distributed.is_primary():
            print(f"{self._stage.name}: resumed at step {self._step} of {self._stage.steps}", flush=True)

    def _accept(self, meta: dict[str, Any]) -> None:
        """Take over what a checkpoint says beside its arrays; raises whatever its nonsense leads to.

        Raises:
          UserError: the checkpoint belongs to another run.
        """
        if meta["stage"] != self._stage.name:
            raise ValueError(f"it is one of {meta['stage']!r}")
        if self._identity is not None:
            refuse_another(meta.get("run"), self._identity, f"the checkpoint of {meta['stage']} at step {meta['step']}")
        if (steps := meta.get("steps", self._stage.steps)) != self._stage.steps:
            raise UserError(
                f"the checkpoint of {self._stage.name} at step {meta['step']} is of a stage of {steps} steps, which now has "
                f"{self._stage.steps}: its data is longer or shorter than it was; restore it, or use another --workdir"
            )
        finished, best, last = bool(meta["finished"]), meta["best_loss"], meta.get("last_loss")
        best_loss, plateau = math.inf if best is None else float(best), meta["plateau"]
        restored = float(plateau["best"]), int(plateau["waited"]), float(plateau["scale"])
        if not finished:
            self._stage.batches.set_state(meta["iterator"])
        self._finished, self._best_loss, self._best_step = finished, best_loss, int(meta.get("best_step", 0))
        self._last_loss = None if last is None else float(last)
        self._plateau.best, self._plateau.waited, self._plateau.scale = restored

    def _result(self) -> Params:
        return self._state.evaluated if self._best is None else self._best

    @contextlib.contextmanager
    def _profiled(self) -> Iterator[None]:
        """A profiler trace over the configured window of steps."""
        start, length = self._log.profile_start, self._log.profile_steps
        if start >= 0 and self._step == start:
            jax.profiler.start_trace(str(self._workdir / "profile" / self._stage.name))
        yield
        if start >= 0 and self._step == min(start + length, self._stage.steps) and self._step > start:
            jax.block_until_ready(self._state)
            jax.profiler.stop_trace()
