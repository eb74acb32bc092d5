"""What a study file is written in: rows, evaluations and claims."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from lawcat_jax.config import Config, ConfigError, EvalConfig, PasskeyForm, TaskName
from lawcat_jax.config.tree import choice_problems, nearest
from lawcat_jax.data.haystack import source_name
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.registry import task_named

Group = Literal["headline", "reference", "ablation", "baseline", "teacher"]
"""What a row is there for: the result itself, the method with the steps of what is compared with it, one change to it,
another method, or the model that all are made of."""

Direction = Literal["above", "below"]
"""What a claim expects of its first row, compared with its second."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
SEED = "_seed"
"""Between a row's name and a seed: the variant of the study's file that gives this run's configuration."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the study's tables: a student, trained once for each seed, or the teacher, which is not trained.

    ``name`` is in file names and on the command line, ``title`` in tables. ``reference`` is the row that an ablation or a
    baseline is to be read beside: it must have the same steps of stage 2, unless its configuration has no stage (a student of
    the kind "window" that is not trained). ``note`` is printed in every table, for what a
    reader has to know, such as training on pieces of longer samples.
    """

    name: str
    title: str
    group: Group
    seeds: tuple[int, ...] = (0,)
    reference: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the rows of ``groups`` and those named in ``rows`` are measured by: the settings of ``lawcat_jax.evaluate``,
    lengths in tokens. Cells of one task and wording share a table, whichever evaluation they come from.
    """

    name: str
    tasks: tuple[TaskName, ...]
    lengths: tuple[int, ...]
    samples: int = 50
    batch_size: int = 25
    groups: tuple[Group, ...] = ()
    rows: tuple[str, ...] = ()
    passkey_form: PasskeyForm = "landmark"
    text: str = ""
    haystack: str = ""
    babi: str = ""
    position_block: int = 1024

    def applies(self, row: Row) -> bool:
        """Whether the row is measured by it."""
        return row.group in self.groups or row.name in self.rows

    def settings(self) -> EvalConfig:
        """The same as settings of an evaluation."""
        known = {field.name for field in dataclasses.fields(EvalConfig)}
        values = {name: value for name, value in dataclasses.asdict(self).items() if name in known}
        return EvalConfig(**values)

    def wording(self, task: str) -> str:
        """What the table of one of its tasks is called beside the task. A text goes by its name: where it lies on this machine is
        nobody else's business."""
        settings = self.settings()
        wording = task_named(task).wording(settings)
        return wording.replace(settings.text, source_name(settings.text)) if settings.text else wording

    def reads(self, task: str) -> dict[str, object]:
        """What decides the numbers of one of its tasks, beside samples and lengths."""
        names = task_named(task).reads(self.settings()) - {"samples", "lengths", "prefill_chunk"}
        return {name: getattr(self, name) for name in sorted(names) if hasattr(self, name)}


