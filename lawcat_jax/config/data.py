"""The data that a training stage reads."""

import dataclasses
import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lawcat_jax.config.choices import (
    TEXT_SUFFIXES,
    BabiTask,
    Bos,
    DataKind,
    Hay,
    SourceKind,
    ValidationWording,
    Wording,
)
from lawcat_jax.config.tree import Node, choice_problems, limit_problems


@dataclasses.dataclass
class MixtureSource(Node):
    """One source of a mixture, with its share and its loss weights."""

    kind: SourceKind = "text"
    """What the source holds."""
    weight: float = 1.0
    """[share, relative] Share of the mixture's samples."""
    source: str = ""
    """``text``, ``instruction``: where from, as in ``data.source``."""
    text_key: str = "text"
    """``text``: the field of a row that holds its text."""
    validation_source: str = ""
    """``text``, ``instruction``: what validation reads, written as ``source``."""
    ignored_fields: tuple[str, ...] = ()
    """``instruction``: fields of rows and messages that say nothing of what is to be learnt, beside those known as such. Others
    that are not understood are refused."""
    chat_date: str = ""
    """``instruction``: the day (YYYY-MM-DD) that a chat template writes which would write today's; without it such a template is
    refused."""
    wording: Wording = "paper"
    """Passkey and the other generated kinds: wording of training samples. ``varied`` and ``composed`` samples fill ``seq_length``."""
    validation_wording: ValidationWording = ""
    """The same of validation samples."""
    hay: Hay = "noise"
    """``niah``, and ``passkey`` in other wordings than the paper's: what surrounds the needle."""
    hay_source: str = ""
    """Book text for ``hay`` and ``babilong``, written as ``source``."""
    babi_source: str = ""
    """``babilong``: directory of bAbI's en-10k files."""
    babi_tasks: tuple[BabiTask, ...] = ("qa1", "qa2", "qa3")
    """``babilong``: tasks to draw stories from; qa3 stories are simulated where there is no train file."""
    min_length_fraction: float = 1.0
    """[share] Below 1, lengths of generated samples are drawn between this share of the full length and all of it."""
    answer_weight: float = 1.0
    """[weight per token] Loss weight of answers."""
    prompt_weight: float = 0.0
    """[weight per token] Loss weight of what precedes an answer."""
    end_weight: float = 0.0
    """[weight per token] Loss weight of the end-of-sequence token behind a generated sample's answer; above 0 a student learns
    to end there. The paper's passkey loss leaves it out, its BABILong samples train it as the answer."""
    text_weight: float = 1.0
    """[weight per token] Loss weight of text."""
    kl_weight: float = 1.0
    """[ratio] Factor on these weights in the divergence from the teacher; 0 where the teacher cannot know the answer."""


