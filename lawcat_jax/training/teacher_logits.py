"""The teacher's largest logits on what stage 2 reads, written to a folder for runs that then need no teacher."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lawcat_jax import models
from lawcat_jax.config import Config, StageConfig
from lawcat_jax.data.pipeline import Samples
from lawcat_jax.data.teacher_store import Kept, StoreWriter, kept_positions
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import distributed, sharding
from lawcat_jax.training import inputs
from lawcat_jax.training.finetune import in_chunks

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_REPORT_SECONDS = 10.0


def write_teacher_logits(config: Config, target: str, k: int) -> None:
    """Write the logits of ``config.teacher`` on all rows of ``config.stage2``, of the training and the validation split.

    Finished shards of an interrupted attempt stay, and the rest is added.

    Args:
      config: a run's configuration; of stage 2 what it reads, its lengths, ``batch_size``, ``grad_accum`` (how many rows
        at once) and ``loss_chunk`` count.
      target: the folder.
      k: logits to keep of each position.

    Raises:
      UserError: no stage 2, data without fixed rows, k beyond the vocabulary, a folder with something else in it.
    """
    config.validate()
    stage = config.stage2
    if not target:
        raise UserError("--target is missing: the folder to write")
    if not stage.enabled or stage.data.pieces:
        raise UserError("the logits are of the rows of stage 2: it must be enabled, and data.pieces 0")
    distributed.initialize(config.mesh.distributed, heartbeat_seconds=config.mesh.heartbeat_seconds)
    if jax.process_count() > 1:
        raise UserError("one process writes the logits; start the command once, on a machine that holds the teacher")
    mesh = sharding.make_mesh(config.mesh, rows=sharding.common_rows(config))
    sharding.check_batch(stage.batch_size, stage.grad_accum, mesh, "config.stage2")
    opened = inputs.open_teacher(config)
    model = opened.model
    if not 1 <= k <= model.vocab_size:
        raise UserError(f"--k={k}: the vocabulary has {model.vocab_size} tokens; choose 1 to that")
    lengths = {"train": stage.seq_length, "validation": stage.validation_length or stage.seq_length}
    if stage.data.validation_samples == 0:
        del lengths["validation"]
    if max(lengths.values()) > model.max_position_embeddings:
        raise UserError(
            f"config.stage2: {max(lengths.values())} tokens do not fit the teacher, which has "
            f"{model.max_position_embeddings} positions"
        )
    student = inputs.load_student(config, mesh, opened)
    samples = {
        split: Samples(stage.data, student.tokenizer, seq_length=length, seed=config.seed, split=split)
        for split, length in lengths.items()
    }
    writer = StoreWriter(
        target,
        k=k,
        vocab_size=model.vocab_size,
        rows={split: len(rows) for split, rows in samples.items()},
        facts=inputs.store_facts(stage, student, config.seed),
    )
    base = {name: value for name, value in student.params.items() if name not in ("mixers", "lora")}
    graphdef, _ = models.abstract(model, dtype=student.dtype)
    largest = jax.jit(
        sharding.on_mesh(functools.partial(_largest, graphdef, k, stage.loss_chunk, stage.unroll_layers), mesh)
    )
    said = time.monotonic()
    for split, rows in samples.items():
        missing = writer.missing(split, len(rows))
        for shard in missing:
            held = [rows[index] for index in shard]
            writer.write(split, shard.start, held, _kept(functools.partial(largest, base), held, stage, mesh))
            if time.monotonic() - said > _REPORT_SECONDS or shard is missing[-1]:
                said = time.monotonic()
                print(f"{split}: {shard.stop} of {len(rows)} rows", file=sys.stderr, flush=True)
    print(
        f"wrote {target}: the {k} largest of {model.vocab_size} logits; config.stage2.teacher_logits={target} reads it"
    )


def _kept(largest: Any, rows: list[dict[str, np.ndarray]], stage: StageConfig, mesh: Mesh) -> list[Kept]:
    """What is kept of each row; the device takes as many at once as in a micro-batch of the stage."""
    size, found = stage.batch_size // stage.grad_accum, []
    names = [name for name in ("tokens", "lengths", "segment_ids") if name in rows[0]]
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        filled = some + some[-1:] * (size - len(some))  # one shape, one program
        batch = {name: np.stack([row[name] for row in filled]) for name in names}
        arrays = jax.device_get(largest(sharding.place_batch(batch, mesh)))
        for number, row in enumerate(some):
            places = kept_positions(row)
            found.append(Kept(*(array[number][places] for array in arrays)))
    return found


def _largest(
    graphdef: Any, k: int, chunk: int, unroll_layers: bool, base: dict[str, Any], batch: Mapping[str, Array]
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], Float[Array, "B T"]]:
    """(ids, logits, log-sum-exp of all others) at every position; ``chunk`` tokens' logits exist at once, 0 is all."""
    decoder, tokens = models.bind(graphdef, base), batch["tokens"]
    options = {"lengths": batch["lengths"], "segment_ids": batch.get("segment_ids"), "unroll_layers": unroll_layers}
    hidden = decoder(tokens, as_teacher=True, return_hidden=True, **options)
    kernel, length = decoder.head_kernel(), tokens.shape[1]

    def one(hidden: Array) -> tuple[Array, Array, Array]:
        logits = decoder.head(hidden, kernel)
        values, ids = jax.lax.top_k(logits, k)
        kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), ids, True, axis=-1, inplace=False)
        return ids, values, jax.nn.logsumexp(jnp.where(kept, -jnp.inf, logits), axis=-1)

    found = jax.lax.map(one, in_chunks(hidden, length, min(chunk or length, length)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(len(tokens), -1, *x.shape[3:])[:, :length], found)
