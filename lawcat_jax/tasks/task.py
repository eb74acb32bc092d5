"""The protocol of an evaluation task, and the two families that tasks belong to.

:class:`GenerationTask` asks a model to continue prompts and scores the answers; :class:`LikelihoodTask` averages the
negative log-likelihood of text. A new task is one file in this folder: a subclass, and ``TASKS = (MyTask(),)``.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from lawcat_jax.config import EvalConfig
from lawcat_jax.data.tokenize import Tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.ahead import Ahead
from lawcat_jax.tasks.results import Accuracy, Likelihood

Generate = Callable[[list[list[int]], int, bool], list[list[int]]]
"""(prompts as token ids, max_new_tokens, whether an answer ends with the model's end token) -> the new tokens of each
prompt, in order."""


class Rows(Protocol):
    """Sequences to be scored: row ``index`` has the arrays ``tokens``, ``targets``, ``loss_weights`` and ``lengths`` of a
    :class:`lawcat_jax.data.batch.Batch` without its axis B; one at or beyond ``len()`` has weight zero."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


NllSum = Callable[[Mapping[str, np.ndarray]], tuple[float, float]]
"""A batch as of :func:`lawcat_jax.data.pipeline.make_dataset` -> (weighted sum of negative log-likelihoods in nats,
sum of weights)."""

PositionNll = Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]
"""A batch -> the same two sums over its rows for each position, float64 [T] both."""

Likelihoods = Callable[..., list[tuple[float, bool]]]
"""(pairs of token ids, a context and what follows it; optionally a :data:`Progress`) -> (log-likelihood of what follows
in nats, whether it is the greedy continuation) of each pair."""

Continue = Callable[..., list[list[int]]]
"""(prompts as token ids, max_new_tokens, end tokens, a :class:`lawcat_jax.inference.sampling.Sampling`, what says of a
prompt's number and its answer that it need not go on, or None) -> the new tokens of each prompt."""