@dataclasses.dataclass
class DataConfig(Node):
    """One training stream: generated samples (paper section 4), instructions, text packed to the stage's ``seq_length``, or a
    mixture.

    The loss weights tokens: answers ``answer_weight``, the other tokens of samples with an answer ``prompt_weight`` (1 when
    ``answer_only`` is off), text tokens ``text_weight``.
    """

    kind: DataKind = "passkey"
    """What the stream holds."""
    source: str = ""
    """``text``: ``tfds:<name>[:split]``, ``hf:<name>[:config][:split]``, or a path, directory or glob of .txt, .jsonl
    and .parquet files."""
    text_key: str = "text"
    """``text``: the field of a row that holds its text."""
    passkey_words: int = 870
    """[words] Hay of a passkey sample (870 in the paper); 0 fills ``seq_length``."""
    passkey_fraction: float = 0.0
    """[share] ``text``: share of the sequences that are passkey samples instead."""
    min_length_fraction: float = 1.0
    """[share] Below 1, the length of each passkey sample is drawn between this share of the full length and all of
    it."""
    num_samples: int = 10_000
    """[sequences] Size of a generated set or a mixture, and how many sequences of a remote text, or rows of remote
    instructions, are read (local ones are read whole)."""
    wording: Wording = "paper"
    """Passkey and the other generated kinds: wording of training samples. ``varied`` and ``composed`` samples fill ``seq_length``."""
    validation_wording: ValidationWording = ""
    """The same of validation samples."""
    hay: Hay = "noise"
    """``niah``, and ``passkey`` in other wordings than the paper's: what surrounds the needle."""
    hay_source: str = ""
    """Book text for ``hay`` and ``babilong``, written as ``source``."""
    babi_source: str = ""
    """``babilong``: directory of bAbI's en-10k files."""
    babi_tasks: tuple[BabiTask, ...] = ("qa1", "qa2", "qa3")
    """``babilong``: tasks to draw stories from; qa3 stories are simulated where there is no train file."""
    mixture: tuple[MixtureSource, ...] = ()
    """``mixture``: the sources. A pass has ``num_samples`` samples of all of them, each share rounded for itself; a share of
    which no row is left is refused, of ``validation_samples`` too."""
    pack: bool = False
    """Put several short samples into one row. No sample sees another one of its row."""
    pieces: int = 0
    """[sequences] At least 2: make long samples and cut each into at most so many pieces of ``seq_length`` tokens, which
    follow each other in consecutive batches (states passed from step to step); 0 is off."""
    answer_only: bool = True
    """Passkey: only the answer counts in the loss of stage 2 and pretraining, but for ``prompt_weight``."""
    answer_weight: float = 1.0
    """[weight per token] Loss weight of answers."""
    prompt_weight: float = 0.0
    """[weight per token] Passkey: loss weight of the tokens in front of the answer when ``answer_only`` is on."""
    end_weight: float = 0.0
    """[weight per token] Loss weight of the end-of-sequence token behind a generated sample's answer; above 0 a student learns
    to end there. The paper's passkey loss leaves it out, its BABILong samples train it as the answer."""
    text_weight: float = 1.0
    """[weight per token] Loss weight of text."""
    kl_weight: float = 1.0
    """[ratio] Factor on these weights in the divergence from the teacher; 0 where the teacher cannot know the answer."""
    validation_samples: int = 100
    """[sequences] Held out for validation, of a text the last ones unless ``validation_source`` is set, and then at most a tenth of
    it: a short text is a smaller part of a mixture's validation than of its training. 0 is no validation."""
    validation_source: str = ""
    """Text for validation, written as ``source``."""
    ignored_fields: tuple[str, ...] = ()
    """``instruction``: fields of rows and messages that say nothing of what is to be learnt, beside those known as such. Others
    that are not understood are refused."""
    chat_date: str = ""
    """``instruction``: the day (YYYY-MM-DD) that a chat template writes which would write today's; without it such a template is
    refused."""
    num_workers: int = 0
    """[threads] Prepare batches ahead; 0 prepares them in the training loop."""
    num_processes: int = 0
    """[processes] Make generated samples in so many processes of their own, where threads are too slow for the accelerator; 0 makes
    them in the threads. Changes no sample."""
    add_bos: Bos = "auto"
    """Beginning-of-sequence token at the beginning of sequences. Generation and evaluation of the student follow the last
    stage."""

    def __post_init__(self) -> None:
        if isinstance(self.add_bos, bool):  # of config files for earlier versions
            self.add_bos = "always" if self.add_bos else "never"


_LIMITS = {"num_samples": 2**31 - 1, "validation_samples": 2**24, "num_workers": 1024, "num_processes": 1024}
_LIMITS |= {"passkey_words": 2**26, "pieces": 2**20}


def _passkeys(data: DataConfig | MixtureSource) -> bool:
    """Whether the stream has passkey samples, of its own kind or among text."""
    return data.kind == "passkey" or (data.kind == "text" and getattr(data, "passkey_fraction", 0.0) > 0)


def _instructions(data: DataConfig | MixtureSource) -> bool:
    return data.kind == "instruction"


def _generated(data: DataConfig | MixtureSource) -> bool:
    return data.kind in ("niah", "babilong") or _passkeys(data)


def _answers(data: DataConfig | MixtureSource) -> bool:
    return data.kind == "instruction" or _generated(data)


def _surrounded(data: DataConfig | MixtureSource) -> bool:
    """Whether needles are put into hay: the paper's passkey samples have filler of their own."""
    varied = data.wording != "paper" or data.validation_wording not in ("", "paper")
    return data.kind == "niah" or (_passkeys(data) and varied)


def _ends(data: DataConfig | MixtureSource) -> bool:
    """Whether it is for the user to say what the end of a sample weighs; the paper's BABILong samples train it as the answer."""
    paper = data.wording == "paper" and data.validation_wording in ("", "paper")
    return _generated(data) and getattr(data, "answer_only", True) and not (data.kind == "babilong" and paper)


def _from_source(data: DataConfig | MixtureSource) -> bool:
    return data.kind in ("text", "instruction")


