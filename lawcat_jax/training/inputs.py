"""What a run starts from: the teacher, the student made of it, the tokenizer, and the batches of each stage."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh, NamedSharding

from lawcat_jax import models
from lawcat_jax.checkpoints import model_dir
from lawcat_jax.checkpoints.gguf.read import PACKAGE
from lawcat_jax.checkpoints.model_dir import OpenedCheckpoint, open_checkpoint
from lawcat_jax.config import Config, DataConfig, ModelConfig, StageConfig, to_dict
from lawcat_jax.config.data import is_counted
from lawcat_jax.data.batch import Batch
from lawcat_jax.data.pipeline import Samples, make_dataset, remote_contents
from lawcat_jax.data.source_files import digests, files_here, keeps_returns
from lawcat_jax.data.teacher_store import TeacherStore, without_new_facts
from lawcat_jax.data.tokenize import Tokenizer, encode, fit_embedding, load_tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.training import optim, stages
from lawcat_jax.training.checkpoint import tree_digest
from lawcat_jax.training.identity import HARMLESS_OF_DATA, RETURNS_KEPT, differences


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
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the run starts from, for :func:`lawcat_jax.training.identity.identity`."""
    teacher: tuple[str, str | None] = ("", None)
    """Source and revision of the teacher that the result belongs to, see :func:`teacher_of`."""
    notes: tuple[str, ...] = ()
    """What was decided about the teacher's own mixers and adapters, for the terminal and the manifest."""


def open_teacher(config: Config) -> OpenedCheckpoint:
    """The teacher's configurations, checked against the experiment file; its weights are not read yet.

    Raises:
      UserError: the teacher cannot be opened, is not the declared ``config.teacher.architecture``, or is a student
        whose attention is not ``config.attention`` or whose trained adapters the run would drop.
    """
    teacher = config.teacher
    opened = open_checkpoint(teacher.source, teacher.revision, teacher.base)
    check_architecture(teacher.architecture, opened.model, teacher.source)
    if opened.attention is not None and opened.attention != config.attention:
        raise UserError(f"{teacher.source} is a student whose attention is not config.attention; name its teacher")
    _refuse_to_drop_adapters(config, opened)
    return opened


def _refuse_to_drop_adapters(config: Config, teacher: OpenedCheckpoint) -> None:
    """A student's mixers were trained together with its adapters: without them they are another model."""
    lora, source = teacher.lora, config.teacher.source
    if lora is None:
        return
    if not config.stage2.enabled:
        raise UserError(
            f"{source} is a student with trained adapters, which only stage 2 has a place for: set "
            "config.stage2.enabled=True, or name the teacher that the student was made of"
        )
    differing = [
        f"config.lora.{name}: {getattr(lora, name)!r} there, {getattr(config.lora, name)!r} here"
        for name in ("rank", "alpha", "targets")  # dropout leaves no trace in the weights
        if getattr(lora, name) != getattr(config.lora, name)
    ]
    if differing:
        raise UserError(
            f"{source} is a student with trained adapters of another form ({'; '.join(differing)}), which would be lost: "
            "give config.lora that form, or name the teacher that the student was made of"
        )


def teacher_at_hand(config: Config) -> OpenedCheckpoint | None:
    """As :func:`open_teacher`, but None where the experiment file declares the architecture and there is no teacher on
    this machine to compare it with, or none that would be read (pretraining draws it).

    Raises:
      UserError: as :func:`open_teacher`; or no architecture is declared and the teacher cannot be opened.
    """
    source, declared = config.teacher.source, config.teacher.architecture is not None
    if config.pretrain.enabled or (declared and not _is_here(source)):
        return None
    try:
        return open_teacher(config)
    except UserError as problem:
        if declared or _is_here(source):
            raise
        raise UserError(f"{problem}; or declare config.teacher.architecture to do without it") from problem


def _is_here(source: str) -> bool:
    """Whether a teacher, right or damaged, is on this machine; a package may be another one that is not installed."""
    if source.startswith(PACKAGE):
        try:
            model_dir.locate(source)
        except UserError:
            return False
    return not model_dir.is_remote(source)


