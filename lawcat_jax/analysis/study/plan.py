"""The commands that a study consists of: what its rows share, and what waits for what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lawcat_jax.analysis.study.table import SEED, Evaluation, GetConfig, Row, Study
from lawcat_jax.checkpoints.gguf.read import PACKAGE, is_gguf
from lawcat_jax.config import Config, to_dict
from lawcat_jax.config.data import is_counted
from lawcat_jax.config.tree import nearest
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.registry import task_named
from lawcat_jax.training.identity import HARMLESS, HARMLESS_OF_DATA
from lawcat_jax.training.inputs import sources_read

Does = Literal["convert", "stage1", "train", "evaluate"]
"""What a job does: make the teacher's directory, train a stage 1 that several runs share, train a run, measure a model."""

TEACHER = "teacher"
"""Name of the job that converts the teacher, and of the folder that it fills."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One command of a study.

    ``name`` is unique and names the log. ``row`` and ``seed`` say whose it is ("" and None where several rows share it).
    ``module`` runs with ``arguments`` when the jobs ``after`` are finished. ``facts`` are JSON values that say what it
    computes: a job that finished with other facts was another one. It is finished when the command ended well and all
    ``products`` are there; a run has a ``workdir`` and, for the costs, its steps and tokens, padding included. ``sources`` are the
    texts that it reads: where their files are others now, it finished with other data.
    """

    name: str
    does: Does
    module: str
    arguments: tuple[str, ...]
    products: tuple[Path, ...]
    facts: Mapping[str, Any]
    after: tuple[str, ...] = ()
    row: str = ""
    seed: int | None = None
    workdir: Path | None = None
    steps: int = 0
    tokens: int = 0
    sources: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """The command line of the child process."""
        return [sys.executable, "-m", self.module, *self.arguments]

    @property
    def text(self) -> str:
        """The same as a person types it."""
        return " ".join(["python -m", self.module, *self.arguments])


@dataclasses.dataclass(frozen=True)
class Run:
    """A row with one seed: its name (and variant of the study's file), its configuration, and where its model will be."""

    name: str
    row: Row
    seed: int | None
    config: Config | None
    model: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """All jobs in the order in which they are to begin, and the runs that they belong to."""

    study: Study
    jobs: tuple[Job, ...]
    runs: tuple[Run, ...]

    def job(self, name: str) -> Job:
        """The job of that name."""
        return next(job for job in self.jobs if job.name == name)

    def needed(self, names: Iterable[str]) -> tuple[Job, ...]:
        """The jobs of the named rows or runs, with all that they wait for; of all rows if nothing is named.

        Raises:
          UserError: a name that is neither.
        """
        names = list(names)
        if not names:
            return self.jobs
        known = [run.name for run in self.runs] + [row.name for row in self.study.rows]
        for name in names:
            if name not in known:
                raise UserError(f"--only: the study has no row {name!r}{nearest(name, known)}")
        wanted = {job.name for job in self.jobs if job.row in names or _run_name(job.row, job.seed) in names}
        for job in reversed(self.jobs):  # what a job waits for stands before it
            if job.name in wanted:
                wanted.update(job.after)
        return tuple(job for job in self.jobs if job.name in wanted)


def evaluation_folder(output: Path, run: str, evaluation: str) -> Path:
    """Where the reports of one evaluation of one run lie."""
    return output / "eval" / run / evaluation