_PASSKEYS = "'passkey', and by 'text' with a passkey_fraction"
_SURROUNDED = f"'niah', and, where the wording is not 'paper', by {_PASSKEYS}"
_GENERATED = f"'niah', 'babilong', {_PASSKEYS}"
_READ_BY: dict[str, tuple[Callable[[DataConfig | MixtureSource], bool], str]] = {
    "source": (_from_source, "'text' and 'instruction'"),
    "text_key": (lambda data: data.kind == "text", "'text'"),
    "validation_source": (_from_source, "'text' and 'instruction'"),
    "ignored_fields": (_instructions, "'instruction'"),
    "chat_date": (_instructions, "'instruction'"),
    "passkey_words": (
        lambda data: data.kind == "passkey" and "paper" in (data.wording, data.validation_wording),
        "'passkey' in the wording 'paper'",
    ),
    "passkey_fraction": (lambda data: data.kind == "text", "'text'"),
    "min_length_fraction": (_generated, _GENERATED),
    "wording": (_generated, _GENERATED),
    "validation_wording": (_generated, _GENERATED),
    "hay": (_surrounded, _SURROUNDED),
    "hay_source": (
        lambda data: data.kind == "babilong" or (_surrounded(data) and data.hay != "noise"),
        f"'babilong' and, with hay 'books' or 'mixed', by {_SURROUNDED}",
    ),
    "babi_source": (lambda data: data.kind == "babilong", "'babilong'"),
    "babi_tasks": (lambda data: data.kind == "babilong", "'babilong'"),
    "mixture": (lambda data: data.kind == "mixture", "'mixture'"),
    "answer_only": (lambda data: data.kind == "mixture" or _answers(data), f"'mixture', 'instruction', {_GENERATED}"),
    "answer_weight": (_answers, f"'instruction', {_GENERATED}"),
    "prompt_weight": (
        lambda data: _answers(data) and getattr(data, "answer_only", True),
        f"'instruction', {_GENERATED}, all with answer_only",
    ),
    "end_weight": (
        _ends,
        f"{_GENERATED}, all with answer_only, and 'babilong' not in the wording 'paper', which trains the end",
    ),
    "text_weight": (lambda data: data.kind == "text", "'text'"),
    "kl_weight": (lambda data: data.kind != "mixture", "all kinds but 'mixture'"),
}
"""Field -> (whether a stream reads it, the kinds that do, for messages). Fields that are not here are read by all."""


def _unread_problems(data: DataConfig | MixtureSource, path: str) -> list[str]:
    """Fields that were given a value and that a stream of this kind does not read."""
    problems = []
    for field in dataclasses.fields(data):
        reads, kinds = _READ_BY.get(field.name, (None, ""))
        value: Any = getattr(data, field.name)
        unset = value == field.default or (field.name == "passkey_words" and value == 0)  # what other kinds do anyway
        if reads is None or unset or reads(data):
            continue
        shown = (
            f"{len(data.mixture)} source(s)" if isinstance(data, DataConfig) and value is data.mixture else repr(value)
        )
        has_own = data.kind == "mixture" and field.name in MixtureSource.__dataclass_fields__
        instead = "; a mixture's sources have their own" if has_own else ""
        problems.append(f"{path}.{field.name}: {shown} is not read by kind {data.kind!r}, only by {kinds}{instead}")
    return problems


def data_problems(data: DataConfig, path: str) -> list[str]:
    """Values of a stream that cannot be, and values that nothing reads, one line each; types are taken as right."""
    problems = choice_problems(data, path) + _source_problems(data, path) + _unread_problems(data, path)
    for index, source in enumerate(data.mixture if data.kind == "mixture" else ()):
        name = f"{path}.mixture[{index}]"
        problems += choice_problems(source, name) + _source_problems(source, name) + _unread_problems(source, name)
        if source.weight < 0:
            problems.append(f"{name}.weight: {source.weight} must not be negative")
    if data.kind == "mixture" and not any(source.weight > 0 for source in data.mixture):
        problems.append(f"{path}.mixture: name at least one source with a positive weight for kind 'mixture'")
    for count in ("num_samples", "validation_samples"):
        problems += share_problems(data, path, count)
    if not 0 <= data.passkey_fraction <= 1:
        problems.append(f"{path}.passkey_fraction: {data.passkey_fraction} is outside [0, 1]")
    if data.num_samples < 1:
        problems.append(f"{path}.num_samples: {data.num_samples} must be at least 1")
    if data.pieces == 1 or (data.pieces and data.pack):
        problems.append(f"{path}.pieces: {data.pieces} must be 0 (off) or at least 2, and does not go with pack")
    problems += limit_problems(data, path, _LIMITS)
    for name in ("validation_samples", "passkey_words", "num_workers", "num_processes", "pieces"):
        if getattr(data, name) < 0:
            problems.append(f"{path}.{name}: {getattr(data, name)} must not be negative")
    return problems