def architecture(config: Config) -> ModelConfig:
    """The architecture of the teacher (whose weights are not read) or, where it is not on this machine, that which the
    experiment file declares.

    Raises:
      UserError: as :func:`teacher_at_hand`.
    """
    opened = teacher_at_hand(config)
    if opened is not None:
        return opened.model
    assert config.teacher.architecture is not None  # Config.validate asks pretraining for it
    return config.teacher.architecture


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

    A ``teacher`` that is a student itself keeps its trained mixers and adapters.

    Raises:
      UserError: weights or a tokenizer that do not load, or do not fit the model.
    """
    path, tokenizer = tokenizer_of(config, teacher, teacher.model)
    shapes = teacher.shapes
    loaded = teacher.params(
        dtype=config.teacher.dtype,
        shardings=lambda path: NamedSharding(mesh, sharding.spec_for(path, shapes[path], mesh)),
    )
    lora = config.lora if config.stage2.enabled else None
    params = models.init_params(teacher.model, config.attention, lora, seed=config.seed, base=loaded)
    notes = []
    if teacher.attention is not None:
        params |= {"mixers": loaded.get("mixers", {})}  # which of the kind "window" are empty
        kept = "its trained mixers are"
        if teacher.lora is not None:
            params |= {"lora": loaded["lora"]}
            kept = "its trained mixers and adapters are"
        notes = [f"{config.teacher.source} is a student: {kept} trained further"]
    placed = stages.place(params, mesh)
    given = set(optim.flatten(loaded))
    weights = _digests({name: leaf for name, leaf in optim.flatten(placed).items() if name in given})
    origin = _origin(config, teacher.model, tokenizer, weights)
    named = teacher_of(config, teacher)
    return Student(teacher.model, placed, tokenizer, path, frozen_dtype(config), origin, named, tuple(notes))


def teacher_of(config: Config, opened: OpenedCheckpoint) -> tuple[str, str | None]:
    """Source and revision by which the files of a student name their teacher: where training went on from a student, that
    student's teacher; of a model converted from a Python package or an embedded one, these, which are anywhere the same;
    else as the configuration has it."""
    made_of, source = opened.extra.get("source"), config.teacher.source
    student = opened.attention is not None
    if made_of and (student or (made_of.startswith(("asset:", "package:")) and "adapter" not in opened.extra)):
        return made_of, opened.extra.get("revision")
    return source, config.teacher.revision


def _digests(weights: optim.Params) -> dict[str, Any]:
    """``weights``: as every version has written it; ``weights_hash``: which also knows the places of the elements."""
    return {"weights": tree_digest(weights, "sum"), "weights_hash": tree_digest(weights)}


def _origin(config: Config, model: ModelConfig, tokenizer: Tokenizer, weights: dict[str, Any]) -> dict[str, Any]:
    # The tokenizer by what it does: how its library writes it down changes from version to version.
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id]
    facts.append(
        encode(tokenizer, "The key is 53781.  Remember it:\n\tnaïve Straße 東京 ☃ don't, e.g. x_1 = [0.5, 'ab'];")
    )
    found = {"model": to_dict(model), "dtype": str(frozen_dtype(config)), **weights, "tokenizer": _sha256(facts)}
    parts = [part for _, stage in config.stages() for part in (stage.data, *stage.data.mixture)]
    if any(part.kind == "instruction" for part in parts):  # which alone is written through it
        found["chat_template"] = _sha256(getattr(tokenizer, "chat_template", None))
    return found


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def draw_teacher(config: Config, mesh: Mesh) -> Student:
    """Random weights of ``config.teacher.architecture`` on the mesh, to be pretrained.

    Raises:
      UserError: no tokenizer is named, or it does not load or fit.
    """
    model = config.teacher.architecture
    assert model is not None  # Config.validate asks for it
    path, tokenizer = tokenizer_of(config, None, model)
    model = dataclasses.replace(
        model,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    params = models.init_params(model, None, None, seed=config.seed)
    origin = _origin(config, model, tokenizer, {"weights": None})
    return Student(model, stages.place(params, mesh), tokenizer, path, frozen_dtype(config), origin)


def tokenizer_of(config: Config, teacher: OpenedCheckpoint | None, model: ModelConfig) -> tuple[str, Tokenizer]:
    """(where it comes from, the tokenizer) of a run; ``teacher`` is None where one is pretrained.

    Raises:
      UserError: none is named, or it does not load or fit.
    """
    path = config.teacher.tokenizer or (None if teacher is None else teacher.tokenizer_path)
    if path is None and teacher is None:
        raise UserError("config.teacher.tokenizer: pretraining needs one (a directory, asset:<name> or a hub id)")
    if path is None:
        raise UserError(f"{config.teacher.source} has no tokenizer; name one with config.teacher.tokenizer")
    return path, checked_tokenizer(path, model)


def rows_of_a_pass(config: Config, tokenizer: Callable[[], Tokenizer]) -> dict[str, int]:
    """Rows of one pass over the data of every stage whose length follows from them; ``tokenizer()`` is called where sources
    have to be read for that.

    Raises:
      UserError: a source that cannot be read.
    """
    tokenizer, rows = functools.cache(tokenizer), {}
    for name, stage in config.stages():
        if stage.steps == 0:
            counted = is_counted(stage.data)
            rows[name] = len(training_rows(stage, tokenizer(), config.seed)) if counted else stage.data.num_samples
    return rows


def sources_read(data: DataConfig) -> list[str]:
    """The sources that a stream opens, sorted."""
    if data.kind == "text" and data.passkey_fraction == 1:
        return []
    fields = ("source", "validation_source", "hay_source", "babi_source")
    return sorted({getattr(part, field) for part in (data, *data.mixture) for field in fields} - {""})


def data_read(config: Config, tokenizer: Tokenizer) -> dict[str, dict[str, list[list[Any]]]]:
    """Stage -> source -> what tells it from a changed one, for every source that the stages read: [name, size in bytes, digest]
    of each file on this machine, [split, size, digest] of what is read of a hub. The digest of a text file with carriage returns
    ends with :data:`lawcat_jax.training.identity.RETURNS_KEPT`, since earlier versions read other text from it.

    Raises:
      UserError: a source that is not there, or cannot be read.
    """
    found = {}
    for name, stage in config.stages():
        local = {source: files for source in sources_read(stage.data) if (files := files_here(source))}
        found[name] = {
            source: [
                [file.name, file.stat().st_size, digest + (RETURNS_KEPT if keeps_returns(file) else "")]
                for file, digest in zip(files, digests(files), strict=True)
            ]
            for source, files in local.items()
        }
        lengths = {"seq_length": stage.seq_length, "validation_length": stage.validation_length or stage.seq_length}
        found[name] |= remote_contents(stage.data, tokenizer, **lengths)
    return found


def training_rows(stage: StageConfig, tokenizer: Tokenizer, seed: int) -> Samples:
    """The rows of one pass over the training data, in their stored order."""
    return Samples(stage.data, tokenizer, seq_length=stage.seq_length, seed=seed, split="train")


def checked_tokenizer(path: str, model: ModelConfig) -> Tokenizer:
    """Load a tokenizer and check that it fits the model's embedding (:func:`lawcat_jax.data.tokenize.fit_embedding`).

    Raises:
      UserError: it does not load, or has too many tokens.
    """
    return fit_embedding(load_tokenizer(path), model.vocab_size, f"tokenizer {path}")


@dataclasses.dataclass
class Prepared:
    """What a stage reads: its endless stream, and its validation split on the devices (maybe empty)."""

    batches: Iterator[Batch]
    held_out: list[Batch]


def prepare(stage: stages.Stage, student: Student, seed: int) -> Prepared:
    """Open the data of a stage, so that what is wrong with it shows.

    Raises:
      UserError: data that cannot be read, tokens that the model does not know, or stored logits of another teacher or
        other data.
    """
    stored = None
    if stage.config.teacher_logits:
        stored = TeacherStore(stage.config.teacher_logits)
        check_stored(stored, store_facts(stage.config, student, seed), f"config.{stage.name}.teacher_logits")
    held_out = validation_batches(stage.config, student.tokenizer, seed, stage.mesh, stored)
    return Prepared(training_batches(stage.config, student.tokenizer, seed, stage.mesh, stored), held_out)


def store_facts(stage: StageConfig, student: Student, seed: int) -> dict[str, Any]:
    """What stored logits are of: the teacher, the tokenizer, and all that decides the rows of a stage."""
    base = {name: value for name, value in student.params.items() if name not in ("mixers", "lora")}
    data = {name: value for name, value in to_dict(stage.data).items() if name not in HARMLESS_OF_DATA}
    values = {
        "teacher": {**{name: student.origin[name] for name in ("model", "dtype")}, **_digests(base)},
        "tokenizer": student.origin["tokenizer"],
        "data": data,
        "seq_length": stage.seq_length,
        "validation_length": stage.validation_length,
        "seed": seed,
    }
    return json.loads(json.dumps(values))


def check_stored(stored: TeacherStore, facts: dict[str, Any], where: str) -> None:
    """Refuse logits that are not those of this teacher on these data. A store of an earlier version has no
    ``weights_hash``, which is then not compared.

    Raises:
      UserError: naming what differs.
    """
    facts = without_new_facts(facts, stored.facts)
    if differing := differences(stored.facts, facts, {"data": to_dict(DataConfig())}, "its logits"):
        raise UserError(f"{where} is of another teacher or other data ({'; '.join(differing[:4])}); write it anew")


def training_batches(
    stage: StageConfig, tokenizer: Tokenizer, seed: int, mesh: Mesh, stored: TeacherStore | None = None
) -> Iterator[Batch]:
    """This process's part of the endless training stream, as numpy arrays; has ``get_state()`` and ``set_state()``.
    ``stored`` are the teacher's logits of its rows."""
    part, parts = sharding.data_shard(mesh)
    dataset = make_dataset(
        stage.data,
        tokenizer,
        seq_length=stage.seq_length,
        batch_size=stage.batch_size,
        seed=seed,
        process_index=part,
        process_count=parts,
        teacher=stored,
    )
    return iter(dataset)


def validation_batches(
    stage: StageConfig, tokenizer: Tokenizer, seed: int, mesh: Mesh, stored: TeacherStore | None = None
) -> list[Batch]:
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
        teacher=stored,
    )
    return [cast(Batch, sharding.place_batch(batch, mesh)) for batch in dataset]