def make_plan(study: Study, get_config: GetConfig, *, config: str, output: Path, workers: int | None = None) -> Plan:
    """The jobs of a study.

    A teacher that is a GGUF file is converted once. A stage 1 that several runs have in common (the same teacher, attention,
    stage and seed) is trained once, in a run of its own, and their stage 2 starts from its student; every other run is one
    command with both stages. Both ways give the same student.

    Args:
      config: the study's file, as the commands name it.
      output: the folder of everything.
      workers: threads, and processes, that prepare a run's batches, where its configuration has some; None leaves them as they
        are. They change neither the batches nor their order.

    Raises:
      UserError: configurations that cannot run, have different teachers, or are compared in spite of different steps.
    """
    configs = _configs(study, get_config)
    _check(study, configs)
    teacher = next(iter(configs.values())).teacher
    jobs: list[Job] = []
    source, first = teacher.source, ()
    if teacher.source.startswith(PACKAGE) or is_gguf(Path(teacher.source).expanduser()):
        source, first = str(output / TEACHER), (TEACHER,)
        arguments = (f"--source={teacher.source}", f"--target={source}", "--overwrite")
        products = (output / TEACHER / "model.json",)
        jobs.append(Job(TEACHER, "convert", "lawcat_jax.convert", arguments, products, {"source": teacher.source}))
    shared = _shared(configs)
    runs = []
    for row in study.rows:
        for seed in row.seeds if row.group != "teacher" else (None,):
            name = _run_name(row.name, seed)
            own = configs.get(name)
            if own is None:
                runs.append(Run(name, row, None, None, source))
                ready = first
            else:
                workdir = output / "runs" / name
                runs.append(Run(name, row, seed, own, str(workdir)))
                trained = _training(runs[-1], config, source, first, shared.get(name), output, workers)
                jobs += [job for job in trained if all(job.name != other.name for other in jobs)]
                ready = (trained[-1].name,)
            jobs += [_evaluation(runs[-1], each, ready, output) for each in study.evaluations if each.applies(row)]
    return Plan(study, tuple(jobs), tuple(runs))


def _run_name(row: str, seed: int | None) -> str:
    return row if seed is None else f"{row}{SEED}{seed}"


def _configs(study: Study, get_config: GetConfig) -> dict[str, Config]:
    """The configuration of each run that trains."""
    found = {}
    for row in study.rows:
        for seed in row.seeds if row.group != "teacher" else ():
            name = _run_name(row.name, seed)
            config = get_config(name)
            config.validate()
            if config.seed != seed:
                raise UserError(f"{name}: get_config gives the seed {config.seed}")
            for stage_name, stage in config.stages():
                if stage.steps == 0 and is_counted(stage.data):
                    raise UserError(
                        f"{name}: {stage_name}.steps is 0, and how many steps a pass over its text has shows only when it is read; rows "
                        "are compared by their steps, so state them"
                    )
            if config.pretrain.enabled:
                raise UserError(f"{name}: a row of a study trains a student; config.pretrain.enabled must be False")
            found[name] = config
    if not found:
        raise UserError("the study trains nothing: it has no row but the teacher")
    return found


def _check(study: Study, configs: Mapping[str, Config]) -> None:
    (first, teacher), *others = ((name, config.teacher) for name, config in configs.items())
    for name, other in others:
        if other != teacher:
            raise UserError(f"{name} has another teacher than {first}; a study compares students of one teacher")
    for row in study.rows:
        if not row.reference:
            continue
        reference = study.row(row.reference)
        mine, theirs = (configs.get(_run_name(r.name, r.seeds[0])) for r in (row, reference))
        if mine is None or theirs is None:
            raise UserError(f"row {row.name!r} and its reference {row.reference!r} must both be trained")
        a, b = (_reads(config)["stage2"] for config in (mine, theirs))
        if a != b and mine.stages():
            raise UserError(
                f"row {row.name!r} has {a[0]} steps of {a[1]} tokens in stage 2, its reference {row.reference!r} {b[0]} of "
                f"{b[1]}; they cannot be compared"
            )


def _reads(config: Config) -> dict[str, tuple[int, int]]:
    """(steps, tokens of a step) of each stage; (0, 0) where it is off."""
    found = {"stage1": (0, 0), "stage2": (0, 0)}
    for name, stage in config.stages():
        steps = stage.steps or int(stage.epochs * stage.data.num_samples / stage.batch_size)
        found[name] = (steps, stage.batch_size * stage.seq_length)
    return found


def steps(config: Config) -> tuple[int, int]:
    """Steps of stage 1 and of stage 2."""
    found = _reads(config)
    return found["stage1"][0], found["stage2"][0]


def _shared(configs: Mapping[str, Config]) -> dict[str, str]:
    """Run -> name of its stage 1, for those that have one in common with another run."""
    digests = {name: _stage1_digest(config) for name, config in configs.items() if config.stage1.enabled}
    counts = list(digests.values())
    return {name: f"stage1_{digest}" for name, digest in digests.items() if counts.count(digest) > 1}


