"""``--config.dry_run=True``: check everything about a run that can be checked without its weights."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lawcat_jax import models
from lawcat_jax.checkpoints import model_dir
from lawcat_jax.checkpoints.model_dir import OpenedCheckpoint
from lawcat_jax.config import Config, ModelConfig, StageConfig
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.tasks.runner import check_settings
from lawcat_jax.training import inputs, optim, stages


def dry_run(config: Config, mesh: Mesh) -> int:
    """Check config, shapes, data and memory of every stage, and print what was found; returns the exit code 0.

    Each stage's real train step is compiled for the devices at hand, without allocating its arguments.

    Raises:
      ConfigError, UserError: what would stop the real run.
    """
    opened, declared = inputs.teacher_at_hand(config), config.teacher.architecture
    model, unchecked = inputs.architecture(config) if opened is None else opened.model, []
    if opened is not None:
        where = "read from its files" + (", as declared in the config" if declared is not None else "")
    elif config.pretrain.enabled:
        where = "to be trained, as declared in the config"
    else:
        where = "not on this machine; as declared in the config"
        unchecked.append(f"the teacher (there is no {config.teacher.source} on this machine)")
    sharding.check_mesh(config, model, mesh)
    dtype = model_dir.resolve_dtype(config.teacher.dtype)
    devices = math.prod(mesh.shape.values())
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"devices: {devices} x {mesh.devices.flat[0].device_kind}, mesh {shape}")
    print(f"teacher: {config.teacher.source} ({where}), {_millions(models.abstract(model)[1])}, {dtype} when frozen")
    tokenizer = _tokenizer(config, model, opened)
    if tokenizer is None:
        unchecked.append("the tokenizer, the data and the evaluation")
    elif config.eval.enabled:
        check_settings(config.eval, tokenizer)
    rows = {} if tokenizer is None else inputs.rows_of_a_pass(config, lambda: tokenizer)
    for name, stage in config.stages():
        built = stages.build(name, config, model, mesh, dtype=dtype, rows=rows.get(name))
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
    print(
        f"dry run: no mistake found; not checked: {'; '.join(unchecked)}" if unchecked else "dry run: all checks passed"
    )
    return 0


def _tokenizer(config: Config, model: ModelConfig, opened: OpenedCheckpoint | None) -> Tokenizer | None:
    """The tokenizer, or None when it is on a hub that cannot be reached, or with a teacher that is not here."""
    path = config.teacher.tokenizer or (opened.tokenizer_path if opened is not None else config.teacher.source)
    if path is None:
        raise UserError(f"{config.teacher.source} has no tokenizer; name one with config.teacher.tokenizer")
    try:
        return inputs.checked_tokenizer(path, model)
    except UserError as problem:
        own = config.teacher.tokenizer is None
        if (own and opened is not None) or (not own and not model_dir.is_remote(path)):
            raise
        print(f"tokenizer: not available here ({problem}); the data is not checked")
        return None


def _data(stage: StageConfig, tokenizer: Tokenizer | None, seed: int, model: ModelConfig, mesh: Mesh) -> str:
    if tokenizer is None:
        return f"{stage.data.kind}, not checked (no tokenizer)"
    started = time.monotonic()
    batch = next(inputs.training_batches(stage, tokenizer, seed, mesh))
    seconds = time.monotonic() - started
    top = int(batch["tokens"].max())
    if top >= model.vocab_size:
        raise UserError(f"the data has token {top}, the model knows tokens below {model.vocab_size}")
    corpus = "" if stage.data.pieces else f"\n  corpus: {inputs.training_rows(stage, tokenizer, seed).described()}"
    weighted = float((batch["loss_weights"] > 0).sum(axis=1).mean())
    return (
        f"{stage.data.kind}, first batch in {seconds:.1f} s, {batch['lengths'].min()} to {batch['lengths'].max()} "
        f"tokens a row, {weighted:.1f} of them in the loss of stage 2{corpus}"
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