@dataclasses.dataclass(frozen=True)
class Cells:
    """Cells of a table that a claim is judged by: one task with a share of right answers, in one wording, at these
    lengths [tokens]."""

    task: TaskName
    lengths: tuple[int, ...]
    passkey_form: PasskeyForm = "landmark"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence that says that row ``a`` has more (``above``) or fewer right answers than row ``b`` in the samples of all
    ``cells`` together; ``source`` says where it stands."""

    text: str
    source: str
    a: str
    b: str
    cells: tuple[Cells, ...]
    expected: Direction = "above"


@dataclasses.dataclass(frozen=True)
class Study:
    """What is run and compared. ``rows`` stand in the order in which they are run, the most important first. ``name`` is in
    the names of published files."""

    name: str
    title: str
    rows: tuple[Row, ...]
    evaluations: tuple[Evaluation, ...]
    claims: tuple[Claim, ...] = ()

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
          UserError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(f"the study has no row {name!r}{nearest(name, [row.name for row in self.rows])}")

    def problems(self) -> list[str]:
        """What cannot be, one line each."""
        found = [f"{kind} {name!r} is there twice" for kind, name in self._repeated()]
        names = {row.name for row in self.rows}
        for kind, name in [("the study", self.name), *(("row", r.name) for r in self.rows)] + [
            ("evaluation", e.name) for e in self.evaluations
        ]:
            if not _NAME.fullmatch(name) or SEED in name:
                found.append(f"{kind} {name!r}: a name is small letters, digits and _, without {SEED!r}")
        for row in self.rows:
            found += choice_problems(row, f"row {row.name!r}")
            if row.group != "teacher" and not row.seeds:
                found.append(f"row {row.name!r}: name at least one seed")
            if row.reference and row.reference not in names:
                found.append(f"row {row.name!r}: its reference {row.reference!r} is no row")
            if row.group in ("ablation", "baseline") and not row.reference:
                found.append(f"row {row.name!r}: name the reference of this {row.group}")
        for evaluation in self.evaluations:
            found += evaluation.settings().problems(f"evaluation {evaluation.name!r}")
            found += [
                f"evaluation {evaluation.name!r}: no row {name!r}" for name in evaluation.rows if name not in names
            ]
        if not found:  # what follows asks tasks about settings that are right
            found += self._mixed()
        for claim in self.claims:
            found += choice_problems(claim, f"claim {claim.text!r}")
            for name in (claim.a, claim.b):
                found += (
                    self._never_judged(claim, self.row(name))
                    if name in names
                    else [f"claim {claim.text!r}: no row {name!r}"]
                )
        return found or list(self._apart())

    def _mixed(self) -> Iterable[str]:
        """Evaluations whose numbers would stand in one table without being comparable, or of which one would replace the other."""
        for (one, other), task in (
            (pair, task)
            for pair in itertools.combinations(self.evaluations, 2)
            for task in pair[0].tasks
            if task in pair[1].tasks and pair[0].wording(task) == pair[1].wording(task)
        ):
            told = f"evaluations {one.name!r} and {other.name!r} measure {task}, {one.wording(task)},"
            if differ := [name for name, value in one.reads(task).items() if value != other.reads(task).get(name)]:
                yield f"{told} with another {differ[0]}: they would stand in one table; name the sources differently, or leave one out"
            twice = sorted(set(one.lengths) & set(other.lengths))
            rows = [row.name for row in self.rows if twice and one.applies(row) and other.applies(row)]
            if rows:
                yield f"{told} of row {rows[0]!r} at {twice} tokens: only one of the numbers would stay; leave one out"

    def _apart(self) -> Iterable[str]:
        """Claims whose rows have their cells in no table together."""
        for claim in self.claims:
            for cells in claim.cells:
                tables = [self._tables(self.row(name), cells) for name in (claim.a, claim.b)]
                if not tables[0] & tables[1]:
                    yield (
                        f"claim {claim.text!r}: rows {claim.a!r} and {claim.b!r} are measured by {cells.task} in different "
                        f"tables ({'; '.join(sorted(tables[0] | tables[1]))}), which say nothing about each other"
                    )

    def _tables(self, row: Row, cells: Cells) -> set[str]:
        """Wordings of the tables that have all of these cells of a row."""
        lengths: dict[str, set[int]] = {}
        for each in self._measuring(row, cells):
            lengths.setdefault(each.wording(cells.task), set()).update(each.lengths)
        return {wording for wording, measured in lengths.items() if measured >= set(cells.lengths)}

    def _measuring(self, row: Row, cells: Cells) -> Iterable[Evaluation]:
        """The evaluations that measure the task of these cells, in their form, of a row."""
        for each in self.evaluations:
            form = cells.task != "passkey" or each.passkey_form == cells.passkey_form
            if form and each.applies(row) and cells.task in each.tasks:
                yield each

    def _never_judged(self, claim: Claim, row: Row) -> Iterable[str]:
        """Cells of a claim that no evaluation of the row measures, or that have no right answers."""
        for cells in claim.cells:
            if cells.task.startswith("perplexity"):
                yield f"claim {claim.text!r}: {cells.task} has no right answers to count"
            measured = {length for each in self._measuring(row, cells) for length in each.lengths}
            if missing := sorted(set(cells.lengths) - measured):
                yield f"claim {claim.text!r}: row {row.name!r} is not measured by {cells.task} at {missing} tokens"

    def _repeated(self) -> Iterable[tuple[str, str]]:
        for kind, items in (("row", self.rows), ("evaluation", self.evaluations)):
            names = [item.name for item in items]
            yield from ((kind, name) for name in dict.fromkeys(names) if names.count(name) > 1)


GetConfig = Callable[[str], Config]


def load_study(path: str) -> tuple[Study, GetConfig]:
    """The study of a file, and its ``get_config``, which gives the configuration of a run by its variant.

    Raises:
      UserError: the file cannot be read or run, lacks one of the two functions, or its study has problems.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--config={path}: no such file")
    spec = importlib.util.spec_from_file_location(f"lawcat_jax_study_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    with _one_line(path):
        spec.loader.exec_module(module)
    for name in ("get_study", "get_config"):
        if not callable(getattr(module, name, None)):
            raise UserError(f"--config={path}: the file has no {name}(), which a study needs")
    with _one_line(path):
        study = module.get_study()
    if not isinstance(study, Study):
        raise UserError(f"--config={path}: get_study() must return a lawcat_jax.analysis.study.Study")
    if problems := study.problems():
        raise UserError(f"--config={path}: {'; '.join(problems)}")

    def get_config(variant: str) -> Config:
        with _one_line(f"{path}:{variant}"):
            config = module.get_config(variant)
        if not isinstance(config, Config):
            raise UserError(f"--config={path}:{variant}: get_config() must return a lawcat_jax.config.Config")
        return config

    return study, get_config


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """What a study's file raises, as one line that names the file."""
    try:
        yield
    except (Exception, SystemExit) as problem:
        told = " ".join(str(problem).split()) or type(problem).__name__
        if not isinstance(problem, UserError | ConfigError):
            line = traceback.extract_tb(problem.__traceback__)[-1].lineno
            told = f"line {line}: {type(problem).__name__}: {told}"
        raise UserError(f"--config={where}: {told}") from problem