def share_problems(data: DataConfig, path: str, count: str) -> list[str]:
    """Sources of a mixture of whose share of ``count`` (``num_samples`` or ``validation_samples``) no row is left, one line each.
    A stream in pieces is endless, so that each source has its share of the training."""
    rows, total = getattr(data, count), sum(source.weight for source in data.mixture if source.weight > 0)
    if data.kind != "mixture" or rows < 1 or not math.isfinite(total) or (data.pieces and count == "num_samples"):
        return []
    return [
        f"{path}.mixture[{index}].weight: {source.weight:g} of {total:g} is less than half a row of {path}.{count} {rows}, so that "
        f"nothing of this source ({source.source or source.kind}) would be left; raise the weight or {count}, or take the source out"
        for index, source in enumerate(data.mixture)
        if source.weight > 0 and not round(rows * (source.weight / total))
    ]


def is_counted(data: DataConfig) -> bool:
    """Whether a pass over the stream has as many rows as its sources give (or, packed, fill), which only reading them tells;
    else it has ``num_samples``."""
    if data.pieces or (data.kind == "text" and data.passkey_fraction == 1):
        return False
    return data.pack or data.kind in ("text", "instruction")


def suffix_problems(source: str, path: str, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[str]:
    """A file that is there but whose name says that it is no text of a kind that is read."""
    file = Path(source).expanduser() if source and not source.startswith(("hf:", "tfds:")) else None
    try:
        wrong = file is not None and file.is_file() and file.suffix.lower() not in suffixes
    except (OSError, ValueError):  # what cannot even be looked up is for the reader to say
        wrong = False
    return [f"{path}: {source!r} has an unknown suffix, expected one of {', '.join(suffixes)}"] if wrong else []


def weight_problems(data: DataConfig, path: str) -> list[str]:
    """A stream in which no token counts."""
    sources = [(f"{path}.mixture[{i}]", s) for i, s in enumerate(data.mixture) if s.weight] or [(path, data)]
    problems = []
    for name, source in sources if data.kind == "mixture" else [(path, data)]:
        text = source.kind == "text"
        answers = source.answer_weight > 0 or source.prompt_weight > 0
        if text and source.text_weight == 0 and not (data.passkey_fraction and answers):
            problems.append(f"{name}.text_weight: with 0 no token of this text is learnt from")
        if not text and not answers:
            problems.append(f"{name}.answer_weight: with 0, and prompt_weight 0, no token is learnt from")
    return problems


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _source_problems(source: DataConfig | MixtureSource, path: str) -> list[str]:
    problems = []
    if source.kind in ("text", "instruction") and not source.source:
        problems.append(f"{path}.source: name a text source (tfds:..., hf:..., or a path) for kind {source.kind!r}")
    for name in ("source", "validation_source", "hay_source"):
        text = name == "hay_source" or source.kind == "text"
        if text or source.kind == "instruction":
            problems += suffix_problems(
                getattr(source, name), f"{path}.{name}", TEXT_SUFFIXES if text else TEXT_SUFFIXES[2:]
            )
    if not source.hay_source and _READ_BY["hay_source"][0](source):
        problems.append(f"{path}.hay_source: name books (a path, hf:..., or tfds:...) for kind {source.kind!r}")
    if source.kind == "babilong" and not source.babi_tasks:
        problems.append(f"{path}.babi_tasks: name at least one task")
    if source.chat_date and not _is_date(source.chat_date):
        problems.append(f"{path}.chat_date: {source.chat_date!r} is no date such as 2026-01-31")
    if not 0 <= source.min_length_fraction <= 1:
        problems.append(f"{path}.min_length_fraction: {source.min_length_fraction} is outside [0, 1]")
    for name in ("answer_weight", "prompt_weight", "end_weight", "text_weight", "kl_weight"):
        if getattr(source, name) < 0:
            problems.append(f"{path}.{name}: {getattr(source, name)} must not be negative")
    return problems
