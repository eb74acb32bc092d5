"""What a run starts from: the teacher, the student made of it, the tokenizer, and the batches of each stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import numpy as np
from jax.sharding import Mesh, NamedSharding

from lawcat_jax import models
from lawcat_jax.checkpoints import model_dir
from lawcat_jax.checkpoints.model_dir import OpenedCheckpoint, open_checkpoint
from lawcat_jax.config import Config, ModelConfig, StageConfig, to_dict
from lawcat_jax.data.batch import Batch
from lawcat_jax.data.pipeline import make_dataset
from lawcat_jax.data.tokenize import Tokenizer, fit_embedding, load_tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.training import optim, stages


@dataclasses.dataclass
class Student:
    """The model that the stages train, with all its parameters on the mesh.

    ``params`` holds every part: the pretrained one, mixers, and adapters where stage 2 runs. When a run pretrains it
    is the future teacher, which has the first part only. ``tokenizer_path`` is a directory, an asset or a hub id;
    ``dtype`` that of frozen pretrained weights.
    """

    model: ModelConfig
    params: optim.Params
    tokenizer: Tokenizer
    tokenizer_path: str
    dtype: np.dtype


def open_teacher(config: Config) -> OpenedCheckpoint:
    """The teacher's configurations, checked against the experiment file; its weights are not read yet.

    Raises:
      UserError: the teacher cannot be opened, is not the declared ``config.teacher.architecture``, or is a student
        whose attention is not ``config.attention``.
    """
    teacher = config.teacher
    opened = open_checkpoint(teacher.source, teacher.revision, teacher.base)
    check_architecture(teacher.architecture, opened.model, teacher.source)
    if opened.attention is not None and opened.attention != config.attention:
        raise UserError(f"{teacher.source} is a student whose attention is not config.attention; name its teacher")
    return opened


def architecture(config: Config) -> ModelConfig:
    """The architecture that the experiment file declares, else that of its teacher, whose weights are not read.

    Raises:
      UserError: none is declared and the teacher cannot be opened.
    """
    if config.teacher.architecture is not None:
        return config.teacher.architecture
    try:
        return open_checkpoint(config.teacher.source, config.teacher.revision, config.teacher.base).model
    except UserError as problem:
        raise UserError(f"{problem}; or declare config.teacher.architecture to do without it") from problem


def check_architecture(declared: ModelConfig | None, loaded: ModelConfig, source: str) -> None:
    """Compare the teacher with what the experiment file says it is, except for the ids that belong to the tokenizer.

    Raises:
      UserError: naming the fields that differ.
    """
    if declared is None:
        return
    skip = ("bos_token_id", "eos_token_ids", "pad_token_id")
    a, b = to_dict(declared), to_dict(loaded)
    differing = [
        f"{name}: declared {a[name]!r}, found {b[name]!r}" for name in a if name not in skip and a[name] != b[name]
    ]
    if differing:
        raise UserError(f"{source} is not the config.teacher.architecture of this experiment ({'; '.join(differing)})")


def frozen_dtype(config: Config) -> np.dtype:
    """The dtype of frozen pretrained weights: float32 when the run pretrains, else that of ``config.teacher.dtype``."""
    dtype = np.dtype("float32") if config.pretrain.enabled else model_dir.resolve_dtype(config.teacher.dtype)
    assert dtype is not None  # "keep" is no option of a teacher
    return dtype


def load_student(config: Config, mesh: Mesh, teacher: OpenedCheckpoint) -> Student:
    """Read the teacher's weights onto the mesh and add freshly drawn mixers (and adapters for stage 2).

    A ``teacher`` that is a student itself keeps its trained mixers, and its adapters if they have the configured form.

    Raises:
      UserError: weights or a tokenizer that do not load, or do not fit the model.
    """
    path = config.teacher.tokenizer or teacher.tokenizer_path
    if path is None:
        raise UserError(f"{config.teacher.source} has no tokenizer; name one with config.teacher.tokenizer")
    tokenizer = checked_tokenizer(path, teacher.model)
    shapes = teacher.shapes
    loaded = teacher.params(
        dtype=config.teacher.dtype,
        shardings=lambda path: NamedSharding(mesh, sharding.spec_for(path, shapes[path], mesh)),
    )
    lora = config.lora if config.stage2.enabled else None
    params = models.init_params(teacher.model, config.attention, lora, seed=config.seed, base=loaded)
    if teacher.attention is not None:
        params |= {"mixers": loaded["mixers"]}
        if teacher.lora is not None and teacher.lora == lora:
            params |= {"lora": loaded["lora"]}
    return Student(teacher.model, stages.place(params, mesh), tokenizer, path, frozen_dtype(config))


def draw_teacher(config: Config, mesh: Mesh) -> Student:
    """Random weights of ``config.teacher.architecture`` on the mesh, to be pretrained.

    Raises:
      UserError: no tokenizer is named, or it does not load or fit.
    """
    model, path = config.teacher.architecture, config.teacher.tokenizer
    assert model is not None  # Config.validate asks for it
    if path is None:
        raise UserError("config.teacher.tokenizer: pretraining needs one (a directory, asset:<name> or a hub id)")
    tokenizer = checked_tokenizer(path, model)
    model = dataclasses.replace(
        model,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    params = models.init_params(model, None, None, seed=config.seed)
    return Student(model, stages.place(params, mesh), tokenizer, path, frozen_dtype(config))


def checked_tokenizer(path: str, model: ModelConfig) -> Tokenizer:
    """Load a tokenizer and check that it fits the model's embedding (:func:`lawcat_jax.data.tokenize.fit_embedding`).

    Raises:
      UserError: it does not load, or has too many tokens.
    """
    return fit_embedding(load_tokenizer(path), model.vocab_size, f"tokenizer {path}")


def training_batches(stage: StageConfig, tokenizer: Tokenizer, seed: int, mesh: Mesh) -> Iterator[Batch]:
    """This process's part of the endless training stream, as numpy arrays; has ``get_state()`` and ``set_state()``."""
    part, parts = sharding.data_shard(mesh)
    dataset = make_dataset(
        stage.data,
        tokenizer,
        seq_length=stage.seq_length,
        batch_size=stage.batch_size,
        seed=seed,
        process_index=part,
        process_count=parts,
    )
    return iter(dataset)


def validation_batches(stage: StageConfig, tokenizer: Tokenizer, seed: int, mesh: Mesh) -> list[Batch]:
    """The validation split, already on the devices: it is small and used again and again."""
    if stage.data.validation_samples == 0:
        return []
    part, parts = sharding.data_shard(mesh)
    dataset = make_dataset(
        stage.data,
        tokenizer,
        seq_length=stage.validation_length or stage.seq_length,
        batch_size=stage.batch_size // stage.grad_accum,  # the devices hold no more than a micro-batch at once
        seed=seed,
        split="validation",
        process_index=part,
        process_count=parts,
        repeat=False,
    )
    return [cast(Batch, sharding.place_batch(batch, mesh)) for batch in dataset]