Progress = Callable[..., None]
"""Called as (length, samples done, samples of this length), and with the sum of the scores so far where there are
scores."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model under evaluation.

    Attributes:
      label: its name in tables and figures, different from that of every other model beside it.
      name: its name in the JSON report, usually where it was loaded from.
      role: ``student``, or ``teacher`` for softmax attention.
      tokenizer: a fast Hugging Face tokenizer.
      generate: greedy continuation of prompts.
      nll: likelihood of a batch.
      position_nll: likelihood of a batch by position.
      likelihoods: log-likelihoods of continuations; None where it cannot be asked for them.
      sample: continuation as a :class:`lawcat_jax.inference.sampling.Sampling` says, up to stop strings; likewise.
      positions: tokens that it may be given at most; None is any number.
      eos_ids: the tokens that end an answer.
      devices: over how many devices it splits the samples of a batch.
      fingerprint: differs for models that may answer differently; "" where unknown, and then nothing is resumed.
    """

    label: str
    name: str
    role: str
    tokenizer: Tokenizer
    generate: Generate
    nll: NllSum
    position_nll: PositionNll
    likelihoods: Likelihoods | None = None
    sample: Continue | None = None
    positions: int | None = None
    eos_ids: tuple[int, ...] = ()
    devices: int = 1
    fingerprint: str = ""

    def together(self, settings: EvalConfig) -> int:
        """How many samples it is given at a time: a batch for each device, as far as there are so many."""
        samples = -(-settings.samples // self.devices) * self.devices
        return min(settings.batch_size * self.devices, samples)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question: ``prompt`` token ids (at least one), and the ``answer`` that is asked for.

    ``meta`` is what else the task knows of it: ``depth``, from 0 to 1, is where in the context the answer stands.
    """

    prompt: list[int]
    answer: str
    max_new_tokens: int
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Task(abc.ABC):
    """What the runner, the report and the command line need to know of a task.

    A task has no state: what a user chooses is in the :class:`lawcat_jax.config.EvalConfig` that every method takes.

    Attributes:
      name: of the task, its option in ``config.eval.tasks``.
      heading: the start of titles, e.g. "Passkey retrieval".
      family: a name for tasks that share a summary, e.g. "BABILong", with which their headings start; "" for none.
      settings: the fields of ``EvalConfig``, ``lengths`` and ``batch_size`` apart, that its results depend on.
      packages: that its results depend on, beyond those of every task; their versions are in the report.
      axis: what the rows of its tables are.
      plotted: whether its results are plotted over that; if so, x_label and y_label are those of the plot.
      percent: whether the plotted value is a share in [0, 1], shown in percent.
      result: the dataclass of one result; its fields are JSON values.
    """

    name: str
    heading: str
    family: ClassVar[str] = ""
    settings: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]] = ()
    axis: ClassVar[str] = "tokens"
    plotted: ClassVar[bool] = True
    x_label: ClassVar[str] = "context length (tokens)"
    y_label: ClassVar[str] = ""
    percent: ClassVar[bool] = False
    result: ClassVar[type]

    @abc.abstractmethod
    def wording(self, settings: EvalConfig) -> str:
        """Which of its variants is measured, for titles and JSON: the prompt's wording, the haystack, or the text."""

    @abc.abstractmethod
    def variant(self, settings: EvalConfig) -> str:
        """The same in a few characters fit for a file name."""

    def title(self, settings: EvalConfig) -> str:
        """Heading of tables and figures; names the wording."""
        return f"{self.heading}, {self.wording(settings)}"

    def check(self, settings: EvalConfig, tokenizer: Tokenizer) -> None:
        """Find every mistake that can be found before a model is asked anything.

        Raises:
          UserError: for lengths that are missing or do not fit, a missing source, an unfit tokenizer.
        """
        if not settings.lengths:
            raise UserError(f"{self.name} evaluation: name at least one length")

    def identity(self, settings: EvalConfig) -> dict[str, Any]:
        """What makes two evaluations of a model the same, as JSON values: an interrupted one resumes if it is equal."""
        return {name: getattr(settings, name) for name in self.settings}

    def reads(self, settings: EvalConfig) -> set[str]:
        """The fields of ``EvalConfig``, ``batch_size`` apart, that have an effect on it where the others are as in
        ``settings``."""
        del settings
        return {*self.settings, "lengths", "prefill_chunk"}

    def lengths(self, settings: EvalConfig) -> list[int]:
        """Lengths in tokens that are measured one after the other, each a cell of the table that is kept when done."""
        return sorted(set(settings.lengths))

    def seed(self, settings: EvalConfig) -> int:
        """The seed of its samples, for the report."""
        return settings.seed

    @property
    def stem(self) -> str:
        """The start of its files' names."""
        return self.name

    def ending(self, settings: EvalConfig, positions: Sequence[Any]) -> str:
        """What tells its files from those of other settings: the end of their names."""
        span = "-".join(map(str, dict.fromkeys((positions[0], positions[-1]))))
        return f"_{self.variant(settings)}_n{settings.samples}_{span}"

    def facts(self, settings: EvalConfig) -> list[str]:
        """How it was measured, the number of samples apart, for the foot of its table."""
        facts = [f"{name} {getattr(settings, name)!r}" for name in self.settings if name != "samples"]
        return [*facts, "in brackets: 95 % interval (Wilson)" if self.percent else "natural logarithms"]

    def position(self, text: str) -> Any:
        """A position on the x axis, read back from JSON."""
        return int(text)

    def prepare(self, tokenizer: Tokenizer, length: int, settings: EvalConfig) -> Ahead | None:
        """Begin to make the inputs of a length on another thread, for a :meth:`measure` that comes later; None where
        there is nothing to be made ahead. Whoever does not measure closes it.
        """
        del tokenizer, length, settings
        return None

    @abc.abstractmethod
    def measure(
        self,
        model: Model,
        length: int,
        settings: EvalConfig,
        progress: Progress | None = None,
        prepared: Ahead | None = None,
    ) -> dict[Any, Any]:
        """Measure one length: position on the x axis (usually the length itself) -> result.

        ``prepared`` is what :meth:`prepare` gave for the same tokenizer, length and settings, or None.
        """

    @abc.abstractmethod
    def samples_of(self, result: Any) -> int:
        """How many samples the result is of; at most ``samples``, where that is one of its settings."""

    @abc.abstractmethod
    def cell(self, result: Any) -> str:
        """The result in a table."""

    @abc.abstractmethod
    def row(self, result: Any) -> dict[str, Any]:
        """The result in the JSON report."""

    def point(self, result: Any) -> tuple[float, float, float]:
        """The result in a plot: (value, lower end, upper end of its 95 % interval)."""
        raise NotImplementedError

    def records(self, result: Any) -> Sequence[tuple[float | None, float]]:
        """(depth, score) of single samples, from which a heat map is made; empty where there are none."""
        return ()


class GenerationTask(Task):
    """Prompts are continued greedily and every answer gets a score; the result is the mean score.

    A subclass gives ``name``, ``heading``, ``settings``, ``wording``, ``variant``, ``samples`` and ``score``.

    Attributes:
      ends: whether an answer ends with the model's end token; else every sample gets all of its new tokens.
    """

    y_label = "accuracy (%)"
    percent = True
    result = Accuracy
    ends: ClassVar[bool] = True

    @abc.abstractmethod
    def samples(self, tokenizer: Tokenizer, length: int, settings: EvalConfig) -> Iterable[Sample]:
        """The ``settings.samples`` samples of a length, the same ones whenever they are asked for, made as they are
        taken. Prompt and answer take at most ``length`` tokens.

        Raises:
          UserError: the length is below what the frame takes, or the source has too little text.
        """

    @abc.abstractmethod
    def score(self, sample: Sample, generated: Sequence[int], tokenizer: Tokenizer) -> float:
        """Score in [0, 1] of the new tokens; there may be more of them than the sample asks for."""

    def check(self, settings: EvalConfig, tokenizer: Tokenizer) -> None:
        super().check(settings, tokenizer)
        one = dataclasses.replace(settings, samples=1)
        for length in self.lengths(settings):  # a length that cannot work fails before the first is generated
            next(iter(self.samples(tokenizer, length, one)))

    def prepare(self, tokenizer: Tokenizer, length: int, settings: EvalConfig) -> Ahead[Sample]:
        return Ahead(lambda: self.samples(tokenizer, length, settings), 2 * settings.batch_size)

    def measure(
        self,
        model: Model,
        length: int,
        settings: EvalConfig,
        progress: Progress | None = None,
        prepared: Ahead | None = None,
    ) -> dict[int, Accuracy]:
        records: list[tuple[float | None, float]] = []
        hits, tokens = 0.0, 0
        with prepared or self.prepare(model.tokenizer, length, settings) as samples:
            while batch := list(itertools.islice(samples, model.together(settings))):
                longest = max(sample.max_new_tokens for sample in batch)
                outputs = model.generate([sample.prompt for sample in batch], longest, self.ends)
                for sample, output in zip(batch, outputs, strict=True):
                    score = float(self.score(sample, output, model.tokenizer))
                    records.append((sample.meta.get("depth"), score))
                    hits, tokens = hits + score, tokens + len(sample.prompt)
                if progress is not None:
                    progress(length, len(records), settings.samples, hits)
        count = len(records)
        return {length: Accuracy(hits / count, count, tokens / count, tuple(records))}

    def samples_of(self, result: Accuracy) -> int:
        return result.n

    def cell(self, result: Accuracy) -> str:
        low, high = result.interval
        return f"{100 * result.accuracy:.1f} % [{100 * low:.0f}, {100 * high:.0f}] (n={result.n})"

    def row(self, result: Accuracy) -> dict[str, Any]:
        interval = [round(end, 4) for end in result.interval]
        return {
            "accuracy": result.accuracy,
            "n": result.n,
            "interval": interval,
            "mean_tokens": result.mean_tokens,
        }

    def point(self, result: Accuracy) -> tuple[float, float, float]:
        return result.accuracy, *result.interval

    def records(self, result: Accuracy) -> Sequence[tuple[float | None, float]]:
        return result.records


class LikelihoodTask(Task):
    """Text is scored by its negative log-likelihood per token; the result is the mean over all tokens of a length.

    A subclass gives ``name``, ``heading``, ``settings``, ``wording``, ``variant`` and ``sequences``.
    """

    y_label = "perplexity"
    percent = False
    result = Likelihood

    @abc.abstractmethod
    def sequences(self, tokenizer: Tokenizer, length: int, settings: EvalConfig) -> Rows:
        """Up to ``settings.samples`` sequences of ``length`` tokens, as many as there are.

        Raises:
          UserError: the source cannot be read, or is shorter than one sequence.
        """

    def batches(
        self, model: Model, length: int, settings: EvalConfig, progress: Progress | None = None
    ) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
        """(sequences in it, batch) of one size, as equal as they can be; rows of weight zero fill the last one up.
        ``progress`` is told of a batch when the next one is asked for.
        """
        rows = self.sequences(model.tokenizer, length, settings)
        total = len(rows)
        most = model.together(dataclasses.replace(settings, samples=total))
        size = -(-total // -(-total // most))
        size = -(-size // model.devices) * model.devices
        for start in range(0, total, size):
            batch = [rows[index] for index in range(start, start + size)]
            names = ("tokens", "targets", "loss_weights", "lengths")
            yield min(size, total - start), {name: np.stack([row[name] for row in batch]) for name in names}
            if progress is not None:
                progress(length, min(start + size, total), total)

    def measure(
        self,
        model: Model,
        length: int,
        settings: EvalConfig,
        progress: Progress | None = None,
        prepared: Ahead | None = None,
    ) -> dict[int, Likelihood]:
        del prepared
        total, weight, samples = 0.0, 0.0, 0
        for count, batch in self.batches(model, length, settings, progress):
            batch_total, batch_weight = model.nll(batch)
            total, weight, samples = total + batch_total, weight + batch_weight, samples + count
        return {length: Likelihood(total / weight, round(weight), samples)}

    def samples_of(self, result: Likelihood) -> int:
        return result.samples

    def cell(self, result: Likelihood) -> str:
        return f"{result.perplexity:.3f} ({result.nats:.4f} nats)"

    def row(self, result: Likelihood) -> dict[str, Any]:
        return {"perplexity": result.perplexity, "nats": result.nats, "n": result.n, "samples": result.samples}

    def point(self, result: Likelihood) -> tuple[float, float, float]:
        return result.perplexity, result.perplexity, result.perplexity
