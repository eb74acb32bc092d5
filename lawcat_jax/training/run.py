"""A whole run, top to bottom: open the teacher, build and train the stages, export, evaluate. Run again, it resumes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from lawcat_jax import models
from lawcat_jax.checkpoints import model_dir
from lawcat_jax.checkpoints.hf.write import write_hf
from lawcat_jax.checkpoints.orbax_errors import is_disk_full
from lawcat_jax.config import Config, to_dict
from lawcat_jax.data.tokenize import set_bos_rule
from lawcat_jax.data.train_tokenizer import save_tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.files import check_target, remove_leftovers
from lawcat_jax.runtime import distributed, sharding
from lawcat_jax.tasks import report
from lawcat_jax.tasks.runner import check_settings, evaluate_model
from lawcat_jax.training import inputs, optim, stages
from lawcat_jax.training.checkpoint import Checkpointer
from lawcat_jax.training.dry_run import dry_run
from lawcat_jax.training.identity import identity as identify
from lawcat_jax.training.identity import refuse_another, refuse_other_evaluation, unrecorded
from lawcat_jax.training.inputs import Student
from lawcat_jax.training.loop import EXIT_INTERRUPTED, InterruptedRunError, Loop, StageRun, StopSignal
from lawcat_jax.training.metrics import Manifest, MetricsWriter
from lawcat_jax.training.step import validation
from lawcat_jax.training.utilization import utilization
from lawcat_jax.training.workdir import Workdir, lock, unlock


def run(config: Config) -> int:
    """Run or resume ``config``; returns the exit code (0 finished, 75 interrupted and saved).

    Raises:
      ConfigError, UserError: whatever the user can mend, as one clear message.
    """
    with _full_disk_as_one_line(config.workdir):
        config.validate()
        distributed.initialize(config.mesh.distributed, heartbeat_seconds=config.mesh.heartbeat_seconds)
        mesh = sharding.make_mesh(config.mesh, rows=sharding.common_rows(config))
        distributed.avoid_cached_collectives(mesh.size)
        if config.dry_run:
            return dry_run(config, mesh)
        if not config.workdir:
            raise UserError("config.workdir: name a folder for the run (--workdir=...)")
        primary = distributed.is_primary()
        with Workdir(config.workdir, primary=primary) as folder, _checkpoints_to_itself(config, primary):
            return run_in(folder, config, mesh)


def run_in(folder: Workdir, config: Config, mesh: Mesh) -> int:
    """:func:`run` in an opened folder, on a mesh."""
    manifest = Manifest.open(folder.local, config, primary=distributed.is_primary())
    again = manifest.finished  # and yet here: the result is made once more
    if again:
        refuse_other_evaluation(manifest.values["config"].get("eval"), config, folder.name)
        if problem := missing_result(folder, config):
            say(f"{folder.name}: this run is finished, but {problem}; exporting it again from the last checkpoint")
            put_aside(folder.local / _result(config))
        else:
            say(f"{folder.name}: this run is finished; its report is in {folder.child('manifest.json')}")
            return 0

    # Load. The stages are built first: what does not fit shows before any weight is read.
    teacher = None if config.pretrain.enabled else inputs.open_teacher(config)
    model, dtype = teacher.model if teacher else inputs.architecture(config), inputs.frozen_dtype(config)
    sharding.check_mesh(config, model, mesh)
    rows = {}
    if manifest.counts_rows:
        rows = inputs.rows_of_a_pass(config, lambda: inputs.tokenizer_of(config, teacher, model)[1])
    built = [stages.build(name, config, model, mesh, dtype=dtype, rows=rows.get(name)) for name, _ in config.stages()]
    if teacher is None:
        student = inputs.draw_teacher(config, mesh)
    else:
        say(f"loading {config.teacher.source}")
        student = inputs.load_student(config, mesh, teacher)
        for note in student.notes:
            say(note)
    identity = identify(config, student.origin, inputs.data_read(config, student.tokenizer))
    begun = {name: manifest.values.get(name) for name in ("teacher", "data")}
    refuse_another(begun, identity, folder.name)
    for source in unrecorded(begun, identity):
        say(
            f"{source}: what it held when this run began was not recorded, so it cannot be compared with what it holds now"
        )
    manifest.values |= {"teacher": identity["teacher"], "data": identity["data"], "notes": list(student.notes)}
    manifest.values |= {"steps": {stage.name: stage.steps for stage in built}} if manifest.counts_rows else {}

    # Whatever a later stage, the export or the evaluation would stumble over shows before the first stage has begun.
    prepared = [inputs.prepare(stage, student, config.seed) for stage in built]
    check_outputs(config, student, folder)

    # Train.
    writer = MetricsWriter(
        folder.local,
        config.log,
        primary=distributed.is_primary(),
        run_config=to_dict(config),
        written=folder.sync,
    )
    try:
        with StopSignal() as stop:
            for stage, read in zip(built, prepared, strict=True):
                options = {"identity": identity, "only_finished": again, "begun": manifest.begin}
                student.params, summary = run_stage(stage, read, config, student, folder, writer, stop, **options)
                done = manifest.values.get("stages", {}) | {stage.name: summary}
                manifest.update(stage=stage.name, stages=done)
                folder.sync(now=True)

        # Export, evaluate, report.
        target = folder.child(export(config, student, folder.local).name)
        results = manifest.values.get("results", {}) if again else None
        if results is None:
            results = evaluate(config, student, folder) if config.eval.enabled else {}
            writer.write_results(results)
    except InterruptedRunError as interruption:
        manifest.update(status="interrupted")
        say(f"{interruption}; run the same command again to go on")
        return EXIT_INTERRUPTED
    finally:
        writer.close()

    if distributed.is_primary():  # by processes that were killed: here is only this run
        remove_leftovers(folder.local)
        remove_leftovers(folder.local / "eval")
    manifest.update(status="finished", model=target, results=results)
    folder.sync(now=True)
    distributed.barrier("finished")  # jax's own farewell gives the slowest process little time
    say(f"finished: {target}{_bad_steps(manifest.values.get('stages', {}))}")
    return 0


def _bad_steps(summaries: dict[str, Any]) -> str:
    """What the last line says of stages with bad steps."""
    told = [
        f"{done['bad_steps']} of {done['steps']} in {name}" for name, done in summaries.items() if done.get("bad_steps")
    ]
    return f" (bad steps, which were skipped: {', '.join(told)})" if told else ""


def run_stage(
    stage: stages.Stage,
    read: inputs.Prepared,
    config: Config,
    student: Student,
    folder: Workdir,
    writer: MetricsWriter,
    stop: StopSignal,
    **options: Any,
) -> tuple[optim.Params, dict[str, Any]]:
    """Run or resume one stage; returns all parameters of the student with the stage's result in them, and the
    :attr:`Loop.summary`. ``options`` are those of :class:`Loop`.
    """
    mesh = stage.mesh
    _, parts = sharding.data_shard(mesh)
    state, frozen = stage.split(student.params)
    key = stage.key(config.seed)
    held_out = read.held_out

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
                batches=read.batches,
                tokens=lambda batch: int(batch["lengths"].sum()) * parts,
                diagnose=stage.diagnostics(frozen, held_out[0]) if config.log.diagnostics and held_out else None,
                utilization=utilization(stage.name, config, student.model),
            ),
            checkpointer=checkpointer,
            checkpoint_config=config.checkpoint,
            writer=writer,
            log=config.log,
            workdir=folder.local,
            max_bad_steps=config.max_bad_steps,
            **options,
        )
        trainable = loop.run(stop)
    finally:
        checkpointer.close()
    return stage.merged(trainable, student.params), loop.summary


def check_outputs(config: Config, student: Student, folder: Workdir) -> None:
    """Find mistakes of the export and the evaluation before anything is trained.

    Raises:
      UserError: a file stands where a folder will be written, or evaluation settings do not fit.
    """
    check_target(folder.local / _result(config), overwrite=True)
    if config.eval.enabled and (reports := folder.local / "eval").exists() and not reports.is_dir():
        raise UserError(f"{reports} is a file; the reports of the evaluation belong there")
    if config.eval.enabled:
        check_settings(config.eval, student.tokenizer)


def _result(config: Config) -> str:
    """The folder of the model that a run makes."""
    return "teacher" if config.pretrain.enabled else "student"


def put_aside(directory: Path) -> None:
    """Rename what is left of a damaged model to ``<name>.damaged``, or the next free number after it."""
    if not distributed.is_primary() or not directory.is_dir():
        return
    names = (f"{directory.name}.damaged{number or ''}" for number in itertools.count())
    directory.rename(next(target for name in names if not (target := directory.with_name(name)).exists()))


def missing_result(folder: Workdir, config: Config) -> str | None:
    """What is missing of the model that the finished run in ``folder`` exported, or None."""
    name, wanted = ("teacher", "config.json") if config.pretrain.enabled else ("student", model_dir.MODEL_JSON)
    target = epath.Path(folder.child(name))
    try:
        weights = target if config.pretrain.enabled else target / model_dir.PARAMS
        files = {path.name for path in weights.iterdir()} if weights.is_dir() else set()
        if not (target / wanted).exists():
            return f"{target}/{wanted} is missing"
    except OSError as problem:
        raise UserError(f"{target}: cannot be read ({problem.strerror or problem})") from problem
    if not files or (config.pretrain.enabled and not any(file.endswith(".safetensors") for file in files)):
        return f"there are no weights in {target}"
    return None


def export(config: Config, student: Student, workdir: Path) -> Path:
    """Write ``student/`` (a model directory) or, after pretraining, ``teacher/`` (Hugging Face format) in ``workdir``.

    Every process calls this: arrays that are split over processes are gathered, process 0 writes.
    """
    primary = distributed.is_primary()
    tokenizer_source = Path(student.tokenizer_path)
    if primary and not tokenizer_source.is_dir():  # a hub id or an embedded asset: its files may be anywhere
        tokenizer_source = save_tokenizer(student.tokenizer, workdir / "tokenizer")
    if config.pretrain.enabled:
        target, params = workdir / "teacher", jax.tree.map(distributed.on_host, student.params)
        if primary:
            write_hf(target, model=student.model, params=params, tokenizer_source=tokenizer_source, overwrite=True)
        distributed.barrier("export")
        return target
    target, (last, stage) = workdir / "student", config.last_stage()
    model_dir.save_model(
        target,
        model=student.model,
        attention=config.attention,
        lora=config.lora if config.stage2.enabled else None,
        params=student.params,
        tokenizer_source=tokenizer_source,
        extra={
            "stage": last,
            "source": student.teacher[0],
            "revision": student.teacher[1],
            **({"training_length": stage.seq_length} if stage.enabled else {}),
            "add_bos": stage.data.add_bos,
            "eval": to_dict(config.eval),
        },
        overwrite=True,
    )
    return target


def evaluate(config: Config, student: Student, folder: Workdir) -> dict[str, Any]:
    """Evaluate the trained model as ``config.eval`` says; writes the reports in ``eval/`` and returns their numbers,
    {task: {role: {length: values}}}.
    """
    last, stage = config.last_stage()
    graphdef, _ = models.abstract(student.model, *stages.architecture(last, config), dtype=student.dtype)
    set_bos_rule(student.tokenizer, stage.data.add_bos)
    results = evaluate_model(
        graphdef,
        student.params,
        student.tokenizer,
        config.eval,
        model=folder.name,
        output=str(folder.local / "eval"),
        is_student=not config.pretrain.enabled,
        training_length=stage.seq_length if stage.enabled else None,
        write=distributed.is_primary(),
    )
    return report.rows(results)


def say(text: str) -> None:
    """Print one line, from process 0 only."""
    if distributed.is_primary():
        print(text, flush=True)


@contextlib.contextmanager
def _checkpoints_to_itself(config: Config, primary: bool) -> Iterator[None]:
    """A checkpoint folder outside the workdir is kept to one run, as the workdir is."""
    directory, held = config.checkpoint.directory, None
    if directory and "://" not in directory and primary:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"config.checkpoint.directory={directory}: {problem.strerror or problem}") from problem
        held = lock(Path(directory), f"config.checkpoint.directory={directory}")
    try:
        yield
    finally:
        unlock(held)


@contextlib.contextmanager
def _full_disk_as_one_line(workdir: str) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        if not is_disk_full(problem):
            raise
        raise UserError(
            f"{problem.filename or workdir}: no space left on the device; free some, and run the same command "
            "again (finished checkpoints are kept)"
        ) from problem
