"""``--config.dry_run=True``: check everything about a run that can be checked without its weights."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lawcat_jax import models
from lawcat_jax.checkpoints import model_dir
from lawcat_jax.config import Config, ModelConfig, StageConfig
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.training import inputs, optim, stages


def dry_run(config: Config, mesh: Mesh) -> int:
    """Check config, shapes, data and memory of every stage, and print what was found; returns the exit code 0.

    Each stage's real train step is compiled for the devices at hand, without allocating its arguments.

    Raises:
      ConfigError, UserError: what would stop the real run.
    """
    model, declared = inputs.architecture(config), config.teacher.architecture is not None
    sharding.check_mesh(config, model, mesh)
    where = "declared in the config; weights not looked at" if declared else "read from its config.json"
    dtype = model_dir.resolve_dtype(config.teacher.dtype)
    devices = math.prod(mesh.shape.values())
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"devices: {devices} x {mesh.devices.flat[0].device_kind}, mesh {shape}")
    print(f"teacher: {config.teacher.source} ({where}), {_millions(models.abstract(model)[1])}, {dtype} when frozen")
    tokenizer = _tokenizer(config, model)
    for name, stage in config.stages():
        built = stages.build(name, config, model, mesh, dtype=dtype)
        print(
            f"{name}: {built.steps} steps of {stage.batch_size} x {stage.seq_length} tokens, "
            f"{stage.grad_accum} micro-batch(es); trains {_millions(built.state.params)} of "
            f"{_millions(optim.merge(built.state.params, built.frozen))}"
        )
        print(f"  data: {_data(stage, tokenizer, config.seed, model, mesh)}")
        print(
            f"  bytes a device: frozen {_bytes(built.frozen)}, trainable {_bytes(built.state.params)}, "
            f"optimizer {_bytes(built.state.opt_state)}, batch {_bytes(built.batch)}"
        )
        print(f"  compiled step: {_compiled(built)}", flush=True)
    print("dry run: all checks passed")
    return 0


def _tokenizer(config: Config, model: ModelConfig) -> Tokenizer | None:
    """The tokenizer, or None when it is on a hub that cannot be reached."""
    path = config.teacher.tokenizer or config.teacher.source
    local = _is_local(path)
    try:
        if local and config.teacher.tokenizer is None:
            found = model_dir.open_checkpoint(path, config.teacher.revision, config.teacher.base).tokenizer_path
            if found is None:
                raise UserError(f"{path} has no tokenizer; name one with config.teacher.tokenizer")
            path = found
        return inputs.checked_tokenizer(path, model)
    except UserError as problem:
        if local:
            raise
        print(f"tokenizer: not available here ({problem}); the data is not checked")
        return None


def _is_local(path: str) -> bool:
    return path.startswith(("asset:", "package:")) or Path(path).exists()


def _data(stage: StageConfig, tokenizer: Tokenizer | None, seed: int, model: ModelConfig, mesh: Mesh) -> str:
    if tokenizer is None:
        return f"{stage.data.kind}, not checked (no tokenizer)"
    started = time.monotonic()
    batch = next(inputs.training_batches(stage, tokenizer, seed, mesh))
    seconds = time.monotonic() - started
    top = int(batch["tokens"].max())
    if top >= model.vocab_size:
        raise UserError(f"the data has token {top}, the model knows tokens below {model.vocab_size}")
    weighted = float((batch["loss_weights"] > 0).sum(axis=1).mean())
    return (
        f"{stage.data.kind}, first batch in {seconds:.1f} s, {batch['lengths'].min()} to {batch['lengths'].max()} "
        f"tokens a row, {weighted:.1f} of them in the loss of stage 2"
    )


def _compiled(built: stages.Stage) -> str:
    key = jax.eval_shape(lambda: jax.random.key(0))
    started = time.monotonic()
    compiled = built.train_step.lower(built.state, built.frozen, built.batch, key).compile()
    text = f"compiled in {time.monotonic() - started:.1f} s"
    memory = compiled.memory_analysis()
    if memory is not None:
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        text += (
            f"; arguments {_human(memory.argument_size_in_bytes)}, temporaries {_human(memory.temp_size_in_bytes)}, "
            f"together {_human(total)} a device"
        )
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit:
            text += f" of {_human(limit)}" + (" (TOO MUCH)" if total > limit else "")
    return text


def _millions(tree: Any) -> str:
    return f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) / 1e6:,.2f} M parameters"


def _bytes(tree: Any) -> str:
    """Size of what one device holds of a tree."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * np.dtype(leaf.dtype).itemsize
    return _human(total)


def _human(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    raise AssertionError
