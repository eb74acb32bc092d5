"""A whole run: teacher -> student -> stages -> model directory -> evaluation. Run again, it resumes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lawcat_jax import models
from lawcat_jax.checkpoints import model_dir
from lawcat_jax.config import AttentionConfig, Config, LoraConfig, ModelConfig, StageConfig, to_dict
from lawcat_jax.data.pipeline import make_dataset
from lawcat_jax.data.tokenize import Tokenizer, load_tokenizer
from lawcat_jax.data.train_tokenizer import save_tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import distributed, sharding
from lawcat_jax.training import optim, stages
from lawcat_jax.training.checkpoint import Checkpointer, is_full
from lawcat_jax.training.loop import EXIT_INTERRUPTED, InterruptedRunError, Loop, StageRun, StopSignal
from lawcat_jax.training.metrics import Manifest, MetricsWriter
from lawcat_jax.training.step import validation
from lawcat_jax.training.utilization import utilization
from lawcat_jax.training.workdir import Workdir


@dataclasses.dataclass
class Student:
    """What the stages work on. ``params`` has every part; for pretraining it is the teacher in the making."""

    model: ModelConfig
    params: optim.Params
    tokenizer: Tokenizer
    tokenizer_path: str
    dtype: Any


def run(config: Config) -> int:
    """Run or resume ``config``; returns the exit code (0 finished, 75 interrupted and saved).

    Raises:
      ConfigError, UserError: whatever the user can mend, as one clear message.
    """
    try:
        return _run(config)
    except OSError as problem:
        if not is_full(problem):
            raise
        raise UserError(
            f"{problem.filename or config.workdir}: no space left on the device; free some, and run the same command "
            "again (finished checkpoints are kept)"
        ) from problem


def _run(config: Config) -> int:
    config.validate()
    distributed.initialize(config.mesh.distributed, heartbeat_seconds=config.mesh.heartbeat_seconds)
    mesh = sharding.make_mesh(config.mesh, rows=sharding.common_rows(config))
    distributed.avoid_cached_collectives(mesh.size)
    if config.dry_run:
        from lawcat_jax.training.dry_run import dry_run

        return dry_run(config, mesh)
    if not config.workdir:
        raise UserError("config.workdir: name a folder for the run (--workdir=...)")
    with Workdir(config.workdir, primary=distributed.is_primary()) as folder:
        return _run_in(folder, config, mesh)


def _run_in(folder: Workdir, config: Config, mesh: Mesh) -> int:
    workdir, primary = folder.local, distributed.is_primary()
    manifest = Manifest.open(workdir, config, primary=primary)
    if manifest.finished:
        say(f"{folder.name}: this run is finished; its report is in {folder.child('manifest.json')}")
        return 0
    # What does not fit shows before weights are loaded.
    model = config.teacher.architecture if config.pretrain.enabled else teacher_architecture(config)[0]
    dtype = np.dtype("float32") if config.pretrain.enabled else model_dir.resolve_dtype(config.teacher.dtype)
    built = [stages.build(name, config, model, mesh, dtype=dtype) for name, _ in config.stages()]
    student = prepare(config, mesh)
    writer = MetricsWriter(workdir, config.log, primary=primary, run_config=to_dict(config), written=folder.sync)
    try:
        with StopSignal() as stop:
            for stage in built:
                student.params = run_stage(stage, config, student, folder, writer, stop)
                manifest.update(stage=stage.name)
                folder.sync(now=True)
    except InterruptedRunError as interruption:
        manifest.update(status="interrupted")
        say(f"{interruption}; run the same command again to go on")
        return EXIT_INTERRUPTED
    finally:
        writer.close()
    target = folder.child(export(config, student, workdir).name)
    results: dict[str, Any] = {}
    if config.eval.enabled:
        results = evaluate(config, student, folder)
    manifest.update(status="finished", model=target, results=results)
    folder.sync(now=True)
    distributed.barrier("finished")  # jax's own farewell gives the slowest process little time
    say(f"finished: {target}")
    return 0


def say(text: str) -> None:
    """One line from process 0."""
    if distributed.is_primary():
        print(text, flush=True)


def prepare(config: Config, mesh: Mesh) -> Student:
    """Load (or, to pretrain, draw) the teacher and draw what the student adds to it, all on the mesh.

    Raises:
      UserError: a teacher or tokenizer that does not load, or does not fit the configuration.
    """
    if config.pretrain.enabled:
        return _from_scratch(config, mesh)
    teacher = config.teacher
    model, attention, lora = teacher_architecture(config)
    if attention is not None and attention != config.attention:
        raise UserError(f"{teacher.source} is a student whose attention is not config.attention; name its teacher")
    shapes = model_dir.expected_shapes(model, attention, lora)
    say(f"loading {teacher.source}")
    bundle = model_dir.load_model(
        teacher.source,
        revision=teacher.revision,
        base=teacher.base,
        dtype=teacher.dtype,
        shardings=lambda path: NamedSharding(mesh, sharding.spec_for(path, shapes[path], mesh)),
    )
    tokenizer_path = teacher.tokenizer or bundle.tokenizer_path
    if tokenizer_path is None:
        raise UserError(f"{teacher.source} has no tokenizer; name one with config.teacher.tokenizer")
    tokenizer = checked_tokenizer(tokenizer_path, model)
    wants_lora = config.lora if config.stage2.enabled else None
    params = models.init_params(model, config.attention, wants_lora, seed=config.seed, base=bundle.params)
    if attention is not None:  # a student goes on from its own mixers, and adapters of the same form
        params |= {"mixers": bundle.params["mixers"]}
        if lora is not None and lora == wants_lora:
            params |= {"lora": bundle.params["lora"]}
    dtype = model_dir.resolve_dtype(teacher.dtype)
    return Student(model, stages.place(params, mesh), tokenizer, tokenizer_path, dtype)


def _from_scratch(config: Config, mesh: Mesh) -> Student:
    model, path = config.teacher.architecture, config.teacher.tokenizer
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
    return Student(model, stages.place(params, mesh), tokenizer, path, np.dtype("float32"))


def teacher_architecture(config: Config) -> tuple[ModelConfig, AttentionConfig | None, LoraConfig | None]:
    """:func:`read_architecture` of the teacher, compared with what the experiment file declares.

    Raises:
      UserError: it cannot be read, or the declared architecture is another.
    """
    teacher = config.teacher
    found = read_architecture(teacher.source, teacher.revision, teacher.base)
    check_architecture(teacher.architecture, found[0], teacher.source)
    return found


def read_architecture(
    source: str, revision: str | None = None, base: str | None = None
) -> tuple[ModelConfig, AttentionConfig | None, LoraConfig | None]:
    """Configurations of a model, without its weights.

    Raises:
      UserError: as :func:`lawcat_jax.checkpoints.model_dir.open_checkpoint`.
    """
    opened = model_dir.open_checkpoint(source, revision, base)
    return opened.model, opened.attention, opened.lora


def check_architecture(declared: ModelConfig | None, loaded: ModelConfig, source: str) -> None:
    """Compare the teacher with what the experiment file says it is, but for ids that belong to the tokenizer.

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