def _stage1_facts(config: Config) -> dict[str, Any]:
    values = to_dict(config)
    for name in HARMLESS_OF_DATA:
        values["stage1"]["data"].pop(name)
    return json.loads(json.dumps({name: values[name] for name in ("seed", "teacher", "attention", "stage1")}))


def _stage1_digest(config: Config) -> str:
    facts = json.dumps(_stage1_facts(config), sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:10]


def run_facts(config: Config) -> dict[str, Any]:
    """What a run's configuration says about its result, as JSON values."""
    return json.loads(json.dumps({name: value for name, value in to_dict(config).items() if name not in HARMLESS}))


def _training(
    run: Run,
    config: str,
    teacher: str,
    after: tuple[str, ...],
    stage1: str | None,
    output: Path,
    workers: int | None,
) -> list[Job]:
    """The jobs that train a run, the last of which makes its student."""
    own = run.config
    assert own is not None  # the teacher is not trained
    common = [f"--config={config}:{run.name}", "--config.eval.enabled=False"]
    for name, stage in own.stages():
        for field in HARMLESS_OF_DATA:
            if workers is not None and getattr(stage.data, field) not in (0, workers):
                common.append(f"--config.{name}.data.{field}={workers}")
    reads = _reads(own)
    start = [] if teacher == own.teacher.source else [f"--config.teacher.source={teacher}"]
    jobs = []
    if stage1 is not None:
        workdir = output / "runs" / stage1
        jobs.append(
            _train(
                stage1, "stage1", workdir, [*common, *start, "--config.stage2.enabled=False"], after, [reads["stage1"]]
            )
        )
        jobs[0] = dataclasses.replace(jobs[0], facts=_stage1_facts(own), sources=tuple(sources_read(own.stage1.data)))
        start = [f"--config.teacher.source={workdir / 'student'}", "--config.stage1.enabled=False"]
        after = (stage1,)
        reads.pop("stage1")
    job = _train(run.name, "train", output / "runs" / run.name, [*common, *start], after, list(reads.values()))
    sources = {source for name, stage in own.stages() if name in reads for source in sources_read(stage.data)}
    own_facts = {"facts": run_facts(own), "sources": tuple(sorted(sources))}
    return [*jobs, dataclasses.replace(job, **own_facts, row=run.row.name, seed=run.seed)]


def _train(
    name: str,
    does: Does,
    workdir: Path,
    arguments: Sequence[str],
    after: tuple[str, ...],
    reads: Sequence[tuple[int, int]],
) -> Job:
    return Job(
        name,
        does,
        "lawcat_jax.train",
        (*arguments, f"--workdir={workdir}"),
        (workdir / "student" / "model.json",),
        {},
        after,
        workdir=workdir,
        steps=sum(count for count, _ in reads),
        tokens=sum(count * each for count, each in reads),
    )


def _evaluation(run: Run, evaluation: Evaluation, after: tuple[str, ...], output: Path) -> Job:
    folder = evaluation_folder(output, run.name, evaluation.name)
    arguments = [
        f"--checkpoint={run.model}",
        f"--tasks={','.join(evaluation.tasks)}",
        f"--lengths={','.join(map(str, evaluation.lengths))}",
        f"--samples={evaluation.samples}",
        f"--batch_size={evaluation.batch_size}",
    ]
    settings = evaluation.settings()
    read = {name for task in evaluation.tasks for name in task_named(task).reads(settings)}
    sources = {getattr(evaluation, name) for name in ("text", "haystack", "babi") if name in read} - {""}
    for name in ("passkey_form", "position_block", "text", "haystack", "babi"):
        if name in read and (value := getattr(evaluation, name)):
            arguments.append(f"--{'form' if name == 'passkey_form' else name}={value}")
    facts = json.loads(json.dumps(dataclasses.asdict(evaluation)))
    for name in ("name", "groups", "rows", "batch_size"):  # who is measured, and how many at once, change no number
        facts.pop(name)
    return Job(
        f"{run.name}.{evaluation.name}",
        "evaluate",
        "lawcat_jax.evaluate",
        (*arguments, f"--output={folder}"),
        tuple(folder / f"{task}.json" for task in evaluation.tasks),
        facts,
        after,
        row=run.row.name,
        seed=run.seed,
        sources=tuple(sorted(sources)),
    )