def checked_tokenizer(path: str, model: ModelConfig) -> Tokenizer:
    """Load a tokenizer and check that the model has an embedding for each of its tokens.

    Raises:
      UserError: it does not load, or has too many tokens.
    """
    tokenizer = load_tokenizer(path)
    if len(tokenizer) > model.vocab_size:
        raise UserError(f"tokenizer {path} has {len(tokenizer)} tokens, the model only {model.vocab_size}")
    return tokenizer


def training_batches(stage: StageConfig, tokenizer: Tokenizer, seed: int, mesh: Mesh) -> Any:
    """Iterator over this process's part of the endless training stream."""
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


def validation_batches(stage: StageConfig, tokenizer: Tokenizer, seed: int, mesh: Mesh) -> list[dict[str, Any]]:
    """The validation split, on the devices (it is small and used again and again)."""
    if stage.data.validation_samples == 0:
        return []
    # Without accumulation the whole batch would have to fit: evaluate in micro-batches.
    size = stage.batch_size // stage.grad_accum
    part, parts = sharding.data_shard(mesh)
    dataset = make_dataset(
        stage.data,
        tokenizer,
        seq_length=stage.validation_length or stage.seq_length,
        batch_size=size,
        seed=seed,
        split="validation",
        process_index=part,
        process_count=parts,
        repeat=False,
    )
    return [sharding.place_batch(batch, mesh) for batch in dataset]


def run_stage(
    stage: stages.Stage, config: Config, student: Student, folder: Workdir, writer: MetricsWriter, stop: StopSignal
) -> optim.Params:
    """Run or resume one stage; returns all parameters with its result in them."""
    mesh, seed = stage.mesh, config.seed
    _, parts = sharding.data_shard(mesh)
    state, frozen = stage.split(student.params)
    key = stage.key(seed)
    held_out = validation_batches(stage.config, student.tokenizer, seed, mesh)

    def train_step(state, batch):
        return stage.train_step(state, frozen, sharding.place_batch(batch, mesh), key)

    directory = config.checkpoint.directory.rstrip("/") or folder.child("checkpoints")
    checkpointer = Checkpointer(
        f"{directory}/{stage.name}", keep=config.checkpoint.keep, primary=distributed.is_primary()
    )
    try:
        loop = Loop(
            StageRun(
                name=stage.name,
                config=stage.config,
                steps=stage.steps,
                state=state,
                train_step=train_step,
                evaluate=validation(stage.eval_step, frozen, held_out) if held_out else None,
                batches=training_batches(stage.config, student.tokenizer, seed, mesh),
                tokens=lambda batch: int(batch["lengths"].sum()) * parts,
                diagnose=_diagnostics(stage, config, frozen, held_out),
                utilization=utilization(stage.name, config, student.model),
            ),
            checkpointer=checkpointer,
            checkpoint_config=config.checkpoint,
            writer=writer,
            log=config.log,
            workdir=folder.local,
            max_bad_steps=config.max_bad_steps,
        )
        trainable = loop.run(stop)
    finally:
        checkpointer.close()
    return stage.merged(trainable, student.params)


def _diagnostics(stage: stages.Stage, config: Config, frozen: optim.Params, batches: list) -> Any:
    """The decoder's own statistics (gates, denominators, ...) on one batch, as a function of the trainables."""
    if not (config.log.diagnostics and batches) or stage.name == "pretrain":
        return None

    @functools.partial(jax.jit, out_shardings=sharding.replicated(stage.mesh))
    def statistics(trainable, frozen, batch):
        with jax.sharding.use_abstract_mesh(stage.mesh.abstract_mesh):
            decoder = models.bind(stage.graphdef, optim.merge(trainable, frozen))
            return decoder.diagnostics(batch["tokens"], lengths=batch["lengths"])

    def diagnose(trainable: optim.Params) -> dict[str, Any]:
        values = jax.device_get(statistics(trainable, frozen, batches[0]))
        return {f"diagnostics/{sharding.path_name(path)}": x for path, x in jax.tree_util.tree_leaves_with_path(values)}

    return diagnose


def host_params(params: optim.Params) -> optim.Params:
    """Whole arrays on the host, also of arrays that are split over processes."""

    def whole(x: jax.Array) -> np.ndarray:
        if not x.is_fully_addressable:
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, params)


def export(config: Config, student: Student, workdir: Path) -> Path:
    """Write ``student/`` (a model directory) or, after pretraining, ``teacher/`` (Hugging Face format).

    Every process calls this: arrays that are split over processes are gathered, process 0 writes.
    """
    pretraining, primary = config.pretrain.enabled, distributed.is_primary()
    target = workdir / ("teacher" if pretraining else "student")
    tokenizer_source = Path(student.tokenizer_path)
    if primary and not tokenizer_source.is_dir():  # a hub id or an embedded asset: its files may be anywhere
        tokenizer_source = save_tokenizer(student.tokenizer, workdir / "tokenizer")
    if pretraining:
        from lawcat_jax.checkpoints.hf.write import write_hf

        params = host_params(student.params)
        if primary:
            write_hf(target, model=student.model, params=params, tokenizer_source=tokenizer_source, overwrite=True)
        distributed.barrier("export")
        return target
    last = config.stages()[-1][0]
    model_dir.save_model(
        target,
        model=student.model,
        attention=config.attention,
        lora=config.lora if config.stage2.enabled else None,
        params=student.params,
        tokenizer_source=tokenizer_source,
        extra={
            "stage": last,
            "source": config.teacher.source,
            "revision": config.teacher.revision,
            "training_length": getattr(config, last).seq_length,
            "eval": to_dict(config.eval),
        },
        overwrite=True,
    )
    return target


def evaluate(config: Config, student: Student, folder: Workdir) -> Any:
    """Run the configured evaluation of the trained model; writes and returns its report."""
    from lawcat_jax.tasks import report
    from lawcat_jax.tasks.runner import evaluate_model

    last, stage = config.stages()[-1]
    graphdef, _ = models.abstract(student.model, *stages.architecture(last, config), dtype=student.dtype)
    results = evaluate_model(
        graphdef,
        student.params,
        student.tokenizer,
        config.eval,
        model=folder.name,
        output=str(folder.local / "eval"),
        is_student=not config.pretrain.enabled,
        training_length=stage.seq_length,
        write=distributed.is_primary(),
    )
    return report.rows(results)
